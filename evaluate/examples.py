"""The examples of an evaluation: rows of a dataset, with the task that can judge and label answers to them."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset

from datasets_scripts import PRESETS, TASKS, Batch, Task, get_task
from datasets_scripts.build import RECORD
from datasets_scripts.vocabulary import encode


class EvaluationError(ValueError):
    """Something that the user can mend."""


def open_task(dataset: str, config: str) -> Task:
    """The task that a dataset's config was drawn from: by the record of a built folder, else by the preset's name."""
    record = read_record(dataset)
    if record is not None:
        configs = record["configs"]
        if config in configs:
            return TASKS[configs[config]["task"]].from_settings(configs[config]["settings"])
        raise EvaluationError(f"`config` is {config!r}, but {dataset} has {', '.join(configs)}.")
    if config in PRESETS:
        return get_task(config)
    raise EvaluationError(
        f"`config` is {config!r}, which is no preset ({', '.join(PRESETS)}), and {dataset} has no generation.json."
    )


def read_record(dataset: str) -> dict[str, Any] | None:
    """What `build.py` kept of how a dataset was drawn; None if that is not at hand, as for one on the Hub."""
    path = Path(dataset) / RECORD
    return json.loads(path.read_text()) if path.is_file() else None


def load_examples(dataset: str, config: str, split: str, rows: int) -> Batch:
    """So many examples of a split (0: all), at equal distances."""
    try:
        table: Dataset = load_dataset(dataset, config, split=split)
    except Exception as error:
        taken = "" if Path(dataset).exists() else " (no folder here, so taken for a name on the Hub)"
        raise EvaluationError(f"{dataset}{taken}, {config}, {split} cannot be loaded: {error}") from error
    missing = {"text", "answer_start", "size"} - set(table.column_names)
    if missing:
        raise EvaluationError(
            f"{dataset}, {config} lacks the columns {', '.join(sorted(missing))}: it is no dataset of these tasks."
        )
    table = table.select(spread(rows or len(table), len(table)))
    ids = [encode(text) for text in table["text"]]
    # Features that only the generator knows cannot be labelled again from the text.
    features = table["features"] if "features" in table.column_names else []
    names = list(features[0]) if len(features) else []
    derived = {name: np.concatenate([np.array(row[name], np.int32) for row in features]) for name in names}
    return Batch(
        np.concatenate([np.array(own, np.int32) for own in ids]),
        np.concatenate([[0], np.cumsum([len(own) for own in ids])]),
        np.array(table["answer_start"], np.int32),
        np.array(table["size"], np.int32),
        np.zeros(len(ids), np.uint64),
        derived,
    )


def spread(count: int, total: int) -> np.ndarray:
    """`count` of the numbers below `total`, or all if it has fewer, ascending and at equal distances.

    The first rows of a split are no sample of it: no instance occurs twice, so small sizes, of which there are few, run
    out early.
    """
    count = min(count, total)
    return np.arange(count) * total // max(1, count)


def take(batch: Batch, rows: Sequence[int] | np.ndarray) -> Batch:
    """Some examples of a batch."""
    rows = np.asarray(rows, int)
    spans = [np.arange(batch.offsets[row], batch.offsets[row + 1]) for row in rows]
    tokens = np.concatenate([np.zeros(0, int), *spans])
    return dataclasses.replace(
        batch,
        tokens=batch.tokens[tokens],
        offsets=np.concatenate([[0], np.cumsum([len(span) for span in spans])]).astype(batch.offsets.dtype),
        answer_start=batch.answer_start[rows],
        size=batch.size[rows],
        instance=batch.instance[rows],
        derived={name: values[tokens] for name, values in batch.derived.items()},
    )
