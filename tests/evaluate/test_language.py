"""The natural-language slice and lm-eval, on a small model with a tokenizer of words."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import word_problems
import yaml
from cases import task_model
from examples import EvaluationError
from harness import HarnessArguments, run_tasks
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from word_problems import LEVELS, make_problems, measure_levels, read_number

from datasets_scripts import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with random weights that can read the problems."""
    texts = [row["question"] + row["answer"] for level in LEVELS for row in make_problems(level, 50, 0)]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)} | {"Question", "Answer", ":"})
    vocabulary = {word: place for place, word in enumerate(["<pad>", "<unk>", "<eos>", *words])}
    tokens = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )
    path = tmp_path_factory.mktemp("language") / "model"
    model = task_model(vocab_size=len(vocabulary), pad_token_id=0, bos_token_id=None, eos_token_id=2)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_problems_have_the_answer_that_their_sentences_have_and_a_clause_more_at_each_level():
    for number, level in enumerate(LEVELS):
        for row in make_problems(level, 40, seed=1):
            sentences = row["question"].split(". ")
            assert len(sentences) == 1 + 2 + number + 1
            total = int(re.search(r"has (\d+)", sentences[0])[1])
            for sentence in sentences[1:-1]:
                n = int(re.search(r"\d+", sentence)[0])
                total = total + n if "finds" in sentence else total - n if "gives" in sentence else total * (n + 1)
            assert read_number(row["answer"]) == str(total)
    assert make_problems("p1", 5, 0)["question"] == make_problems("p1", 5, 0)["question"]
    with pytest.raises(ValueError, match="`level` is 'p3'"):
        make_problems("p3", 1, 0)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("so 3 + 4 = 7 #### 7", "7"),
        ("#### 1,250 coins", "1250"),
        ("#### 7 Question: Ben has 4 more. Answer: 4 and 5 #### 9", "7"),
        ("it is 12.50", "12.5"),
        ("-3", "-3"),
        ("none", None),
        ("5 then 6", "6"),
    ],
)
def test_numbers_are_read_as_graders_of_gsm8k_do(answer, number):
    assert read_number(answer) == number


def test_a_planted_effect_of_the_level_is_found_and_none_where_there_is_none():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"level": np.repeat(LEVELS, 60), "correct": rng.random(180) < 0.5, "depth_all": 2.0})
    table["example"] = np.arange(180)
    rising = measure_levels(table.assign(depth=np.repeat([2.0, 3.0, 4.0], 60) + rng.normal(0, 0.5, 180)), 0)
    assert rising["depth_with_level"]["low"] > 0.7
    assert rising["levels"]["p2"]["depth"]["low"] > rising["levels"]["main"]["depth"]["high"]
    flat = measure_levels(table.assign(depth=rng.normal(3, 0.5, 180)), 0)
    assert flat["depth_with_level"]["low"] < 0 < flat["depth_with_level"]["high"]


def test_the_interval_of_accuracy_is_over_templates():
    """It was over rows, though problems of one template are answered alike: of 100 it held the truth in 70, not 95."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        template = rng.random(50) < 0.4
        table = pd.DataFrame(
            {"level": "main", "example": np.repeat(np.arange(50), 4), "correct": np.repeat(template, 4)}
        )
        found = measure_levels(table.assign(depth=rng.random(200), depth_all=2.0), 0)["levels"]["main"]["accuracy"]
        assert found["value"] == pytest.approx(template.mean())
        covered += found["low"] <= 0.4 <= found["high"]
    assert covered >= 53
    none = measure_levels(table.assign(correct=False, depth=rng.random(200), depth_all=2.0), 0)["levels"]["main"]
    assert none["accuracy"]["value"] == 0
    assert none["accuracy"]["high"] > 0.05


def test_bad_input_is_refused_before_anything_is_answered(folder, tmp_path, monkeypatch, capsys):
    """A level that was missing was found after all of the first was answered; --rows 0 emptied older figures."""
    problems = make_problems("main", 4, 0)
    levels = {"main": problems, "p1": problems.remove_columns("answer")}
    monkeypatch.setattr(word_problems, "load_dataset", lambda source, level, split: levels[level])
    monkeypatch.setattr(word_problems, "answer_problems", lambda *arguments: pytest.fail("answered"))
    command = ["word_problems.py", "--model", str(folder), "--out", str(tmp_path)]
    for options, message in (
        (["--source", "some/where"], "`source` is some/where, whose p1 lacks the columns answer."),
        (["--rows", "0"], "`rows` is 0, but must be at least 1."),
        (["--batch_size", "0"], "`batch_size` is 0, but must be at least 1."),
        (["--rowz", "3"], "--rowz 3 is not understood; --help lists the options."),
    ):
        monkeypatch.setattr(sys, "argv", [*command, *options])
        with pytest.raises(SystemExit) as stopped:
            word_problems.main()
        assert stopped.value.code == f"word_problems.py: {message}"
    with pytest.raises(EvaluationError, match="tokenizer does not know all of"):
        word_problems.check_vocabulary(make_tokenizer(), problems)


def test_the_command_runs_on_problems_of_our_own_and_on_a_dataset_of_that_layout(folder, tmp_path):
    for level in LEVELS:
        (tmp_path / "symbolic" / level).mkdir(parents=True)
        problems = make_problems(level, 24, 3).to_pandas()
        # Four instances of each template side by side, as in GSM-Symbolic: the first rows were once of a few.
        problems.assign(id=problems["id"] // 4).to_parquet(tmp_path / "symbolic" / level / "test.parquet")
    configs = [
        {"config_name": level, "data_files": [{"split": "test", "path": f"{level}/test.parquet"}]} for level in LEVELS
    ]
    (tmp_path / "symbolic" / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    for source in ("templates", str(tmp_path / "symbolic")):
        command = [
            sys.executable,
            str(ROOT / "evaluate" / "word_problems.py"),
            "--model",
            str(folder),
            "--source",
            source,
        ]
        command += ["--out", str(tmp_path / "out"), "--rows", "12", "--max_new_tokens", "5"]
        # datasets takes a folder of the same name and configs for the one that it cached, whatever it holds.
        environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads((tmp_path / "out" / "problems.json").read_text())
        assert set(found["levels"]) == set(LEVELS)
        assert all(1 <= level["depth"]["value"] <= 4 for level in found["levels"].values())
        table = pd.read_parquet(tmp_path / "out" / "problems.parquet")
        assert len(table) == 36
        assert (table["num_tokens"] > 20).all()
        assert table["example"].nunique() == (12 if source == "templates" else 6)


def test_a_tokenizer_that_cannot_pad_is_refused(folder):
    arguments = word_problems.WordProblemArguments(model="", out="")
    with pytest.raises(ValueError, match="no pad token"):
        word_problems.answer_problems(
            None, PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}))), [], arguments
        )


def test_lm_eval_runs_with_depth_beside_accuracy(folder, tmp_path):
    rows = [
        {"question": row["question"], "choices": ["7", "9"], "label": place % 2}
        for place, row in enumerate(make_problems("main", 6, 0))
    ]
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tiny_choice.yaml").write_text(yaml.safe_dump(task))
    found = run_tasks(HarnessArguments(str(folder), ["tiny_choice"], str(tmp_path), include_path=str(tmp_path)))
    assert 0 <= found["tiny_choice"]["acc,none"] <= 1
    assert 1 <= found["tiny_choice"]["depth"] <= 4
    # Of a tag all was lost but its name, and what came before it with it.
    for name in ("tiny_a", "tiny_b"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**task, "task": name, "tag": "tiny_tag"}))
    arguments = HarnessArguments(str(folder), ["tiny_choice", "nowhere"], str(tmp_path), include_path=str(tmp_path))
    with pytest.raises(EvaluationError, match="`tasks` has nowhere, which lm-eval does not know"):
        run_tasks(arguments)
    arguments.tasks = ["tiny_choice", "tiny_tag"]
    tagged = run_tasks(arguments)
    assert tagged["tiny_choice"] == found["tiny_choice"]
    assert set(tagged["tiny_tag"]["tasks"]) == {"tiny_a", "tiny_b"}
    assert tagged["tiny_tag"]["tasks"]["tiny_a"]["acc,none"] == found["tiny_choice"]["acc,none"]
    assert 1 <= tagged["tiny_tag"]["depth"] <= 4
    assert json.loads((tmp_path / "harness.json").read_text()) == tagged
