"""The columns of a dataset: what they mean, their types, and how examples become rows."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value

from datasets_scripts.task import Batch, Labels, Task, require
from datasets_scripts.vocabulary import WORDS

COLUMNS = {
    "text": "the whole example, words separated by spaces: `prompt`, a space, `completion`",
    "prompt": "the question, from `<bos>` to `<ans>`",
    "completion": "the answer, up to `<eos>`",
    "task": "name of the task",
    "size": "what training limits: {size}",
    "difficulty": "sequential steps that the algorithm needs: {difficulty}",
    "num_tokens": "words in `text`",
    "answer_start": "index of the first word of `completion` in `text`",
    "token_difficulty": "one number a word: {token_difficulty}",
    "features": "lists, a number a word; names end in `_static` (of the instance) or `_state` (of the words so far)",
}

# A row of a stream can also carry the ids that the tokenizer would give.
INPUT_IDS = "input_ids"

_WORD_ARRAY = np.array(WORDS, dtype=object)


def make_features(task: Task) -> Features:
    """The column types of a task's dataset."""
    return Features(
        {
            "text": Value("string"),
            "prompt": Value("string"),
            "completion": Value("string"),
            "task": Value("string"),
            "size": Value("int32"),
            "difficulty": Value("int32"),
            "num_tokens": Value("int32"),
            "answer_start": Value("int32"),
            "token_difficulty": List(Value("float32")),
            "features": {name: List(Value("int32")) for name in task.features},
        }
    )


def make_table(task: Task, batch: Batch) -> pa.Table:
    """The examples of a batch as a table of the columns above."""
    labels = task.label(batch)
    texts = _make_texts(batch)
    offsets = pa.array(batch.offsets, pa.int32())
    lists = {name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in labels.features.items()}
    schema = make_features(task).arrow_schema
    columns: dict[str, pa.Array] = {
        **{name: pa.array(texts[name]) for name in ("text", "prompt", "completion")},
        "task": pa.array([task.name] * len(batch)),
        "size": pa.array(batch.size),
        "difficulty": pa.array(labels.difficulty),
        "num_tokens": pa.array(np.diff(batch.offsets).astype(np.int32)),
        "answer_start": pa.array(batch.answer_start),
        "token_difficulty": pa.ListArray.from_arrays(offsets, pa.array(labels.token_difficulty)),
        "features": pa.StructArray.from_arrays(list(lists.values()), names=list(lists)),
    }
    return pa.Table.from_arrays([columns[name].cast(schema.field(name).type) for name in schema.names], schema=schema)


def make_rows(task: Task, batch: Batch, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The examples of a batch as dicts of plain values. Labels and texts are made only if `columns` asks for them."""
    texts = _make_texts(batch) if {"text", "prompt", "completion"} & set(columns) else {}
    wanted = {"difficulty", "token_difficulty", "features"} & set(columns)
    labels = task.label(batch) if wanted else Labels(np.empty(0), np.empty(0), {})
    bounds = batch.offsets.tolist()
    ids = batch.tokens.tolist() if INPUT_IDS in columns else []
    getters = {
        **{name: texts[name].__getitem__ for name in texts},
        "task": lambda row: task.name,
        "size": batch.size.tolist().__getitem__,
        "difficulty": labels.difficulty.tolist().__getitem__,
        "num_tokens": lambda row: bounds[row + 1] - bounds[row],
        "answer_start": batch.answer_start.tolist().__getitem__,
        "token_difficulty": lambda row: labels.token_difficulty[bounds[row] : bounds[row + 1]].tolist(),
        "features": lambda row: {
            name: values[bounds[row] : bounds[row + 1]].tolist() for name, values in labels.features.items()
        },
        INPUT_IDS: lambda row: ids[bounds[row] : bounds[row + 1]],
    }
    for row in range(len(batch)):
        yield {name: getters[name](row) for name in columns}


def check_columns(columns: Sequence[str]) -> None:
    """Refuses a column that no dataset has."""
    for name in columns:
        require(name in COLUMNS or name == INPUT_IDS, "columns", name, f"of {', '.join([*COLUMNS, INPUT_IDS])}")


def _make_texts(batch: Batch) -> dict[str, list[str]]:
    words = _WORD_ARRAY[batch.tokens].tolist()
    texts: dict[str, list[str]] = {"text": [], "prompt": [], "completion": []}
    bounds = batch.offsets.tolist()
    for row, answer in enumerate(batch.answer_start.tolist()):
        cut = bounds[row] + answer
        prompt, completion = " ".join(words[bounds[row] : cut]), " ".join(words[cut : bounds[row + 1]])
        texts["prompt"].append(prompt)
        texts["completion"].append(completion)
        texts["text"].append(f"{prompt} {completion}")
    return texts
