"""Cards hold no number that is not measured, and their code runs."""

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cards
import pytest
import shares
import yaml
from code_blocks import find_blocks
from conftest import CONFIG, NAME, OWNER
from pages import name_depths, show
from repos import NOBODY, ReleaseError
from run import Evaluation, EvaluationArguments

from datasets_scripts import get_task
from datasets_scripts.card import describe

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
# A minus stands before a number, a hyphen between words.
NUMBER = re.compile(r"(?:(?<![\w.])-)?\d+(?:[.,]\d+)*(?:e-?\d+)?")


def leaves(value):
    """All plain values within a value."""
    if isinstance(value, dict):
        for name, own in value.items():
            yield name
            yield from leaves(own)
    elif isinstance(value, list | tuple):
        for own in value:
            yield from leaves(own)
    else:
        yield value


def forms(value):
    """The numbers as which a card may show a value."""
    yield from NUMBER.findall(str(value))
    if isinstance(value, int):
        yield f"{value:,}"
    elif isinstance(value, float):
        for text in (f"{value:.3f}", f"{value:.2f}", f"{value:.1%}", str(round(value, 4))):
            yield from NUMBER.findall(text)


def numbers_of_prose(text):
    return set(NUMBER.findall(re.sub(r"```python.*?```", "", text, flags=re.DOTALL)))


def numbers_of_sources(checkpoint):
    metrics = checkpoint.metrics
    sources = [*leaves(dataclasses.asdict(checkpoint)), metrics["flops"] / metrics["flops_full"], cards.PAPER]
    # Made of measured counts; which of them stand where, the next test says.
    sources += leaves(cards._pool_sizes(metrics))
    sources.append(describe(get_task(checkpoint.recipe["task"])))
    return {form for value in sources for form in forms(value)}


def fixed_numbers():
    """Those of the template's own words: 95 % and the like."""
    template = (ROOT / "release" / "card.md.jinja").read_text()
    return numbers_of_prose(re.sub(r"\{[{%].*?[}%]\}", "", template, flags=re.DOTALL))


def shift(value, step):
    """Each number of the metrics changed by another amount."""
    if isinstance(value, dict):
        return {name: shift(own, step) for name, own in value.items()}
    if isinstance(value, list):
        return [shift(own, step) for own in value]
    return value + next(step) if isinstance(value, float) else value


def test_every_number_is_measured(checkpoint):
    found = cards.read_checkpoint(checkpoint)
    assert fixed_numbers() <= {"0", "1", "2.0", "95", "2026"}
    steps = (0.0137 * i for i in range(10**6))
    moved = dataclasses.replace(found, metrics=shift(found.metrics, steps))
    for own in (found, moved):
        strangers = numbers_of_prose(cards.make_card(own, OWNER)) - numbers_of_sources(own) - fixed_numbers()
        assert not strangers
    assert numbers_of_prose(cards.make_card(moved, OWNER)) != numbers_of_prose(cards.make_card(found, OWNER))


BOUNDS = {"value": "accuracy", "low": "accuracy_low", "high": "accuracy_high"}


def test_the_card_says_what_was_measured(checkpoint):
    found = cards.read_checkpoint(checkpoint)
    card, metrics = cards.make_card(found, OWNER), found.metrics
    beyond = metrics["analyses"]["generalization"]["beyond"]
    for estimate, digits in ((metrics["accuracy"], 3), (metrics["depth"], 2), (metrics["depth_all"], 2)):
        assert f"| {show(estimate, digits)} |" in card
    sizes = metrics["analyses"]["generalization"]["by_size"]
    further = shares.pool([row for row in sizes if row["size"] > metrics["size_limit"]])
    assert further["value"] == pytest.approx(beyond["accuracy_beyond"])
    limits = " ".join(card.split("## Limits")[1].split())
    assert (
        f"{show(metrics['accuracy'], 3)} of the answers up to there are right; of larger ones {show(further, 3)}."
        in limits
    )
    (largest,) = [row["depth"] for row in sizes if row["size"] == metrics["size_limit"]]
    assert f"{beyond['depth_within']:.2f} (at size {metrics['size_limit']} alone {largest:.2f}), and" in limits
    assert f"and {beyond['depth_beyond']:.2f} beyond." in limits
    assert f"at full depth | {metrics['flops'] / metrics['flops_full']:.1%} |" in card
    aligned = metrics["analyses"]["alignment"]["per_example"]["exit_depth"]["all"]
    row = " | ".join(
        "-" if aligned[name]["value"] is None else show(aligned[name], 2)
        for name in ("size", "size balanced", "size given length", "difficulty", "difficulty given size")
    )
    assert f"| mean over the answer | all | {row} |" in card
    for point in metrics["controls"]:
        row = " | ".join([show(point["accuracy"], 3), show(point["depth"], 2), show(point["depth_all"], 2)])
        cost = f"{point['flops_share']:.1%} | {show(point['given_hit'], 3)}"
        assert f"| {name_depths(point['depths'])} | {row} | {cost} |" in card
    for row in metrics["analyses"]["generalization"]["by_size"]:
        mark = ", beyond training" if row["size"] > metrics["size_limit"] else ""
        accuracy = {bound: row[name] for bound, name in BOUNDS.items()}
        assert f"| {row['size']}{mark} | {row['n']} | {show(accuracy, 3)} |" in card
    assert f"distribution has reached {found.generation['exit_quantile']}" in card


def test_the_hub_reads_the_header(checkpoint):
    found = cards.read_checkpoint(checkpoint)
    header = yaml.safe_load(cards.make_card(found, OWNER).split("---\n")[1])
    assert header["library_name"] == "transformers"
    assert header["license"] == "apache-2.0"
    assert header["pipeline_tag"] == "text-generation"
    assert header["datasets"] == [f"{OWNER}/anira-tasks"]
    assert "arxiv:2602.08864" in header["tags"]
    results = [metric for result in header["model-index"][0]["results"] for metric in result["metrics"]]
    assert [result["value"] for result in results if result["name"] == "Accuracy"] == [
        round(found.metrics["accuracy"]["value"], 4)
    ]


@pytest.mark.parametrize("task", ["mano-mini", "lano-mini"])
@pytest.mark.parametrize("decider", ["early", "fixed", "stability"])
def test_cards_of_other_models_where_little_was_measured(checkpoint, task, decider):
    found = copy.deepcopy(cards.read_checkpoint(checkpoint))
    found.config["decider"] = decider
    found.recipe["task"] = task
    found.metrics["controls"] = []
    found.metrics["analyses"] = {name: {"reason": "it failed"} for name in found.metrics["analyses"]}
    card = cards.make_card(found, OWNER)
    assert ("Not measured: it failed." in card) == (decider != "fixed")
    assert ("there is nothing to correlate" in card) == (decider == "fixed")
    assert "what happens beyond was not measured" in card
    assert f"do_sample={task == 'lano-mini'}" in card
    assert ("exits by the rule" in card) == (decider != "fixed")
    assert "\n\n\n" not in card


def test_the_code_of_a_card_runs_as_a_reader_would_paste_it(assembled, checkpoint, tmp_path):
    folder = assembled / f"anira-{NAME}"
    (code,) = find_blocks((folder / "README.md").read_text(), "python")
    assert f'"{OWNER}/anira-{NAME}"' in code
    script = tmp_path / "pasted.py"
    stranger = "import sys\nsys.modules['modeling_anira'] = None\n"
    script.write_text(stranger + code.replace(f"{OWNER}/anira-{NAME}", str(folder)))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("answer: ")
    depths = [int(line.split()[-1]) for line in lines[1:]]
    assert depths[-1] == 0
    assert all(1 <= depth <= 3 for depth in depths[:-1])


def test_the_command_writes_the_card_beside_the_weights(checkpoint, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / NAME)
    monkeypatch.setattr(sys, "argv", ["cards.py", str(folder), "--owner", OWNER])
    cards.main()
    assert (folder / "README.md").read_text() == cards.make_card(cards.read_checkpoint(folder), OWNER)
    (folder / "metrics.json").write_text("{")
    with pytest.raises(SystemExit, match=r"metrics\.json is no JSON"):
        cards.main()


def test_the_card_repeats_the_options_of_the_evaluation(checkpoint):
    """It named the whole evaluation where a quick one had been run."""
    found = cards.read_checkpoint(checkpoint)
    line = "--rows 0 --sweep_rows 0 --resamples 20 --batch_size 256 --part_rows 512 --training_log log.jsonl --out"
    assert f"--model {OWNER}/{found.repo} " in cards.make_card(found, OWNER)
    assert line in cards.make_card(found, OWNER)


def test_the_card_draws_the_same_rows_of_the_same_dataset(checkpoint, dataset, tmp_path):
    """An evaluation on some rows was to be repeated on a dataset with no others, and its seed was not said."""
    out = tmp_path / "evaluation"
    arguments = EvaluationArguments(str(checkpoint), str(dataset), CONFIG, str(out), rows=10, controls=False)
    Evaluation(dataclasses.replace(arguments, resamples=20, sweep_rows=0)).run()
    folder = shutil.copytree(checkpoint, tmp_path / NAME)
    (out / "metrics.json").rename(folder / "metrics.json")
    card = cards.make_card(cards.read_checkpoint(folder), OWNER)
    assert "build.py --seed 0 --rows 60 --eval_rows 40 \\\n" in card
    assert "--rows 10 " in card
    metrics = json.loads((folder / "metrics.json").read_text())
    # On the Hub the record is not at hand; before 2026-11-27 it was not kept.
    for other in ({**metrics, "drawn": None}, {name: value for name, value in metrics.items() if name != "drawn"}):
        (folder / "metrics.json").write_text(json.dumps(other))
        assert "build.py --eval_rows 10 \\\n" in cards.make_card(cards.read_checkpoint(folder), OWNER)


def test_an_evaluation_of_another_model_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / NAME)
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "decider": "early"}))
    with pytest.raises(ReleaseError, match=r"`decider` .* 'early', but must be 'online'"):
        cards.read_checkpoint(folder)
    # Once a card said the new rule beside depths and accuracy of the old one.
    (folder / "metrics.json").write_text(json.dumps(metrics))
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "exit_quantile": 0.9}))
    with pytest.raises(ReleaseError, match=r"`exit_quantile` .* is 0\.4, but 0\.9 beside it"):
        cards.read_checkpoint(folder)
    (folder / "metrics.json").write_text(json.dumps({**metrics, "weights_digest": ""}))
    with pytest.raises(ReleaseError, match="of other weights"):
        cards.read_checkpoint(folder)


# Not those that a user has put beside them.
RELEASED = [path for path in sorted((ROOT / "checkpoints").glob("*/")) if (RESULTS / f"{path.name}.json").exists()]


def test_the_released_checkpoints_are_there():
    names = {f"{task}-mini-{decider}" for task in ("brevo", "lano", "mano") for decider in ("online", "early", "fixed")}
    assert names <= {path.name for path in RELEASED}


def test_what_a_model_wrote_at_length_is_not_called_beyond_training():
    """LANO's prompts ask for no size, but its card called long sentences "beyond training", "not measured"."""
    text = (ROOT / "checkpoints" / "lano-mini-early" / "README.md").read_text()
    assert "by the size of what was written" in text
    assert "beyond training |" not in text
    assert "beyond training |" in (ROOT / "checkpoints" / "brevo-mini-early" / "README.md").read_text()


@pytest.mark.parametrize("folder", RELEASED, ids=lambda folder: folder.name)
def test_cards_in_this_clone_are_what_their_sources_give(folder):
    found = cards.read_checkpoint(folder)
    card = (folder / "README.md").read_text()
    assert card == cards.make_card(found, NOBODY)
    assert "\n\n\n" not in card
    assert {path.name for path in folder.iterdir()} == {*cards.FILES, "README.md"}
    assert found.metrics["rows"]["test"] >= 4000


@pytest.mark.parametrize("name", ["brevo-mini-online", "lano-mini-early", "mano-mini-fixed"])
def test_the_card_of_a_checkpoint_in_this_clone_runs_in_it(name):
    """It asked for a repo of an account that does not exist."""
    card = (ROOT / "checkpoints" / name / "README.md").read_text()
    (code,) = find_blocks(card, "python")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("answer: ")
