"""`evaluate/show.py`: every token once, with the depth that it had, in any terminal."""

import io
import re

import pytest
from cases import task_model
from examples import EvaluationError
from rich.console import Console
from show import Answered, ShowArguments, answer, choose_prompt, describe, draw, judge, main

from datasets_scripts import get_task, make_tokenizer

PROMPT = "<bos> 4 2 7 4 <query> 2 <ans>"
RIGHT = Answered([*PROMPT.split(), "7", "4", "2", "<eos>"], [1, 2, 3, 4, 1, 10, 3, 4, 10, 1, 2, 0], 8, 10)


@pytest.fixture(scope="module")
def model():
    return task_model(max_position_embeddings=64)


def show(found, verdict=None, width=80, **settings):
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, **settings)
    draw(found, console)
    describe(found, verdict, console)
    return console.file.getvalue()


def read_picture(text):
    """(words, depths) of the lines of three, and the width of the widest."""
    lines = [line for part in re.split(r"(?m)^.*─+$", text)[1:3] for line in part.strip("\n").split("\n")]
    words = [word for line in lines[1::3] for word in line.split()]
    depths = [0 if depth == "-" else int(depth) for line in lines[2::3] for depth in line.split()]
    return words, depths, max(len(line.rstrip()) for line in lines)


@pytest.mark.parametrize("width", [12, 30, 80])
def test_every_token_is_shown_once_with_its_depth_within_the_width(width):
    words, depths, widest = read_picture(show(RIGHT, width=width))
    assert (words, depths) == (RIGHT.words, RIGHT.depths)
    assert widest <= width


def test_bars_grow_with_depth():
    found = Answered(["a", "b", "c", "d", "e"], [1, 2, 3, 4, 0], 4, 4)
    bars = show(found).split("\n")[1].split()
    assert len(set(bars)) == 4
    assert bars == sorted(bars)


def test_colours_are_for_terminals_and_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert "\x1b" not in show(RIGHT)
    assert "48;5;" in show(RIGHT, force_terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[\d;]*[34]8;", show(RIGHT, force_terminal=True))


def test_means_and_verdict():
    task = get_task("brevo-mini")
    text = show(RIGHT, judge(RIGHT, task))
    assert "The answer is right." in text
    # From <ans> on, and over all but the last: (4 + 10 + 1 + 2) / 4 and 41 / 11.
    assert "Mean depth 4.25 at the answer, 3.73 over all tokens, of 10." in text
    wrong = Answered([*PROMPT.split(), "4", "7", "2", "<eos>"], RIGHT.depths, 8, 10)
    assert re.search(r"The answer is wrong\. .*parent 7", show(wrong, judge(wrong, task)))
    assert "not judged" in show(RIGHT)


def test_depths_are_those_of_generate(model):
    task, tokenizer = get_task("brevo-mini"), make_tokenizer()
    prompt = choose_prompt(ShowArguments(["m"], "brevo-mini", index=2), task)
    assert prompt != choose_prompt(ShowArguments(["m"], "brevo-mini"), task)
    found = answer(model, tokenizer, prompt, task)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    longest = task.longest_answer(task.config.extrapolation_size)
    output = model.generate(ids, max_new_tokens=longest, do_sample=False, return_dict_in_generate=True)
    assert found.depths == output.exit_depths[0].tolist()
    assert len(set(found.depths)) > 2
    assert " ".join(found.words) == tokenizer.decode(output.sequences[0])
    assert found.words[found.prompt_length - 1] == "<ans>"


def test_sampled_answers_and_prompts_of_ones_own(model):
    lano = get_task("lano-mini")
    first, again = (
        answer(model, make_tokenizer(), choose_prompt(ShowArguments(["m"], "lano-mini"), lano), lano) for _ in "12"
    )
    assert first == again
    own = answer(model, make_tokenizer(), choose_prompt(ShowArguments(["m"], prompt=PROMPT), None), None)
    assert own.words[:8] == PROMPT.split()
    assert len(own.words) <= 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Give `--task`"),
        ({"prompt": PROMPT, "index": 1}, "`--index` and `--prompt` are both given"),
        ({"task": "brevo-mini", "index": -1}, "`index` is -1, but must be at least 0"),
    ],
)
def test_bad_arguments_are_refused(settings, message):
    with pytest.raises(EvaluationError, match=message):
        ShowArguments(["m"], **settings)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<bos> 4 zwei <ans>", "`prompt` has 'zwei', which the model's tokenizer does not know"),
        ("", "`prompt` has 0 tokens, but must have 1 to 63"),
        ("4 " * 64, "`prompt` has 64 tokens, but must have 1 to 63"),
    ],
)
def test_bad_prompts_are_refused(model, prompt, message):
    with pytest.raises(EvaluationError, match=message):
        answer(model, make_tokenizer(), prompt, None)


def test_the_command_shows_a_saved_model_and_ends_in_one_sentence(model, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    command = ["show.py", "--prompt", PROMPT, "--model", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*command, str(tmp_path), "--task", "brevo-mini"])
    main()
    shown = capsys.readouterr().out
    first, second = shown.split(f"\n{tmp_path}\n")[1:]
    assert first == second
    assert "\x1b" not in shown
    assert "brevo-mini: All ancestors" in shown
    assert re.search(r"The answer is (right|wrong)", shown)
    monkeypatch.setattr("sys.argv", [*command, "--task", "nope"])
    with pytest.raises(SystemExit, match=r"^show.py: `task` is 'nope', but must be one of .*\.$"):
        main()
    monkeypatch.setattr("sys.argv", ["show.py", "--model", str(tmp_path / "none"), "--prompt", PROMPT])
    with pytest.raises(SystemExit, match=r"^show.py: `model` is .*none, but there is no such folder"):
        main()
