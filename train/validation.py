"""Evaluation on the way: exact accuracy and mean depth by size, on rows that are the same at every step."""

from collections import defaultdict
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from datasets_scripts import Task
from datasets_scripts.answers import Answer, ask, depths_at_answer


def validate(accelerator: Accelerator, model: Any, task: Task, split: str, rows: int) -> dict[str, Any]:
    """Answers `rows` examples of `split`, shared out among processes.

    Returns:
        `accuracy`, `depth` (mean over the positions from which answers are predicted), `depth_all` (over all tokens
        that were run), and `by_size`: the same for each size, with the number of rows.
    """
    own = range(accelerator.process_index, rows, accelerator.num_processes)
    found: list[dict[str, Any]] = []
    if len(own):
        batch = task.generate(split, own)
        answers = ask(accelerator.unwrap_model(model), task, batch)
        found = [_summarize(int(size), answer) for size, answer in zip(batch.size, answers, strict=True)]
    gathered = gather_object(found)
    by_size: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in gathered:
        by_size[row["size"]].append(row)
    return {
        **_average(gathered),
        "by_size": {str(size): {"rows": len(by_size[size]), **_average(by_size[size])} for size in sorted(by_size)},
    }


def _summarize(size: int, answer: Answer) -> dict[str, Any]:
    """A row's size, verdict, and sums of depth."""
    depths = answer.depths or []
    at_answer = depths_at_answer(depths, answer.prompt_length)
    return {
        "size": size,
        "correct": answer.verdict.correct,
        "answer": (sum(at_answer), len(at_answer)),
        "all": (sum(depths[:-1]), len(depths[:-1])),
    }


def _average(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {
        "accuracy": sum(row["correct"] for row in rows) / len(rows),
        "depth": _ratio(rows, "answer"),
        "depth_all": _ratio(rows, "all"),
    }


def _ratio(rows: list[dict[str, Any]], name: str) -> float:
    return sum(row[name][0] for row in rows) / max(1, sum(row[name][1] for row in rows))
