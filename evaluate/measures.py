"""The four analyses of a finished run, by the metrics' own functions."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from metrics.alignment.analysis import align
from metrics.dynamics.analysis import find_phases
from metrics.generalization.analysis import beyond_training, by_size
from metrics.timing.analysis import STATE, STATIC, explain_depth

Tables = dict[str, tuple[pd.DataFrame, pd.DataFrame]]

# Depth as allocated; as the decider expected it on the path taken; and as it would have with all tokens at D.
DEPTHS = ("exit_depth", "expected_depth", "expected_depth_full")


def measure(tables: Tables, split: str, limit: int, log: Path | None, arguments: Any) -> dict[str, Any]:
    """All four. What cannot be measured has None with a `reason`.

    Args:
        tables: (token table, example table) by split.
        split: The one that alignment and timing are measured on.
        limit: Largest size of training.
        log: log.jsonl of the training, if known.
    """
    tokens, examples = tables[split]
    answers = tokens[tokens["is_answer"]]
    resamples, seed = arguments.resamples, arguments.seed
    by_example = (
        answers.groupby("example")[list(DEPTHS)]
        .mean()
        .join(examples.set_index("example")[["size", "difficulty", "correct"]])
    )
    by_example = by_example.reset_index()
    by_token = answers.assign(difficulty=answers["token_difficulty"])
    every = pd.concat([own for _, own in tables.values()], ignore_index=True)
    return {
        "alignment": {
            "per_example": {depth: align(by_example, depth, resamples=resamples, seed=seed) for depth in DEPTHS},
            "per_token": {depth: align(by_token, depth, resamples=resamples, seed=seed) for depth in DEPTHS},
        },
        "generalization": {"by_size": by_size(every), "beyond": beyond_training(every, limit)},
        "dynamics": measure_dynamics(log),
        "timing": {depth: measure_timing(answers, depth, resamples, seed) for depth in DEPTHS},
    }


def measure_dynamics(log: Path | None) -> dict[str, Any]:
    """The phases of depth at answers, by the evaluations on the validation split that were made on the way."""
    if log is None:
        return {"phases": None, "reason": "no log.jsonl of the training was found; --log says where it is"}
    points = read_evaluations(log)
    if not len(points):
        return {"phases": None, "reason": f"{log} has no evaluations"}
    return find_phases(points["step"].tolist(), points["depth"].tolist(), points["accuracy"].tolist())


def read_evaluations(log: Path) -> pd.DataFrame:
    """`step`, `depth`, `depth_all`, `accuracy` of the validation split on the way."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    kept = [line for line in lines if line.get("kind") == "evaluation" and line.get("split") == "validation"]
    return pd.DataFrame([{name: line[name] for name in ("step", "depth", "depth_all", "accuracy")} for line in kept])


def measure_timing(answers: pd.DataFrame, depth: str, resamples: int, seed: int) -> dict[str, Any]:
    """The regression on the task's features."""
    features = [name for name in answers.columns if name.endswith((STATIC, STATE))]
    if not features:
        return {"r2": None, "terms": {}, "reason": "the task has no features"}
    return explain_depth(answers[["example", "size", depth, *features]], depth, min(resamples, 200), seed)
