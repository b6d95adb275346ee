"""Timing of alternatives side by side, in the same minute, so that a noisy machine disturbs all of them alike."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers


@dataclass(frozen=True)
class Timing:
    """
    Args:
        seconds: Median over the rounds.
        speedup: Median over the rounds of (the base's time / this one's) in the same round.
    """

    seconds: float
    speedup: float


def time_side_by_side(
    alternatives: Mapping[str, Callable[[], Any]], base: str, repeats: int, device: torch.device
) -> dict[str, Timing]:
    """Runs the alternatives in turn, `repeats` rounds after one warm-up round, and compares each with `base`."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for round_number in range(repeats + 1):
        for name, run in alternatives.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: Timing(
            seconds=statistics.median(times),
            speedup=statistics.median(b / t for b, t in zip(seconds[base], times, strict=True)),
        )
        for name, times in seconds.items()
    }


def print_report(title: str, rows: list[dict[str, Any]], device: torch.device) -> None:
    """Prints a table of `rows`, which share their keys, and the same as one line of JSON."""
    print(f"\n{title}")
    header = list(rows[0])
    cells = [[_format(row[name]) for name in header] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(header)]
    for line in [header, *cells]:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    print(json.dumps({"benchmark": title, "rows": rows, **describe_machine(device)}))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _format(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
