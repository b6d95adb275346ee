"""Does depth follow difficulty in natural language? Word problems of three levels, each a clause longer: main, p1, p2.

    python evaluate/word_problems.py --model path/to/model --out build/words               # problems of our own
    python evaluate/word_problems.py --model path/to/model --source apple/GSM-Symbolic ...  # online

The problems of our own have the columns and levels of GSM-Symbolic, so that one command reads both. Either asks for a
model that was trained on natural language, with a tokenizer that knows it, and that ends an answer with "#### number",
as GSM8K's do. The paper's finding here: depth does not grow with the level.
"""

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from datasets import Dataset, load_dataset
from examples import EvaluationError, spread
from loading import load_model, load_tokenizer
from metrics.alignment.analysis import Statistic, estimate, spearman
from run import without_nan
from shares import share_of

from datasets_scripts.options import parse_options

LEVELS = ("main", "p1", "p2")

_NAMES = ("Ana", "Ben", "Chloe", "Dev", "Emma", "Farid", "Grace", "Hugo")
_THINGS = ("apples", "books", "coins", "stamps", "shells", "pens")
_CLAUSES = (
    ("{name} finds {n} more {things}.", lambda total, n: total + n),
    ("Then {name} gives away {n} {things}.", lambda total, n: total - n),
    ("A friend brings {n} times as many {things} as {name} has now.", lambda total, n: total * (n + 1)),
)


@dataclass
class WordProblemArguments:
    """Run a checkpoint on word problems of three levels."""

    model: str = field(
        metadata={"help": "Folder or Hub name of an ANIRA checkpoint, which runs with this clone's code."}
    )
    out: str = field(metadata={"help": "Folder for problems.parquet and problems.json."})
    source: str = field(default="templates", metadata={"help": "'templates', or a dataset such as apple/GSM-Symbolic."})
    rows: int = field(default=200, metadata={"help": "Problems of each level."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer."})
    batch_size: int = field(default=16, metadata={"help": "Problems at a time."})
    seed: int = field(default=0, metadata={"help": "Of the problems of our own, and of the bootstrap."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the model on the Hub."})

    def __post_init__(self) -> None:
        for name, least in {"rows": 1, "max_new_tokens": 1, "batch_size": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise EvaluationError(f"`{name}` is {getattr(self, name)}, but must be at least {least}.")


def make_problems(level: str, rows: int, seed: int) -> Dataset:
    """Problems of our own: `id`, `instance`, `question`, `answer` (steps, then "#### number")."""
    if level not in LEVELS:
        raise ValueError(f"`level` is {level!r}, but must be one of {LEVELS}.")
    made = []
    for row in range(rows):
        rng = np.random.default_rng([seed, LEVELS.index(level), row])
        name, things = str(rng.choice(_NAMES)), str(rng.choice(_THINGS))
        total = int(rng.integers(20, 60))
        sentences, steps = [f"{name} has {total} {things}."], []
        for _ in range(2 + LEVELS.index(level)):
            clause, change = _CLAUSES[rng.integers(len(_CLAUSES))]
            n = int(rng.integers(2, 5))
            sentences.append(clause.format(name=name, things=things, n=n))
            steps.append(f"{total} becomes {change(total, n)}.")
            total = change(total, n)
        question = " ".join([*sentences, f"How many {things} does {name} have?"])
        made.append({"id": row, "instance": 0, "question": question, "answer": f"{' '.join(steps)} #### {total}"})
    return Dataset.from_list(made)


def load_problems(source: str, level: str, rows: int, seed: int) -> Dataset:
    """Problems of a level, our own or of a dataset with configs main, p1 and p2: then taken at equal distances.

    Rows of one template, which have one `id`, stand side by side in such a dataset.
    """
    if source == "templates":
        return make_problems(level, rows, seed)
    problems = load_dataset(source, level, split="test")
    missing = {"id", "question", "answer"} - set(problems.column_names)
    if missing:
        raise EvaluationError(f"`source` is {source}, whose {level} lacks the columns {', '.join(sorted(missing))}.")
    return problems.select(spread(rows, len(problems)))


def make_prompt(question: str) -> str:
    """What the model is given."""
    return f"Question: {question}\nAnswer:"


def read_number(answer: str) -> str | None:
    """The number after the first "####", or else the last number; None if there is none. Commas are dropped.

    After its answer a model may go on with a question of its own.
    """
    marked = answer.partition("####")[2] if "####" in answer else answer
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", marked)
    if not numbers:
        return None
    found = (numbers[0] if "####" in answer else numbers[-1]).replace(",", "")
    return found.rstrip("0").rstrip(".") if "." in found else found


def check_vocabulary(tokenizer: Any, problems: Dataset) -> None:
    """Refuses a tokenizer that does not know the words of the problems, as that of the synthetic tasks."""
    unknown = tokenizer.unk_token_id
    # In some tokenizers (GPT-2's) it is the end of text as well.
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        return
    for question in problems["question"]:
        if unknown in tokenizer(make_prompt(question)).input_ids:
            raise EvaluationError(
                f"The model's tokenizer does not know all of {question[:80]!r}: this needs a model of natural language."
            )


@torch.no_grad()
def answer_problems(model: Any, tokenizer: Any, problems: Dataset, arguments: WordProblemArguments) -> pd.DataFrame:
    """One row a problem: `correct`, `depth` (mean over the answer), `depth_all`, `num_tokens`, and what was written.

    `example` is its template: another problem of that is no independent evidence.
    """
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        raise ValueError("The tokenizer has no pad token, which a batch needs.")
    rows = []
    for start in range(0, len(problems), arguments.batch_size):
        part = problems.select(range(start, min(start + arguments.batch_size, len(problems))))
        batch = tokenizer([make_prompt(question) for question in part["question"]], return_tensors="pt", padding=True)
        output = model.generate(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        width = batch["input_ids"].shape[1]
        for place, (answer, template) in enumerate(zip(part["answer"], part["id"], strict=True)):
            written = tokenizer.decode(output.sequences[place, width:], skip_special_tokens=True)
            depths = output.exit_depths[place].cpu().numpy()
            at_answer, run = depths[width - 1 :], depths[depths > 0]
            rows.append(
                {
                    "example": template,
                    "correct": read_number(written) is not None and read_number(written) == read_number(answer),
                    "depth": float(at_answer[at_answer > 0].mean()),
                    "depth_all": float(run.mean()),
                    "num_tokens": len(run),
                    "written": written,
                }
            )
    return pd.DataFrame(rows)


def measure_levels(table: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Accuracy and mean depth of each level, and Spearman's correlation of depth with the level."""
    numbered = table.assign(level=table["level"].map(LEVELS.index))
    levels = {}
    for level, own in table.groupby("level", sort=False):
        mean = estimate(own, _mean, ("depth",), 500, seed)
        levels[str(level)] = {
            "accuracy": _share_of_templates(own, seed),
            "depth": mean,
            "depth_all": float(own["depth_all"].mean()),
        }
    return {"levels": levels, "depth_with_level": estimate(numbered, spearman, ("depth", "level"), 500, seed)}


def _share_of_templates(own: pd.DataFrame, seed: int) -> dict[str, Any]:
    """The share of right answers; its interval is a bootstrap's over templates where those have several problems."""
    once = own.drop_duplicates("example")
    if len(once) == len(own):
        return share_of(own["correct"])
    if own["correct"].nunique() == 1:  # A bootstrap knows no doubt there.
        return share_of(once["correct"])
    return estimate(own.assign(correct=own["correct"].astype(float)), _mean, ("correct",), 500, seed)


def _mean(values: np.ndarray) -> Statistic:
    return lambda repeats: float(np.average(values, weights=repeats))


def main() -> None:
    """Writes the table and the figures, and prints the figures."""
    (arguments,) = parse_options(WordProblemArguments)
    out = Path(arguments.out)
    try:
        tokenizer = load_tokenizer(arguments.model, arguments.revision)
        model = load_model(arguments.model, arguments.revision).to(Accelerator().device)
        # All before the first is answered: what is missing is said at once.
        problems = {level: load_problems(arguments.source, level, arguments.rows, arguments.seed) for level in LEVELS}
        for own in problems.values():
            check_vocabulary(tokenizer, own)
        parts = [
            answer_problems(model, tokenizer, own, arguments).assign(level=level) for level, own in problems.items()
        ]
    except (OSError, ValueError) as error:
        sys.exit(f"word_problems.py: {error}")
    table = pd.concat(parts, ignore_index=True)
    figures = without_nan(
        {"source": arguments.source, "model": arguments.model, **measure_levels(table, arguments.seed)}
    )
    out.mkdir(parents=True, exist_ok=True)
    table.to_parquet(out / "problems.parquet", index=False)
    (out / "problems.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
