"""An example depends on (task, config, split, seed, index) alone, and its instance decides its split."""

import numpy as np
import pytest

from datasets_scripts import PRESETS, get_task
from datasets_scripts.brevo import Brevo, BrevoConfig
from datasets_scripts.grammar import Grammar
from datasets_scripts.lano import Lano, LanoConfig
from datasets_scripts.mano import Mano, ManoConfig
from datasets_scripts.randomness import SPLITS, stream_key
from datasets_scripts.streaming import stream

# fmt: off
PINNED_MANO = [2, 10, 6, 7, 77, 77, 75, 4, 75, 3, 2, 10, 8, 7, 73, 73, 74, 4, 73, 3]
PINNED_BREVO = [
    2, 92, 88, 85, 77, 85, 91, 88, 84, 92, 84, 85, 86, 79, 89, 84, 86, 85, 79, 91, 89, 88, 79, 84, 79, 92, 79,
    92, 85, 79, 86, 88, 77, 86, 89, 84, 77, 77, 86, 88, 85, 84, 85, 77, 89, 5, 91, 4, 92, 88, 84, 85, 91, 3
]
PINNED_LANO = [
    2, 74, 76, 75, 76, 76, 76, 4, 74, 75, 76, 75, 76, 75, 76, 75, 76, 75, 75, 75, 75, 76, 76, 76, 75, 75, 75,
    76, 76, 76, 76, 76, 76, 3
]
# fmt: on


@pytest.mark.parametrize("name", ["mano-mini", "brevo-mini", "brevo-paper-words", "lano-mini"])
def test_an_example_can_be_made_alone_in_any_order(name):
    task = get_task(name)
    together = task.generate("validation", range(50), seed=3)
    for index in (49, 0, 17):
        alone = task.generate("validation", [index], seed=3)
        own = slice(together.offsets[index], together.offsets[index + 1])
        assert alone.tokens.tolist() == together.tokens[own].tolist()
        assert alone.instance[0] == together.instance[index]
        again = type(task).from_settings(task.settings()).generate("validation", [index], seed=3)
        assert again.tokens.tolist() == alone.tokens.tolist()


def test_the_numbers_drawn_are_those_of_every_machine_and_release():
    """Pinned: a change here changes every dataset, and needs a new version of them."""
    assert int(stream_key("mano", 1)) == 1420230616692741407
    assert Mano(ManoConfig(1, 4, 8, 5)).generate("train", range(2)).tokens.tolist() == PINNED_MANO
    brevo = Brevo(BrevoConfig(max_size=10, extrapolation_size=20, num_names=20))
    assert brevo.generate("test", [0]).tokens.tolist() == PINNED_BREVO
    grammar = Grammar.random(4, 3, 2, (2, 3), 3, seed=1)
    lano = Lano(LanoConfig(grammar.shortest, 47, grammar.longest, grammar))
    assert lano.generate("test", [0]).tokens.tolist() == PINNED_LANO


@pytest.mark.parametrize("name", ["mano-paper", "brevo-paper", "lano-paper"])
def test_no_instance_of_200_000_paper_rows_is_in_two_splits(name):
    """Among them several seeds of train, as streams have them."""
    task = get_task(name)
    rows = {"train": 140_000, "validation": 20_000, "test": 20_000, "extrapolation": 20_000}
    instances = {}
    for split in SPLITS:
        seeds = range(7) if split == "train" else (0, 1)
        per_seed = rows[split] // len(seeds)
        drawn = [
            task.generate(split, range(start, min(start + 2000, per_seed)), seed).instance
            for seed in seeds
            for start in range(0, per_seed, 2000)
        ]
        instances[split] = np.unique(np.concatenate(drawn))
    for split in SPLITS:
        for other in SPLITS:
            assert split == other or len(np.intersect1d(instances[split], instances[other])) == 0, (split, other)
    assert (instances["train"] % 100 < 90).all()
    assert (instances["test"] % 100 >= 95).all()


def test_neighbouring_seeds_and_indices_share_nothing():
    """A generator seeded with seed + index has 499 of 500 items in common with its neighbour."""
    task = get_task("brevo-paper")
    drawn = [set(task.generate("train", range(500), seed).instance.tolist()) for seed in (42, 43)]
    assert len(drawn[0] & drawn[1]) <= 2
    assert len(drawn[0]) >= 498


def test_mini_and_paper_share_no_instance_across_splits():
    """The canonical form knows no config: a graph is in the same split, whatever drew it."""
    small = Mano(ManoConfig(1, 2, 2, 3))
    train = set(get_task("mano-mini").generate("train", range(20_000)).instance.tolist())
    test = set(small.generate("test", range(2_000)).instance.tolist())
    assert not train & test
    assert train & set(small.generate("train", range(2_000)).instance.tolist()), "nothing could have been shared"


def test_a_split_without_instances_is_refused():
    tiny = Mano(ManoConfig(1, 1, 1, 2))
    with pytest.raises(ValueError, match="found no instance of sizes 1 to 1"):
        [tiny.generate(split, [0]) for split in ("validation", "test")]
    with pytest.raises(ValueError, match="`extrapolation_size` is 1, but must be above"):
        tiny.generate("extrapolation", [0])
    with pytest.raises(ValueError, match="`split` is 'dev'"):
        tiny.generate("dev", [0])
    with pytest.raises(ValueError, match="`indices` is"):
        tiny.generate("train", [-1])
    with pytest.raises(ValueError, match="`task` is 'mano', but must be one of mano-mini"):
        get_task("mano")
    with pytest.raises(ValueError, match="`columns` is 'lenght'"):
        stream("mano-mini", columns=["lenght"])


def test_every_preset_draws_every_split():
    for name in PRESETS:
        task = get_task(name)
        for split in SPLITS:
            least, largest = task.config.size_range(split)
            batch = task.generate(split, range(3))
            assert ((batch.size >= least) & (batch.size <= largest)).all()
            assert len(task.label(batch).token_difficulty) == len(batch.tokens)
