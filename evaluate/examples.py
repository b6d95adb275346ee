"""The examples of an evaluation: rows of a dataset, with the task that can judge and label answers to them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset

from datasets_scripts import PRESETS, TASKS, Batch, Task, get_task
from datasets_scripts.vocabulary import encode


class EvaluationError(ValueError):
    """Something that the user can mend."""


def open_task(dataset: str, config: str) -> Task:
    """The task that a dataset's config was drawn from: by the record of a built folder, else by the preset's name."""
    record = Path(dataset) / "generation.json"
    if record.is_file():
        configs = json.loads(record.read_text())["configs"]
        if config in configs:
            return TASKS[configs[config]["task"]].from_settings(configs[config]["settings"])
        raise EvaluationError(f"`config` is {config!r}, but {dataset} has {', '.join(configs)}.")
    if config in PRESETS:
        return get_task(config)
    raise EvaluationError(
        f"`config` is {config!r}, which is no preset ({', '.join(PRESETS)}), and {dataset} has no generation.json."
    )


def load_examples(dataset: str, config: str, split: str, rows: int) -> Batch:
    """The first `rows` examples of a split (0: all)."""
    try:
        table: Dataset = load_dataset(dataset, config, split=split if not rows else f"{split}[:{rows}]")
    except Exception as error:
        raise EvaluationError(f"{dataset}, {config}, {split} cannot be loaded: {error}") from error
    missing = {"text", "answer_start", "size"} - set(table.column_names)
    if missing:
        raise EvaluationError(
            f"{dataset}, {config} lacks the columns {', '.join(sorted(missing))}: it is no dataset of these tasks."
        )
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


def take(batch: Batch, rows: range) -> Batch:
    """Some neighbouring examples of a batch."""
    first, last = batch.offsets[rows.start], batch.offsets[rows.stop]
    return dataclasses.replace(
        batch,
        tokens=batch.tokens[first:last],
        offsets=batch.offsets[rows.start : rows.stop + 1] - first,
        answer_start=batch.answer_start[rows.start : rows.stop],
        size=batch.size[rows.start : rows.stop],
        instance=batch.instance[rows.start : rows.stop],
        derived={name: values[first:last] for name, values in batch.derived.items()},
    )
