"""How fast examples are made, on one core: drawn, labelled, and as the rows that a training loop reads.

    python benchmarks/tasks.py

"drawn" and "labelled" are arrays ("drawn" is LANO without its entropies); rows are those of `stream`, with ids alone
and with all columns. Compiling, a few seconds a task once a process, is left out.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import print_report

from datasets_scripts import get_task, stream

TRAINING_COLUMNS = ("input_ids", "answer_start", "size")


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["mano-paper", "brevo-paper", "brevo-paper-words", "lano-paper"])
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [_measure(name, arguments.seconds) for name in arguments.tasks]
    print_report("examples made on one core, in thousand tokens a second", rows, torch.device("cpu"))


def _measure(name: str, seconds: float) -> dict[str, Any]:
    task = get_task(name)
    tokens = len(task.generate("train", range(2000)).tokens) / 2000

    def draw(start: int) -> None:
        task.generate("train", range(start, start + 1000))

    def draw_and_label(start: int) -> None:
        task.label(task.generate("train", range(start, start + 1000)))

    def read(columns: tuple[str, ...]) -> Callable[[int], object]:
        rows = iter(stream(name, columns=columns))
        return lambda start: next(itertools.islice(rows, 999, 1000), None)

    everything = ("text", "prompt", "completion", "difficulty", "token_difficulty", "features")
    speed: dict[str, Callable[[int], object]] = {
        "drawn": draw,
        "labelled": draw_and_label,
        "rows for training": read(TRAINING_COLUMNS),
        "rows, all columns": read(everything),
    }
    figures = {label: _examples_per_second(run, seconds) * tokens / 1000 for label, run in speed.items()}
    return {"task": name, "tokens each": tokens, "examples a second": figures["labelled"] * 1000 / tokens, **figures}


def _examples_per_second(run: Callable[[int], object], seconds: float) -> float:
    run(0)
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        run(done)
        done += 1000
    return done / (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
