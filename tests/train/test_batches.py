"""What a step reads: the same rows and random numbers however it is shared out, labelled as the recipe says."""

import itertools

import finetune
import pytest
import torch
from batches import DatasetSource, StepBatches, StreamSource, open_source
from datasets import Dataset
from labels import IGNORED, make_labels
from recipe import RecipeError, make_recipe
from torch.utils.data import DataLoader

from datasets_scripts import build, make_tokenizer
from datasets_scripts.vocabulary import decode, encode

BARE = {"steps": 50, "batch_size": 12, "learning_rate": 1e-3, "model": {"max_position_embeddings": 256}}


def make_batches(noise_shape=(), process=0, num_processes=1, **changes):
    recipe = make_recipe({**BARE, "task": "brevo-mini", **changes})
    return StepBatches(recipe, open_source(recipe), make_tokenizer(), noise_shape, process, num_processes)


def rows_of(micro_batches):
    """[(ids, labels, noise)] of the real tokens of every row."""
    found = []
    for batch in micro_batches:
        for row in range(len(batch["input_ids"])):
            real = batch["attention_mask"][row].bool()
            found.append(
                tuple(tuple(batch[name][row][real].tolist()) for name in ("input_ids", "labels", "exit_noise"))
            )
    return found


def test_labels_are_the_answer_or_everything_but_the_answer_mark():
    ids = encode("<bos> <len_1> + 3 4 <ans> 2 <eos>")
    ignored = [IGNORED] * 6
    assert make_labels(ids, 6, "completion") == ignored + encode("2 <eos>")
    everything = make_labels(ids, 6, "all", never=encode("<ans>"))
    assert everything == [*encode("<bos> <len_1> + 3 4"), IGNORED, *encode("2 <eos>")]


@pytest.mark.parametrize("noise_shape", [(), (4,)])
def test_a_step_is_the_same_for_any_number_of_processes_and_micro_batches(noise_shape):
    whole = rows_of(make_batches(noise_shape)[7])
    for processes, accumulation in ((2, 1), (1, 3), (2, 3)):
        shares = [
            make_batches(noise_shape, process, processes, accumulation=accumulation)[7] for process in range(processes)
        ]
        assert all(len(share) == accumulation for share in shares)
        assert sorted(itertools.chain(*map(rows_of, shares))) == sorted(whole)
        assert {batch["step_labels"] for share in shares for batch in share} == {make_batches()[7][0]["step_labels"]}
    assert sum(len(ids) for ids, _, _ in whole) == make_batches()[7][0]["step_tokens"]
    assert (
        sum(label != IGNORED for _, labels, _ in whole for label in labels[1:]) == make_batches()[7][0]["step_labels"]
    )


def test_steps_can_be_read_in_any_order_and_no_row_twice():
    batches = make_batches()
    indices = [batches[step][0]["indices"] for step in range(16)]
    assert sorted(index for own in indices for index in own) == list(range(16 * 12))
    fresh = make_batches()
    for step in (15, 3, 9):
        again = fresh[step][0]
        assert torch.equal(again["input_ids"], batches[step][0]["input_ids"])
        assert torch.equal(again["exit_noise"], batches[step][0]["exit_noise"])
    other = make_batches(seed=1)
    assert not torch.equal(other[0][0]["exit_noise"][:, :5], batches[0][0]["exit_noise"][:, :5])


def test_a_curriculum_lets_larger_sizes_in_step_by_step():
    recipe = make_recipe({**BARE, "task": "brevo-mini", "curriculum": 0.5, "batch_size": 64})
    least, largest = recipe.make_task().config.min_size, recipe.make_task().config.max_size
    source = open_source(recipe)
    found = [max(row["size"] for row in source.read(64 * step, 64)) for step in range(50)]
    assert found == sorted(found[:25]) + found[25:]
    assert found[0] == recipe.largest_size(0) == least
    assert set(found[:25]) == set(range(least, largest))
    assert {recipe.largest_size(step) for step in range(25, 50)} == {largest} == set(found[25:])
    # A run that goes on from step 17 reads what an undisturbed one reads.
    assert open_source(recipe).read(64 * 17, 64) == source.read(64 * 17, 64)


def test_a_gapped_grid_trains_its_sizes_alone_in_equal_shares():
    source = open_source(make_recipe({**BARE, "task": "brevo-mini", "sizes": [3, 6]}))
    rows = source.read(0, 40)
    assert [row["index"] for row in rows] == list(range(40))
    assert sorted(row["size"] for row in rows) == [3] * 20 + [6] * 20
    assert source.read(13, 20) == rows[13:33]


def test_a_random_depth_is_one_a_step_and_takes_every_value():
    batches = make_batches(random_depth=True, model={**BARE["model"], "decider": "fixed", "max_depth": 3})
    depths = [batches[step][0]["depth"] for step in range(50)]
    assert set(depths) == {1, 2, 3}
    assert depths == [
        make_batches(random_depth=True, model=batches.recipe.model)[step][0]["depth"] for step in range(50)
    ]
    assert make_batches()[0][0]["depth"] is None


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_read_the_same_steps(workers):
    """With two, each read its own share of the stream, and the run died at the first step."""
    batches = make_batches()
    loader = DataLoader(batches, sampler=range(3, 9), batch_size=None, num_workers=workers)
    for step, micro_batches in zip(range(3, 9), loader, strict=True):
        assert micro_batches[0]["indices"] == batches[step][0]["indices"]
        assert torch.equal(micro_batches[0]["input_ids"], batches[step][0]["input_ids"])


def test_padding_is_on_the_right_and_little_of_it_is_left_where_steps_are_cut():
    def share_of_padding(**changes):
        steps = [make_batches(batch_size=64, **changes)[step] for step in range(8)]
        masks = [batch["attention_mask"] for step in steps for batch in step]
        assert all((mask.diff(dim=1) <= 0).all() for mask in masks)
        return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    assert share_of_padding(accumulation=8) < 0.15 < 0.2 < share_of_padding()
    assert make_batches(pad_to_multiple=16)[0][0]["input_ids"].shape[1] % 16 == 0


def test_every_step_has_all_lengths():
    """Batches were once cut by length across steps: BREVO was at 48 % after 600 steps, and is at 75 % now."""
    batches = make_batches(task="mano-mini", batch_size=64)
    task = batches.recipe.make_task()
    every = {task.longest_example(size) for size in range(task.config.min_size, task.config.max_size + 1)}
    for step in range(8):
        assert set(batches[step][0]["attention_mask"].sum(1).tolist()) == every


def test_places_in_the_batch_are_places_in_the_example():
    batch = make_batches()[0][0]
    for row, start in enumerate(batch["answer_start"].tolist()):
        words = decode(batch["input_ids"][row].tolist()).split()
        assert words[start - 1] == "<ans>"
        assert batch["labels"][row, :start].eq(IGNORED).all()
        assert batch["labels"][row, start] == batch["input_ids"][row, start]


def test_a_built_dataset_is_read_whole_in_every_epoch_in_another_order(tmp_path):
    folder = build.build(build.BuildArguments(str(tmp_path / "tasks"), ["mano-mini"], [], 50, 10, processes=1))
    source = DatasetSource(str(folder), "mano-mini", seed=3)
    epochs = [source.read(start, 50) for start in (0, 50)]
    for epoch in epochs:
        assert sorted(row["index"] for row in epoch) == list(range(50))
    assert [row["index"] for row in epochs[0]] != [row["index"] for row in epochs[1]]
    assert source.read(45, 10) == epochs[0][45:] + epochs[1][:5]
    fresh = StreamSource(make_recipe({**BARE, "task": "mano-mini"})).read(0, 50)
    by_index = {row["index"]: row["input_ids"] for row in epochs[0]}
    assert [row["input_ids"] for row in fresh] == [by_index[index] for index in range(50)]
    with pytest.raises(RecipeError, match="`task_settings` change what is drawn"):
        make_batches(data=str(folder), task_settings={"max_size": 8})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "<bos> 4 2 <query> 2 <ans>", "completion": ""}, ["nothing to learn", "<bos> 4 2"]),
        ({"text": ""}, ["nothing to learn"]),
        ({"text": "1"}, ["nothing to learn"]),
        ({"prompt": "wolf <ans>", "completion": "2 <eos>"}, ["does not know", "wolf"]),
    ],
)
def test_a_row_to_fine_tune_on_that_says_nothing_is_refused(row, words):
    """A step of such rows alone was 0 / 0: Trainer logged a loss of 0, and the saved model was NaN throughout."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words below are the match
        finetune.tokenize(Dataset.from_list([row]), make_tokenizer(), "completion", 64)
    for word in words:
        assert word in str(error.value)


def test_an_end_that_is_the_unknown_word_too_is_known():
    """As in GPT-2's tokenizer: data that ended their texts were said to be of another tokenizer."""
    tokenizer = make_tokenizer()
    tokenizer.unk_token = tokenizer.eos_token
    rows = finetune.tokenize(Dataset.from_list([{"text": "1 2 <eos>"}]), tokenizer, "all", 64)
    assert rows[0]["input_ids"][-1] == tokenizer.eos_token_id


def test_sizes_that_are_too_rare_to_draw_name_the_setting():
    """A curriculum over LANO's long sentences ended in a traceback at the first step."""
    recipe = make_recipe({**BARE, "task": "lano-paper", "curriculum": 0.5, "model": {}})
    with pytest.raises(RecipeError, match=r"`curriculum` or `sizes`: .*no instance"):
        StreamSource(recipe).read(0, 2)
