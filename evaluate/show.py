"""Shows in the terminal how many iterations checkpoints give each token of one example.

    python evaluate/show.py --model build/runs/brevo-online/model --task brevo-mini --index 3
    python evaluate/show.py --model build/runs/brevo-online/model --prompt "<bos> 4 2 7 4 <query> 2 <ans>"

Several models behind --model are shown one after the other. They answer by the stock `generate()`. Without a terminal,
or with NO_COLOR set, the picture has no colours; bars and figures say the same.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from examples import EvaluationError
from loading import load_model, load_tokenizer
from rich.cells import cell_len
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from datasets_scripts import Task, Verdict, get_task
from datasets_scripts.answers import depths_at_answer, sampling
from datasets_scripts.options import parse_options
from datasets_scripts.vocabulary import decode

_BARS = "▁▂▃▄▅▆▇█"
# Yellow to dark red, as in the report's figures; the darkest are read with white letters.
_COLORS = ("#ffffcc", "#ffeda0", "#fed976", "#feb24c", "#fd8d3c", "#fc4e2a", "#e31a1c", "#bd0026", "#800026")


@dataclass
class ShowArguments:
    """Show how many iterations each token of one example gets."""

    model: list[str] = field(
        metadata={"help": "Folders or Hub names of ANIRA checkpoints, which run with this clone's code."}
    )
    task: str | None = field(
        default=None, metadata={"help": "Preset of a task, such as brevo-mini. Its verifier judges the answer."}
    )
    index: int | None = field(default=None, metadata={"help": "Which example of the task's test split; 0 by default."})
    prompt: str | None = field(default=None, metadata={"help": "A prompt of your own in place of an example."})
    revision: str | None = field(default=None, metadata={"help": "Revision of every model on the Hub."})

    def __post_init__(self) -> None:
        if self.prompt is None and self.task is None:
            raise EvaluationError("Give `--task` for one of its examples, or `--prompt`.")
        if self.prompt is not None and self.index is not None:
            raise EvaluationError("`--index` and `--prompt` are both given: one example at a time.")
        if self.index is not None and self.index < 0:
            raise EvaluationError(f"`index` is {self.index}, but must be at least 0.")


@dataclass(frozen=True)
class Answered:
    """A prompt and what a model answered.

    Args:
        words: Of the prompt and the answer.
        depths: Iterations of each word, which went into predicting the next; 0 for the last, which was not run.
        prompt_length: How many of the words are the prompt.
        deepest: The most iterations that the model can give.
    """

    words: Sequence[str]
    depths: Sequence[int]
    prompt_length: int
    deepest: int

    @property
    def mean_depths(self) -> tuple[float, float]:
        """Mean depth over the positions from which the answer was predicted, and over all that were run."""
        at_answer, run = depths_at_answer(self.depths, self.prompt_length), self.depths[:-1]
        return sum(at_answer) / len(at_answer), sum(run) / len(run)


def choose_prompt(arguments: ShowArguments, task: Task | None) -> str:
    """The prompt that was given, or that of the example."""
    if arguments.prompt is not None or task is None:
        return arguments.prompt or ""
    batch = task.generate("test", [arguments.index or 0])
    return decode(batch.tokens[: batch.answer_start[0]].tolist())


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str, task: Task | None) -> Answered:
    """What the model answers: greedy, or sampled where the task says so. Raises an EvaluationError for a bad prompt."""
    unknown = [word for word in prompt.split() if tokenizer.unk_token_id in tokenizer(word).input_ids]
    if unknown:
        raise EvaluationError(f"`prompt` has {unknown[0]!r}, which the model's tokenizer does not know.")
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids.long()
    length, room = ids.shape[1], model.config.max_position_embeddings
    if not 1 <= length < room:
        raise EvaluationError(f"`prompt` has {length} tokens, but must have 1 to {room - 1}: the model takes {room}.")
    longest = room if task is None else task.longest_answer(task.config.extrapolation_size)
    torch.manual_seed(0)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(longest, room - length),
        **({"do_sample": False} if task is None else sampling(task)),
        return_dict_in_generate=True,
    )
    words = tokenizer.convert_ids_to_tokens(output.sequences[0].tolist())
    return Answered(words, output.exit_depths[0].tolist(), length, model.config.max_depth)


def judge(found: Answered, task: Task) -> Verdict:
    """Whether the task's verifier takes the answer."""
    return task.verify(" ".join(found.words[: found.prompt_length]), " ".join(found.words[found.prompt_length :]))


def draw(found: Answered, console: Console) -> None:
    """Prints every word between a bar and its depth, prompt and answer apart, as wide as the console is."""
    parts = {"prompt": range(found.prompt_length), "answer": range(found.prompt_length, len(found.words))}
    for name, places in parts.items():
        console.print(Rule(name, align="left", style="dim"))
        for line in _wrap(found, places, console.width):
            console.print(_draw_line(found, line), soft_wrap=True)
    console.print(Rule(style="dim"))


def _wrap(found: Answered, places: Sequence[int], width: int) -> Iterator[list[int]]:
    """`places` in lines that are at most `width` wide; a longer word has a line of its own."""
    line: list[int] = []
    used = 0
    for place in places:
        needed = _width(found, place) + 1
        if line and used + needed > width:
            yield line
            line, used = [], 0
        line.append(place)
        used += needed
    if line:
        yield line


def _width(found: Answered, place: int) -> int:
    """Cells of a word or of the depth below it, whichever takes more."""
    return max(cell_len(found.words[place]), len(str(found.depths[place])))


def _draw_line(found: Answered, line: list[int]) -> Text:
    """Three lines of text: bars, words, depths."""
    rows = [Text(), Text(), Text()]
    for place in line:
        depth = found.depths[place]
        texts = (_bar(depth, found.deepest), found.words[place], str(depth) if depth else "-")
        for row, text, style in zip(rows, texts, ("", _style(depth, found.deepest), "dim"), strict=True):
            row.append(text, style).append(" " * (_width(found, place) + 1 - cell_len(text)))
    return Text("\n").join(rows)


def _share(depth: int, deepest: int) -> float:
    return (depth - 1) / max(1, deepest - 1)


def _bar(depth: int, deepest: int) -> str:
    return _BARS[round(_share(depth, deepest) * (len(_BARS) - 1))] if depth else " "


def _style(depth: int, deepest: int) -> str:
    if not depth:
        return ""
    number = round(_share(depth, deepest) * (len(_COLORS) - 1))
    return f"{'black' if number < 6 else 'white'} on {_COLORS[number]}"


def describe(found: Answered, verdict: Verdict | None, console: Console) -> None:
    """Prints the verdict, the mean depths, and the legend."""
    if verdict is None:
        console.print("The answer is not judged: no task is given.")
    else:
        console.print(f"The answer is {'right' if verdict else 'wrong'}. {verdict.reason}".rstrip())
    at_answer, over_all = found.mean_depths
    console.print(f"Mean depth {at_answer:.2f} at the answer, {over_all:.2f} over all tokens, of {found.deepest}.")
    legend = Text("Depths:")
    for depth in range(1, found.deepest + 1):
        legend.append(" ").append(str(depth), _style(depth, found.deepest)).append(_bar(depth, found.deepest))
    console.print(legend.append(", - not run."))
    console.print(
        "A token's depth goes into predicting the next: the prompt's last token counts to the answer.", style="dim"
    )


def main() -> None:
    """Shows the example that the command line names. What the user can mend ends in one sentence."""
    (arguments,) = parse_options(ShowArguments)
    console = Console(highlight=False, markup=False)
    try:
        task = get_task(arguments.task) if arguments.task else None
        prompt = choose_prompt(arguments, task)
        for name in arguments.model:
            tokenizer = load_tokenizer(name, arguments.revision)
            found = answer(load_model(name, arguments.revision), tokenizer, prompt, task)
            console.print(f"\n{name}", style="bold")
            if task:
                console.print(f"{arguments.task}: {type(task).__doc__}")
            draw(found, console)
            describe(found, judge(found, task) if task else None, console)
    except ValueError as error:
        sys.exit(f"show.py: {error}")


if __name__ == "__main__":
    main()
