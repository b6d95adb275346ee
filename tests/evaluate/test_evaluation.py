"""`evaluate/run.py` and `evaluate/report.py`, on small models of every kind."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import analyse
import claims
import matplotlib.pyplot as plt
import measures
import numpy as np
import pandas as pd
import pytest
import report
import run
import torch
from cases import task_model
from controls import matched_random, matched_stability, oracle, with_known_size_words, with_stability
from examples import EvaluationError, load_examples, open_task, spread, take
from figures import Run, put_legend
from pages import show
from passes import Depths, run_examples, run_given
from safetensors.torch import load_file
from scipy import stats
from shares import unpack

from datasets_scripts import build, make_tokenizer
from datasets_scripts.answers import ask
from datasets_scripts.vocabulary import EOS, WORDS
from modeling_anira import AniraForCausalLM

ROOT = Path(__file__).resolve().parents[2]
ROWS = 30


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    arguments = build.BuildArguments(
        str(tmp_path_factory.mktemp("d") / "tasks"), ["mano-mini", "brevo-mini", "lano-mini"]
    )
    arguments.rows, arguments.eval_rows, arguments.processes = 50, 60, 1
    return build.build(arguments)


def save(folder, model):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def evaluate_model(out, folder, data, config="brevo-mini", **changes):
    settings = {"rows": ROWS, "resamples": 20, "sweep_rows": 12, "part_rows": 16, "batch_size": 32, **changes}
    arguments = run.EvaluationArguments(model=str(folder), dataset=str(data), config=config, out=str(out), **settings)
    return run.Evaluation(arguments).run()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, data):
    """Runs of early and online on brevo, with a log of training beside one model."""
    folder = tmp_path_factory.mktemp("runs")
    lines = [
        {
            "kind": "evaluation",
            "split": "validation",
            "step": 10 * i,
            "depth": 1 + min(i, 20 - i) / 5,
            "depth_all": 2.0,
            "accuracy": i / 20,
        }
        for i in range(20)
    ]
    for decider in ("early", "online"):
        model = save(folder / f"trained-{decider}" / "model", task_model(decider))
        if decider == "online":
            (model.parent / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        evaluate_model(folder / decider, model, data)
    return folder


def read(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_tables_hold_every_token_that_was_run(evaluated, data):
    task = open_task(str(data), "brevo-mini")
    for decider in ("early", "online"):
        tokens = pd.read_parquet(evaluated / decider / "test" / "tokens.parquet")
        examples = pd.read_parquet(evaluated / decider / "test" / "examples.parquet")
        assert examples["example"].tolist() == list(range(ROWS))
        assert tokens.groupby("example").size().tolist() == examples["num_tokens"].tolist()
        for _, example in examples.iterrows():
            own = tokens[tokens["example"] == example["example"]]
            words = example["text"].split()
            assert own["token"].tolist() == words[:-1]
            answer = words.index("<ans>")
            assert own["is_answer"].tolist() == [position >= answer for position in range(len(words) - 1)]
            prompt, completion = " ".join(words[: answer + 1]), " ".join(words[answer + 1 :])
            assert task.verify(prompt, completion).correct == example["correct"]
            assert example["depth"] == pytest.approx(own.loc[own["is_answer"], "exit_depth"].mean())
        assert tokens["exit_depth"].between(1, 4).all()
        assert tokens["exit_depth"].nunique() > 1
        assert set(task.features) <= set(tokens.columns)


def test_depths_are_those_of_generate_and_of_a_whole_forward(data):
    task = open_task(str(data), "brevo-mini")
    batch = load_examples(str(data), "brevo-mini", "test", 6)
    for decider in ("early", "online"):
        model = task_model(decider)
        tokens, examples = run_examples(model, task, batch, Depths("learned", {}), 0, 6, 0)
        for row, example in examples.iterrows():
            own = tokens[tokens["example"] == row]
            ids = torch.tensor([[WORDS.index(word) for word in example["text"].split()]])
            prompt = ids[:, : batch.answer_start[row]]
            found = model.generate(
                prompt, max_new_tokens=11, do_sample=False, eos_token_id=EOS, return_dict_in_generate=True
            )
            length = ids.shape[1]
            assert found.sequences[0, :length].tolist() == ids[0].tolist()
            assert found.exit_depths[0, : length - 1].tolist() == own["exit_depth"].tolist()
            cost = model.flops(torch.tensor([own["exit_depth"].tolist()])).total
            assert example["flops"] == cost < example["flops_full"]
            full = torch.full_like(ids[:, :-1], 4)
            with torch.no_grad():
                wanted = model(ids[:, :-1], exit_depths=full).expected_depth[0]
            assert own["expected_depth_full"].to_numpy() == pytest.approx(wanted.numpy(), abs=1e-4)


def test_depths_that_the_generation_config_sets_are_those_of_the_tables(data):
    """Forwards do not read it: the tables had depths that `generate` had not used."""
    task = open_task(str(data), "brevo-mini")
    batch = load_examples(str(data), "brevo-mini", "test", 20)
    model = task_model("online")
    free, _ = run_examples(model, task, batch, Depths("learned", {}), 0, 20, 0)
    assert free["exit_depth"].max() > 2
    model.generation_config.max_depth = 2
    capped, examples = run_examples(model, task, batch, Depths("learned", {}), 0, 20, 0)
    assert capped["exit_depth"].max() == 2
    for row, own in capped.groupby("example"):
        assert examples["flops"][row] == model.flops(torch.tensor([own["exit_depth"].tolist()])).total


def test_lano_is_measured_on_given_sentences_against_the_exact_distribution(tmp_path, data):
    folder = save(tmp_path / "model", task_model("online"))
    metrics = evaluate_model(tmp_path / "out", folder, data, "lano-mini", controls=False, sweep_rows=0)
    tokens = pd.read_parquet(tmp_path / "out" / "test-given" / "tokens.parquet")
    examples = pd.read_parquet(tmp_path / "out" / "test-given" / "examples.parquet")
    assert tokens["constituent_level_static"].max() == 5
    assert metrics["analyses"]["decision_timing"]["exit_depth"]["r2"] is not None
    answers = tokens[tokens["is_answer"]]
    wanted = stats.spearmanr(answers["exit_depth"], answers["constituent_level_static"]).statistic
    found = metrics["analyses"]["alignment"]["features"]["exit_depth"]["correct"]["constituent_level_static"]
    assert found["value"] == pytest.approx(wanted)
    # The whole sentence has no difficulty of its own here, and its length is none.
    assert claims.judge("it", metrics)[0].finding == "Depth follows the difficulty of each token (Spearman)"
    task = open_task(str(data), "lano-mini")
    model = AniraForCausalLM.from_pretrained(folder).eval()
    words = examples["text"][0].split()
    ids = torch.tensor([[WORDS.index(word) for word in words]])
    outcomes, exact = task.exact_distribution(ids[0, :-1].numpy())
    with torch.no_grad():
        log_p = model(ids[:, :-1]).logits[0].log_softmax(-1)[:, outcomes].numpy()
    kl = np.where(exact > 0, exact * (np.log(np.maximum(exact, 1e-30)) - log_p), 0).sum(1)
    assert examples["kl"][0] == pytest.approx(kl[words.index("<ans>") :].mean(), abs=1e-5)
    chosen = [outcomes.index(token) for token in ids[0, words.index("<ans>") + 1 :].tolist()]
    exact_nll = -np.log(exact[np.arange(len(words) - 1 - len(chosen), len(words) - 1), chosen]).mean()
    assert examples["exact_nll"][0] == pytest.approx(exact_nll, abs=1e-6)
    # No model can be better than the true distribution by more than chance, unless the text tells more than its words.
    assert metrics["given"]["nll"]["high"] > metrics["given"]["exact_nll"]["value"]
    written = pd.read_parquet(tmp_path / "out" / "test" / "examples.parquet")
    assert all(
        row["size"] == sum(word not in ("<bos>", "<ans>", "<eos>") for word in row["text"].split())
        for _, row in written.iterrows()
    )


def judge_part(part, found, given=()):
    analyses = {other: {"reason": ""} for other in ("alignment", "generalization", "dynamics")}
    metrics = {"decider": "own", "given": dict.fromkeys(given), "size_limit": 8, "max_depth": 6}
    metrics["analyses"] = {**analyses, part: found}
    return claims.judge("it", metrics)[list(analyses).index(part)].holds


@pytest.mark.parametrize("rule", ["end", "distance"])
def test_a_correlation_by_place_alone_is_seen_for_what_it_is(rule):
    """A rule that stops early at the end of every answer, whatever it holds, correlates with size by its length.

    One that counts down to the end once had a yes, as places more than three tokens from both ends were taken for one.
    """
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 9, 2000)
    lengths = sizes + rng.integers(0, 3, 2000)
    rows = [
        {
            "example": number,
            "exit_depth": float(length - place) if rule == "distance" else 6.0 - 4 * (place == length - 1),
            "is_answer": True,
        }
        for number, length in enumerate(lengths)
        for place in range(length)
    ]
    tokens = pd.DataFrame(rows)
    tokens["exit_depth"] += rng.normal(0, 0.01, len(tokens))
    for name in measures.DEPTHS[1:]:
        tokens[name] = tokens["exit_depth"]
    tokens["size"] = tokens["difficulty"] = tokens["token_difficulty"] = tokens["example"].map(dict(enumerate(sizes)))
    tokens["correct"] = True
    examples = pd.DataFrame({"example": range(2000), "size": sizes, "difficulty": sizes, "correct": True})
    examples["text"] = "<bos> <ans> 1 <eos>"
    arguments = run.EvaluationArguments("", "", "", "", resamples=20)
    found = measures.measure_alignment(measures.add_places(tokens), examples, arguments)
    correlation = found["per_example"]["exit_depth"]["correct"]
    assert correlation["size"]["value"] > 0.9
    assert abs(correlation["size given length"]["value"]) < 0.1
    assert (abs(found["but_end"]["exit_depth"]["correct"]["size"]["value"]) < 0.1) == (rule == "end")
    assert judge_part("alignment", found) == "no"


@pytest.mark.parametrize(
    ("value", "beside", "holds"),
    [
        ((0.8, 0.7, 0.9), (0.5, 0.4, 0.6), "yes"),
        ((0.4, 0.3, 0.5), (0.3, 0.2, 0.4), "partly"),
        ((0.15, 0.11, 0.19), (0.3, 0.2, 0.4), "no"),
        ((0.8, 0.7, 0.9), (0.0, -0.05, 0.05), "no"),
        ((0.62, 0.55, 0.69), (0.5, 0.4, 0.6), "partly"),
        ((0.8, 0.1, 0.95), (0.5, 0.4, 0.6), "unknown"),
        ((0.8, 0.7, 0.9), (0.5, -0.2, 0.8), "unknown"),
        ((0.15, 0.02, 0.28), (0.3, 0.2, 0.4), "unknown"),
        ((0.8, 0.7, 0.9), (0.5, None, None), "unknown"),
        ((None, None, None), (None, None, None), "unknown"),
    ],
)
def test_what_few_rows_leave_open_is_unknown(value, beside, holds):
    """Twenty rows once gave a "no" at a correlation of 0.9, as intervals overlapped; a missing one gave a "yes"."""
    value, beside = (dict(zip(("value", "low", "high"), own, strict=True)) for own in (value, beside))
    names = ("size", "size balanced", "size given length")
    own = {"exit_depth": {"correct": dict(zip(names, (value, value, beside), strict=True))}}
    assert judge_part("alignment", {"per_example": own, "but_end": own}) == holds
    token = {"exit_depth": {"correct": {"difficulty": value, "difficulty given cell": beside}}}
    assert judge_part("alignment", {"per_token": token}, given=["kl"]) == holds


def test_fewer_rows_are_of_the_whole_split(data):
    """The first rows are not: no instance occurs twice, so small sizes run out early. Sweeps had 8 times theirs."""
    every = load_examples(str(data), "brevo-mini", "test", 0)
    some = load_examples(str(data), "brevo-mini", "test", 20)
    assert len(every) == 60
    assert len(some) == 20
    for batch in (some, take(every, spread(20, 60))):
        for place, row in enumerate(range(0, 60, 3)):
            own, whole = (
                from_batch.tokens[from_batch.offsets[at] : from_batch.offsets[at + 1]].tolist()
                for from_batch, at in ((batch, place), (every, row))
            )
            assert own == whole
            assert (batch.size[place], batch.answer_start[place]) == (every.size[row], every.answer_start[row])
        assert int(batch.offsets[-1]) == len(batch.tokens)
        for name, values in batch.derived.items():
            assert len(values) == len(batch.tokens), name
    assert spread(5, 3).tolist() == [0, 1, 2]
    assert spread(3, 10).tolist() == [0, 3, 6]
    assert len(take(every, spread(0, 60))) == 0


def test_mean_depth_by_place():
    """On MANO the end of the answer once halved the mean at answers, and no figure said so."""
    depths = {True: [5, 3, 4, 1], False: [7, 1]}
    rows = [
        {"example": number, "is_answer": True, "exit_depth": float(depth)}
        for number in range(20)
        for depth in depths[number % 2 == 0]
    ]
    rows += [{"example": number, "is_answer": False, "exit_depth": 2.0} for number in range(20)]
    tokens = pd.DataFrame(rows)
    examples = pd.DataFrame({"example": range(20), "text": "<bos> <ans> 1 <eos>"})
    found = measures.measure_places(tokens, measures.add_places(tokens))
    means = {place: own["value"] for place, own in found.items()}
    assert means == {"prompt": 2.0, "first": 6.0, "middle": 3.5, "end": 1.0, "but_end": 19 / 4}
    assert found["prompt"]["low"] == found["prompt"]["high"] == 2.0
    assert found["first"]["low"] < 6 < found["first"]["high"]

    alone = tokens[tokens["example"] == 1]
    found = measures.measure_places(alone, measures.add_places(alone))
    assert found["middle"]["value"] is None
    assert found["middle"]["reason"]

    # An answer that is its end alone has nothing else.
    single = alone.drop_duplicates("is_answer")
    found = measures.measure_places(single, measures.add_places(single))
    assert found["end"]["value"] == 7.0
    assert found["but_end"]["value"] is None
    assert (
        measures.measure_generalization(
            {"test": (single, examples.query("example == 1").assign(size=3, correct=True))}, 8, False
        )["by_size"][0]["depth"]
        == 7.0
    )


def test_depth_beyond_training_is_that_without_the_end():
    """Beyond training answers got shorter, or had no end: means with it fell where the rest rose, or the reverse.

    Two verdicts were published of that, and a third of answers that the model did not end, where the place at which the
    end was due counted as more of the answer. Here the answer takes 3 within and 5 beyond, its end 1; half of those
    beyond have no end: 4 where it was due.
    """
    texts = {3: "<bos> <ans> 1 2 <eos>", 9: "<bos> <ans> 1 <eos>", 10: "<bos> <ans> 1 1 1"}
    depths = {3: [3, 3, 1], 9: [5, 1], 10: [5, 6, 4]}
    examples = pd.DataFrame(
        [{"example": number, "size": size, "correct": size == 3} for number, size in enumerate([3, 9, 10] * 10)]
    )
    examples["text"] = examples["size"].map(texts)
    tokens = pd.DataFrame(
        [
            {"example": number, "is_answer": True, "exit_depth": float(depth)}
            for number, size in enumerate(examples["size"])
            for depth in depths[size]
        ]
    )
    found = measures.measure_generalization({"test": (tokens, examples)}, 8, sampled=False)
    assert [row["depth"] for row in found["by_size"]] == [3.0, 5.0, 5.5]
    assert found["beyond"]["depth_beyond"] == 5.25
    assert found["beyond_ended"]["depth_beyond"] == found["beyond_first"]["depth_beyond"] == 5.0
    assert found["beyond"]["depth_slope"]["value"] == pytest.approx(0.5)
    assert measures.measure_generalization({"test": (tokens, examples)}, 8, sampled=True)["beyond"]["verdict"] is None


@pytest.mark.parametrize(("decider", "findings"), [("fixed", 0), ("online", 4), ("of-my-own", 3)])
def test_own_deciders_are_judged_by_all_that_does_not_ask_when_they_decide(decider, findings):
    """Once a decider that was not early or online had an empty table, without a word."""
    parts = ("alignment", "generalization", "dynamics", "decision_timing")
    analyses = {part: {"reason": "why"} for part in parts}
    judged = claims.judge(
        "it", {"decider": decider, "given": {}, "size_limit": 8, "max_depth": 6, "analyses": analyses}
    )
    assert [claim.finding for claim in judged] == list(parts[:findings])
    assert all(claim.ours == "not measured: why" and claim.holds == "unknown" for claim in judged)


def test_analyses_are_made_again_from_the_tables(evaluated, tmp_path):
    folder = tmp_path / "evaluation"
    shutil.copytree(evaluated / "online", folder)
    known = read(folder)
    (folder / "metrics.json").write_text(json.dumps({**known, "analyses": {}}))
    found = analyse.analyse(folder)
    assert found.pop("analyses_commit") == run.read_commit()
    assert found == known
    (folder / "extrapolation" / "tokens.parquet").unlink()
    with pytest.raises(report.ReportError, match="but not the tables"):
        analyse.analyse(folder)


def test_the_largest_size_of_training_is_that_of_its_recipe(data, tmp_path):
    """Once that of the dataset: a model of up to 4 vertices "had sizes up to 8", and 5 to 8 were no extrapolation."""
    model = save(tmp_path / "run" / "model", task_model("fixed"))
    for recipe, limit in (
        ({"task": "brevo-mini", "sizes": [], "task_settings": {"max_size": 6}}, 6),
        ({"task": "brevo-mini", "sizes": [3, 4], "task_settings": {}}, 4),
        ({"task": "brevo-mini", "sizes": [], "task_settings": {}}, 8),
        ({"task": "mano-mini", "sizes": [2], "task_settings": {}}, 8),
    ):
        (model.parent / "recipe.json").write_text(json.dumps(recipe))
        arguments = run.EvaluationArguments(str(model), str(data), "brevo-mini", str(tmp_path / f"out-{limit}"))
        assert run.Evaluation(arguments)._size_limit() == limit


def around(value, margin=0.01):
    return {"value": value, "low": value - margin, "high": value + margin}


def judge_timing(decider, *contrasts):
    """The verdict on depths whose first is explained as the paper explains it, and the last also given the place."""
    analyses = {part: {"reason": ""} for part in ("alignment", "generalization", "dynamics")}
    terms = {"state": {"lost": around(0.2)}, "size and static": {"lost": around(0.1)}}
    depths = {
        name: {"r2": around(0.5), "terms": terms, "contrast": contrast}
        for name, contrast in zip(measures.DEPTHS, contrasts, strict=False)
    }
    depths["expected_depth"]["contrast_given_place"] = contrasts[-1]
    metrics = {
        "decider": decider,
        "given": {},
        "size_limit": 8,
        "max_depth": 6,
        "analyses": {**analyses, "decision_timing": depths},
    }
    return claims.judge("it", metrics)[-1].holds


def test_a_decision_is_timed_by_what_all_regressions_say():
    """Once by one of them: `online` had a yes that was gone when the regression knew where an answer ends."""
    state, neither, instance = around(0.1), around(0.0), around(-0.1)
    assert judge_timing("online", state, state, state) == "yes"
    assert judge_timing("early", state, state, state) == "no"
    assert judge_timing("early", instance, instance, instance) == "yes"
    assert judge_timing("online", state, neither, state) == "unknown"
    assert judge_timing("online", state, state, state, instance) == "unknown"
    assert judge_timing("online", state, state, state, around(0.04, 0.001)) == "unknown"


@pytest.mark.parametrize(
    ("change", "slope", "holds"),
    [
        (0.5, 0.1, "yes"),
        (0.5, 0.0, "no"),
        (0.5, 0.01, "no"),
        (0.5, 0.015, "partly"),
        (0.5, -0.1, "no"),
        (-0.5, 0.1, "no"),
        (0.055, 0.1, "yes"),
        (0.0, 0.1, "no"),
    ],
)
def test_depth_that_falls_beyond_the_training_sizes_does_not_keep_rising(change, slope, holds):
    """Once "partly" where it fell from size to size, as it was higher than over all trained sizes together.

    And "yes" where it rose by a hundredth of an iteration over all of them, which was a sure hundredth.
    """
    beyond = {
        "verdict": "",
        "accuracy_change": around(-0.7),
        "accuracy_within": 0.9,
        "depth_change": around(change),
        "depth_slope": around(slope, 0.005),
        "depth_beyond": 4.0,
    }
    found = {"beyond": beyond, "by_size": [{"size": size} for size in range(6, 13)]}
    assert judge_part("generalization", found) == holds
    assert judge_part("generalization", {**found, "beyond_ended": beyond}) == holds
    # Where answers that end say another thing, nothing is sure.
    other = {**beyond, "depth_slope": around(0.1 if holds == "no" else -0.1), "depth_change": around(0.5)}
    assert judge_part("generalization", {**found, "beyond_ended": other}) == "unknown"
    assert judge_part("generalization", {**found, "beyond_first": other}) == "unknown"
    known = {"beyond_known_words": beyond}
    assert judge_part("generalization", {**found, **known}) == holds
    # A word that was never trained may be all that makes accuracy fall.
    known = {"beyond_known_words": {**beyond, "accuracy_change": around(0.0)}}
    assert judge_part("generalization", {**found, **known}) == ("unknown" if holds != "no" else "no")
    # Where all tokens have D, none can go on rising.
    assert judge_part("generalization", {**found, "beyond_first": {**beyond, "depth_beyond": 6.0}}) == "unknown"


@pytest.mark.parametrize(
    ("phases", "fall", "changes", "holds"),
    [
        ("rise, then fall", 2.0, [0.8, 0.0], "yes"),
        ("rise, then fall", 2.0, [0.7, 0.1], "partly"),
        ("fall", 2.0, [0.8, 0.0], "partly"),
        ("rise, then fall", 2.0, [0.1, 0.7], "no"),
        ("fall", 2.0, [0.0, 0.8], "no"),
        ("fall", 2.0, [0.9, -0.2], "no"),
        ("rise", 0.2, [0.9], "no"),
        ("none", 0.0, [0.9], "no"),
        # Noise of a few rows hides a fall of two iterations: once a "no".
        ("none", 2.0, [0.9], "unknown"),
        ("rise", 0.3, [0.9], "unknown"),
    ],
)
def test_a_fall_that_goes_with_learning_is_no_second_phase(phases, fall, changes, holds):
    turn = 5.0 if len(changes) == 2 else None
    found = {"phases": phases, "rise": 1.0, "fall": fall, "turn": turn, "accuracy_change": changes}
    assert judge_part("dynamics", found) == holds


def test_metrics_say_what_they_depend_on_and_have_no_nan(evaluated):
    for decider in ("early", "online"):
        text = (evaluated / decider / "metrics.json").read_text()
        assert "NaN" not in text
        assert "Infinity" not in text
        metrics = read(evaluated / decider)
        assert metrics["decider"] == decider
        assert {"torch", "transformers", "datasets"} <= set(metrics["versions"])
        assert metrics["rows"] == {"test": ROWS, "extrapolation": ROWS}
        assert metrics["flops"] < metrics["flops_full"]
        assert metrics["analyses"]["alignment"]["per_token"]["exit_depth"]["all"]["size"]["n"] > ROWS
        assert set(metrics["analyses"]["decision_timing"]["exit_depth"]["terms"]) >= {"size", "static", "state"}
    assert read(evaluated / "online")["analyses"]["dynamics"]["phases"] == "rise, then fall"
    assert "no log.jsonl" in read(evaluated / "early")["analyses"]["dynamics"]["reason"]


def test_a_log_that_is_not_there_is_not_taken_for_one_without_evaluations(tmp_path):
    """Once the reader of logs answered with no lines for a file that was missing, as a run that begins wants it."""
    with pytest.raises(FileNotFoundError):
        measures.measure_dynamics(tmp_path / "log.jsonl")


def test_controls_are_at_equal_mean_depth(evaluated):
    metrics = read(evaluated / "online")
    rows = {row["depths"]: row for row in metrics["controls"]}
    assert set(rows) == {"learned", "full", "fixed", "random", "random answers", "stability", "oracle"}
    learned = rows["learned"]["depth_all"]["value"]
    assert rows["fixed"]["depth_all"]["value"] == pytest.approx(learned, abs=0.1)
    assert rows["full"]["flops_share"] == 1.0
    # Random depths are drawn for what this control answers, which may be longer or shorter.
    assert rows["random"]["depth_all"]["value"] == pytest.approx(learned, abs=0.5)
    assert rows["stability"]["depth_all"]["value"] == pytest.approx(learned, abs=0.6)
    assert rows["oracle"]["accuracy"]["value"] is None
    # On given answers the prompt's tokens are the learned ones', so what differs is the answer's alone.
    assert rows["random answers"]["given_nll"]["value"] != rows["learned"]["given_nll"]["value"]
    examples = pd.read_parquet(evaluated / "online" / "test" / "examples.parquet")
    assert unpack(metrics["correct"], len(examples)).tolist() == examples["correct"].tolist()
    depths = [point["depth_all"]["value"] for point in metrics["sweep"] if point["setting"] == "exit_quantile"]
    assert depths == sorted(depths)
    capped = [point for point in metrics["sweep"] if point["setting"] == "max_depth"]
    assert all(point["depth_all"]["value"] <= point["value"] for point in capped)
    assert capped[-1]["depth_all"]["value"] == pytest.approx(learned, abs=0.5)


def test_a_model_with_a_least_depth_is_swept_from_there_on(data, tmp_path):
    """Once the evaluation ended in a traceback after all answers: it asked for a largest depth of 1."""
    model = task_model("online")
    model.generation_config.min_depth = 2
    metrics = evaluate_model(
        tmp_path / "out", save(tmp_path / "model", model), data, "mano-mini", sweep_rows=8, controls=True
    )
    # The control was free to exit at 1, where the learned model was not.
    (stability,) = (point for point in metrics["controls"] if point["depths"] == "stability")
    assert stability["depth_all"]["low"] >= 2
    swept = [point["value"] for point in metrics["sweep"] if point["setting"] == "max_depth"]
    assert swept == list(range(2, model.config.max_depth + 1))


def test_random_and_oracle_depths_keep_the_learned_histogram(data):
    task = open_task(str(data), "brevo-mini")
    batch = load_examples(str(data), "brevo-mini", "test", 40)
    tokens, _ = run_examples(task_model("early"), task, batch, Depths("learned", {}), 0, 40, 0)
    given, _ = run_given(task_model("early"), task, batch, Depths("learned", {}), 0, 40)
    wanted = sorted(given.loc[given["is_answer"], "exit_depth"])
    forced = oracle(run_given(task_model("early"), task, batch, Depths("learned", {}), 0, 40)[0], task, batch).forced
    labels = task.label(batch)
    dealt, hardness = [], []
    for row in range(len(batch)):
        first, last = batch.offsets[row], batch.offsets[row + 1]
        start = batch.answer_start[row] - 1
        assert len(forced[row]) == last - first
        # Not the last token, which is not run. Once it took a depth from those that are, which got deeper than learned.
        dealt += forced[row][start:-1]
        hardness += labels.token_difficulty[first + start : last - 1].tolist()
    assert sorted(dealt) == wanted
    prompts = tokens[~tokens["is_answer"]].groupby("example")["exit_depth"].agg(list)
    assert all(forced[row][: batch.answer_start[row] - 1] == prompts[row] for row in range(len(batch)))
    for depth in (1, 2, 3):
        easier = max((h for h, d in zip(hardness, dealt, strict=True) if d == depth), default=-1)
        harder = min((h for h, d in zip(hardness, dealt, strict=True) if d > depth), default=99)
        assert easier <= harder
    random = matched_random(tokens, task, batch, seed=0).forced
    flat = [depth for own in random for depth in own]
    assert set(flat) <= set(tokens["exit_depth"])
    assert matched_random(tokens, task, batch, seed=0).forced == random
    assert matched_random(tokens, task, batch, seed=1).forced != random
    answers = matched_random(tokens, task, batch, seed=0, answers_only=True).forced
    for row, start in enumerate(batch.answer_start - 1):
        assert answers[row][:start] == prompts[row]
        assert answers[row][start:] == random[row][start:]


def test_the_stability_threshold_is_found(data):
    task = open_task(str(data), "mano-mini")
    batch = load_examples(str(data), "mano-mini", "test", 30)
    model = task_model("online")
    found = {
        threshold: run_examples(with_stability(model, threshold), task, batch, Depths("s", {}), 0, 30, 0)[0][
            "exit_depth"
        ].mean()
        for threshold in (0.01, 0.3, 1.0)
    }
    assert found[0.01] >= found[0.3] >= found[1.0]
    target = (max(found.values()) + min(found.values())) / 2
    tuned = matched_stability(model, task, batch, {}, target, 30, 0)
    depth = run_examples(tuned, task, batch, Depths("s", {}), 0, 30, 0)[0]["exit_depth"].mean()
    assert depth == pytest.approx(target, abs=0.5)


def test_words_for_sizes_that_were_never_trained_are_read_as_a_known_one(tmp_path, data):
    """Most of what MANO's online lost beyond its sizes, against early, was a first word with a random embedding."""
    task, model = open_task(str(data), "mano-mini"), task_model("online")
    known = with_known_size_words(model, task, 4, 8)
    prompts = {size: torch.tensor([[1, task.size_word(size), 70, 71]]) for size in (3, 4, 6)}
    with torch.no_grad():
        one, four, six = (model(prompts[size]).logits for size in (3, 4, 6))
        assert not torch.equal(four, six)
        assert torch.equal(known(prompts[6]).logits, known(prompts[4]).logits)
        assert torch.equal(model(prompts[6]).logits, six)
        assert torch.allclose(known(prompts[3]).logits[..., :4], one[..., :4])
    assert with_known_size_words(model, task, 8, 8) is None
    assert with_known_size_words(model, open_task(str(data), "brevo-mini"), 8, 16) is None
    folder = save(tmp_path / "model", model)
    found = evaluate_model(tmp_path / "out", folder, data, config="mano-mini")["analyses"]["generalization"]
    trained = [row for row in found["by_size"] if row["size"] <= 4]
    assert found["by_size_known_words"][: len(trained)] == trained
    assert found["by_size_known_words"][len(trained) :] != found["by_size"][len(trained) :]
    assert found["beyond_known_words"]["depth_beyond"] != found["beyond"]["depth_beyond"]
    assert analyse.analyse(tmp_path / "out")["analyses"]["generalization"] == found


def test_an_answer_without_end_is_as_long_as_its_size_lets_it_be_whoever_is_answered_beside_it(data):
    """Such answers went on for as long as the largest graph of their batch let them, and their depths with them."""
    task = open_task(str(data), "brevo-mini")
    batch = load_examples(str(data), "brevo-mini", "extrapolation", 24)
    model = task_model("online")
    with torch.no_grad():
        model.lm_head.weight[EOS] = 0  # unlikely, so that most answers are cut
    found = []
    for batch_size in (24, 5, 1):
        tokens, examples = run_examples(model, task, batch, Depths("learned", {}), 0, batch_size, 0)
        cut = examples[~measures.has_end(examples)]
        assert len(cut) > 5
        lengths = tokens[tokens["is_answer"]].groupby("example").size()
        assert lengths[cut["example"]].tolist() == [task.longest_answer(size) for size in cut["size"]]
        found.append(examples[["text", "depth", "flops"]])
    assert len(set(cut["size"])) > 2
    # The last token is not one that was run, also where the row went on for the others' sake.
    assert {answer.depths[-1] for answer in ask(model, task, batch, 24)} == {0}
    assert found[0].equals(found[1])
    assert found[0].equals(found[2])


@pytest.mark.parametrize(
    ("config", "decider"), [("mano-mini", "fixed"), ("lano-mini", "online"), ("mano-mini", "stability")]
)
def test_every_task_and_decider_goes_through_with_constants_and_gaps(tmp_path, data, config, decider):
    """`fixed` has one depth: correlations are null with a reason, and nothing fails at the end."""
    model = task_model(decider)
    with torch.no_grad():
        model.lm_head.weight[EOS].normal_(std=2.0)  # else it writes LANO's longest sentence in each pass
    folder = save(tmp_path / "model", model)
    metrics = evaluate_model(tmp_path / "out", folder, data, config, rows=12, sweep_rows=6)
    assert [row["depths"] for row in metrics["controls"]][-1] == "oracle"
    estimate = metrics["analyses"]["alignment"]["per_example"]["exit_depth"]["all"]["size"]
    if decider == "fixed":
        assert estimate["value"] is None
        assert "constant" in estimate["reason"]
        assert metrics["depth_all"] == {"value": 4.0, "low": 4.0, "high": 4.0, "n": 12}
    page = report.write_report([report.read_run(tmp_path / "out")], tmp_path / "report")
    assert "nan" not in re.sub(r"base64,[^\"]+", "", page.read_text()).lower().split()


def test_a_stopped_run_goes_on_and_two_processes_find_the_same(tmp_path, data, evaluated, monkeypatch):
    folder = evaluated / "trained-online" / "model"
    calls = []
    real = run.run_examples

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(run, "run_examples", stop)
    parts = {"controls": False, "sweep_rows": 0, "part_rows": 8}
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(tmp_path / "stopped", folder, data, **parts)
    assert not (tmp_path / "stopped" / "metrics.json").exists()
    begun = run.read_commit()
    with monkeypatch.context() as later:
        later.setattr(run, "read_commit", lambda: "later")
        metrics = evaluate_model(tmp_path / "stopped", folder, data, **parts)
    # Analyses by later code once passed for that which began.
    assert (metrics["commit"], metrics["analyses_commit"]) == (begun, "later")
    # 4 parts of each split; the two that were finished are not run again.
    assert len(calls) == 3 + 6
    with pytest.raises(EvaluationError, match="holds an evaluation whose seed differ"):
        evaluate_model(tmp_path / "stopped", folder, data, **parts, seed=1)
    # Another model in the same place, as after training anew: its answers are not mixed with those of the old.
    swapped = shutil.copytree(folder, tmp_path / "model")
    evaluate_model(tmp_path / "swapped", swapped, data, controls=False, sweep_rows=0)
    save(swapped, task_model("early"))
    with pytest.raises(EvaluationError, match="whose fingerprint differ"):
        evaluate_model(tmp_path / "swapped", swapped, data, controls=False, sweep_rows=0)

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [
        str(ROOT / "evaluate" / "run.py"),
        "--model",
        str(folder),
        "--dataset",
        str(data),
        "--config",
        "brevo-mini",
    ]
    command += ["--out", str(tmp_path / "two"), "--rows", str(ROWS), "--resamples", "20", "--controls", "false"]
    command += ["--sweep_rows", "0", "--part_rows", "8", "--batch_size", "8"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = read(tmp_path / "stopped"), read(tmp_path / "two")
    for name in ("accuracy", "depth", "depth_all", "flops"):
        assert one[name] == two[name], name
    # Regressions round differently in another process.
    first, second = flatten(one["analyses"]), flatten(two["analyses"])
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = pytest.approx(second[name], rel=1e-5, abs=1e-6) if isinstance(value, float) else second[name]
        assert value == same, name
    for kind in ("tokens", "examples"):
        paths = [tmp_path / run_name / "test" / f"{kind}.parquet" for run_name in ("stopped", "two")]
        pd.testing.assert_frame_equal(*(pd.read_parquet(path) for path in paths))


def flatten(values, name=""):
    """Nested maps and lists as one map from paths to what stands there."""
    if isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        return {path: leaf for key, own in items for path, leaf in flatten(own, f"{name}/{key}").items()}
    return {name: values}


def test_a_sweep_on_other_rows_is_another_sweep(tmp_path, data):
    """Its parts were named by their first row alone: the command with more rows found those of fewer, and kept them."""
    folder = save(tmp_path / "model", task_model("online"))
    for rows in (4, 8):
        metrics = evaluate_model(tmp_path / "out", folder, data, controls=False, sweep_rows=rows)
        assert {point["accuracy"]["n"] for point in metrics["sweep"]} == {rows}


@pytest.mark.parametrize("option", ["rows", "sweep_rows", "part_rows", "batch_size", "resamples"])
def test_numbers_out_of_bounds_are_refused_before_anything_is_loaded(tmp_path, option):
    """`--rows -5` answered all rows but five."""
    arguments = run.EvaluationArguments("no-model", "no-data", "brevo-mini", str(tmp_path / "out"), **{option: -5})
    with pytest.raises(EvaluationError, match=f"`{option}` is -5, but must be at least"):
        run.Evaluation(arguments)
    assert not (tmp_path / "out").exists()


def test_a_failing_analysis_loses_nothing(tmp_path, data, evaluated, monkeypatch):
    monkeypatch.setattr(measures, "by_size", lambda *arguments: 1 / 0)
    metrics = evaluate_model(
        tmp_path / "out", evaluated / "trained-early" / "model", data, controls=False, sweep_rows=0
    )
    assert metrics["analyses"]["generalization"] == {"reason": "ZeroDivisionError: division by zero"}
    assert metrics["analyses"]["alignment"]["per_token"]["exit_depth"]["all"]["size"]["n"] > ROWS
    assert (tmp_path / "out" / "test" / "tokens.parquet").exists()
    page = report.write_report([report.read_run(tmp_path / "out")], tmp_path / "report")
    assert "not measured: ZeroDivisionError" in page.read_text()


def test_the_report_is_one_file_with_every_figure_and_its_table(evaluated, tmp_path):
    page = report.write_report([report.read_run(evaluated / decider) for decider in ("early", "online")], tmp_path)
    text = page.read_text()
    assert text.count("<img") == 6
    assert text.count("data:image/png;base64,") == 6
    assert "http" not in re.sub(r"base64,[^\"]+", "", text)
    for name in ("tokens", "alignment", "generalization", "phases", "decision_timing", "cost"):
        assert (tmp_path / "figures" / f"brevo-mini-{name}.png").stat().st_size > 10_000
        assert len(pd.read_csv(tmp_path / "figures" / f"brevo-mini-{name}.csv"))
    assert text.index("The paper's findings") < text.index("<img")
    for decider in ("early", "online"):
        accuracy = read(evaluated / decider)["accuracy"]
        assert f"{accuracy['value']:.3f} ({accuracy['low']:.3f} to {accuracy['high']:.3f})" in text
    for word in ("yes", "partly", "no", "unknown"):
        assert f".{word} " in text or f".{word}," in text


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    """Those in the folders of their trainings were all called "evaluation"."""

    def names(*paths):
        runs = [Run(str(tmp_path / path), {}, {}, pd.DataFrame()) for path in paths]
        return [run.name for run in report.name_apart(runs)]

    assert names("early/evaluation") == ["early"]
    assert names("early/evaluation", "online/evaluation", "old") == ["early", "online", "old"]
    assert names("a/early/evaluation", "b/early/evaluation") == ["a/early", "b/early"]
    with pytest.raises(report.ReportError, match="named twice"):
        names("early", "early/evaluation")


def test_the_names_of_many_runs_fit_above_a_figure():
    """The first and the last of six were cut off."""
    figure, axis = plt.subplots(figsize=(12, 4))
    for number in range(7):
        axis.plot([0, 1], label=f"brevo-mini-online-a-name-of-some-length-{number}")
    put_legend(figure, axis)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
    assert box.y0 >= axis.get_window_extent().y1
    plt.close(figure)


def test_a_model_of_another_task_is_said_to_be_one_and_its_log_stays_with_it(tmp_path, data, evaluated):
    """BREVO's training curve stood in a report of MANO, beside an accuracy of 0 that nothing explained."""
    model = shutil.copytree(evaluated / "trained-online" / "model", tmp_path / "run" / "model")
    shutil.copy(evaluated / "trained-online" / "log.jsonl", model.parent)
    (model.parent / "recipe.json").write_text(json.dumps({"task": "brevo-mini", "sizes": [], "task_settings": {}}))
    quick = {"rows": 12, "controls": False, "sweep_rows": 0}
    with pytest.warns(UserWarning, match="was trained on brevo-mini, not mano-mini"):
        found = evaluate_model(tmp_path / "other", model, data, config="mano-mini", **quick)
    assert found["analyses"]["dynamics"]["phases"] is None
    assert not (tmp_path / "other" / "log.jsonl").exists()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was trained on")
        evaluate_model(tmp_path / "own", model, data, **quick)
    assert (tmp_path / "own" / "log.jsonl").exists()


def test_a_value_of_too_few_rows_says_that_it_has_no_interval():
    """A correlation of six rows looked as sure as one whose interval is narrower than its last digit."""
    few = {"value": 0.661, "low": None, "high": None, "n": 6, "reason": "fewer than 10 examples: no interval"}
    assert show(few) == "0.66 (no interval)"
    assert show({"value": 0.661, "low": 0.66, "high": 0.662, "n": 5000}) == "0.66"


def test_bad_input_is_refused_in_a_sentence(tmp_path, data, evaluated):
    model = evaluated / "trained-early" / "model"
    with pytest.raises(EvaluationError, match="`config` is 'mano-paper', but"):
        evaluate_model(tmp_path / "a", model, data, config="mano-paper")
    with pytest.raises(EvaluationError, match="cannot be loaded"):
        evaluate_model(tmp_path / "a", model, data, splits=["dev"])
    with pytest.raises(EvaluationError, match="there is no such folder"):
        evaluate_model(tmp_path / "a", tmp_path / "nothing", data)
    # It said that the Hub could not be reached, to someone who had misspelt a folder.
    with pytest.raises(
        EvaluationError, match=r"no folder here, so taken for a name on the Hub\), brevo-mini, test cannot"
    ):
        evaluate_model(tmp_path / "a", model, tmp_path / "nothing")
    with pytest.raises(EvaluationError, match=r"`model` is .*, a run; its checkpoint is .*trained-early/model\.$"):
        evaluate_model(tmp_path / "a", model.parent, data)
    with pytest.raises(EvaluationError, match="it is no checkpoint"):
        evaluate_model(tmp_path / "a", tmp_path, data)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "dear.txt").write_text("dear")
    with pytest.raises(EvaluationError, match="holds something else"):
        evaluate_model(tmp_path / "full", model, data)
    with pytest.raises(report.ReportError, match="no finished evaluation"):
        report.read_run(tmp_path / "full")
    # A pickle was read where there was nothing else.
    pickled = save(tmp_path / "pickled", task_model("early"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(EvaluationError, match=r"cannot be loaded: .*model\.safetensors"):
        evaluate_model(tmp_path / "a", pickled, data)
    other = save(tmp_path / "other", task_model("early"))
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(
        text.replace('"<ans>": 4', '"<ans>": 5').replace('"<query>": 5', '"<query>": 4')
    )
    with pytest.raises(EvaluationError, match="differs from the dataset's"):
        evaluate_model(tmp_path / "a", other, data)
    # Once a traceback of `generate`, when the first split had been answered.
    short = save(tmp_path / "short", task_model("early", max_position_embeddings=4))
    with pytest.raises(
        EvaluationError, match=r"`max_position_embeddings` of .*short is 4, but prompts of mano-mini have"
    ):
        evaluate_model(tmp_path / "a", short, data, config="mano-mini")


def test_a_run_goes_on_under_another_release_of_transformers(monkeypatch):
    """Configs say which one saved them: a stopped evaluation was refused after an update, and weights were blamed."""
    model = task_model("early")
    before = run.fingerprint(model, {})
    monkeypatch.setattr("transformers.__version__", "99.0")
    monkeypatch.setattr("transformers.configuration_utils.__version__", "99.0")
    assert run.fingerprint(model, {}) == before
    model.generation_config.exit_quantile = 0.3
    assert run.fingerprint(model, {}) != before
