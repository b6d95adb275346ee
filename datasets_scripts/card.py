"""The card of a dataset repo, from which alone a reader can tell what each column means."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import DatasetInfo, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData

from datasets_scripts.columns import COLUMNS, make_features, make_table
from datasets_scripts.task import Task

# Worked examples are drawn in lines so wide.
_WIDTH = 110

_INTRODUCTION = """
# ANIRA tasks

Tasks on which it is known how hard each token is, made to test whether a model that decides per token
how much it computes spends more where more is needed.

```python
from datasets import load_dataset

rows = load_dataset("{folder}", "{config}", split="test")  # streaming=True works as well
```

The tokenizer comes along: `AutoTokenizer.from_pretrained("{folder}")`. It has one id a word and adds none, so number i
of a list belongs to word i of `text`.
"""

_CONVENTIONS = """
**Label i describes position i: what is needed, having read words 0 to i, to predict word i + 1.** Features whose name
ends in `_state` use words up to i alone, those in `_static` the whole instance. Analyses of answers use the positions
`answer_start` - 1 to `num_tokens` - 2.
"""

_SPLITS = """
## Splits

An instance decides its split, by a hash of its canonical form: 90 of 100 belong to train, 5 to validation, 5 to test.
So no instance is in two of them, in any build, at any seed, or in the endless streams of the generators. The same graph
with other names for its vertices is another instance, as is the same sum the other way round.
`extrapolation` holds sizes beyond those that train has. Sizes in train follow the task's weights; in the other splits
all are drawn alike (where the task chooses them), but no instance comes twice, so that a size with few instances is
rare. `generation.json` says what was drawn, and `remake_row` in `datasets_scripts/build.py` makes any row again from
it.

| config | split | rows | sizes | rows of the rarest size | repeated instances |
| --- | --- | --- | --- | --- | --- |
{rows}

{settings}
"""

_CITATION = """
## Citation

MANO, BREVO and LANO are those of Allen-Zhu, *Physics of Language Models: Part 4.1* (arXiv 2512.17351), as used for
per-token depth in *ANIRA* (arXiv 2602.08864). The generators and labels are this project's own.
"""


def make_card(folder: Path, tasks: dict[str, Task], record: dict[str, Any], loaded_by: str) -> str:
    """The text of README.md for the configs in `record`, whose Parquet files lie in `folder`."""
    infos = {name: _make_info(folder / name, name, task, record) for name, task in tasks.items()}
    data = DatasetCardData(
        license="apache-2.0",
        pretty_name="ANIRA tasks",
        tags=["synthetic", "reasoning", "adaptive-computation"],
        configs=[
            {
                "config_name": name,
                "data_files": [
                    {"split": split, "path": f"{name}/{split}-*.parquet"} for split in record["configs"][name]["splits"]
                ],
            }
            for name in tasks
        ],
    )
    DatasetInfosDict(infos).to_dataset_card_data(data)
    return f"---\n{data.to_yaml()}\n---\n{_make_text(loaded_by, tasks, record)}"


def _make_info(folder: Path, name: str, task: Task, record: dict[str, Any]) -> DatasetInfo:
    """Types and sizes of a config. `num_bytes` is that of the Parquet columns before compression."""
    splits = SplitDict()
    for split, entry in record["configs"][name]["splits"].items():
        metadata = [pyarrow.parquet.read_metadata(file) for file in sorted(folder.glob(f"{split}-*.parquet"))]
        size = sum(file.row_group(group).total_byte_size for file in metadata for group in range(file.num_row_groups))
        splits.add(SplitInfo(name=split, num_bytes=size, num_examples=entry["rows"], dataset_name="anira-tasks"))
    download = sum(file.stat().st_size for file in folder.glob("*.parquet"))
    return DatasetInfo(
        features=make_features(task),
        splits=splits,
        download_size=download,
        dataset_size=sum(split.num_bytes for split in splits.values()),
        config_name=name,
    )


def _make_text(loaded_by: str, tasks: dict[str, Task], record: dict[str, Any]) -> str:
    first = next(iter(tasks))
    families: dict[str, Task] = {}
    for task in tasks.values():
        families.setdefault(task.name, task)
    parts = [
        _INTRODUCTION.format(folder=loaded_by, config=first),
        "\n## Columns\n\n| column | type | meaning |\n| --- | --- | --- |\n",
        *(_describe_column(name, meaning, families) for name, meaning in COLUMNS.items()),
        _CONVENTIONS,
        *(_describe_task(task) for task in families.values()),
        _SPLITS.format(rows="\n".join(_list_splits(tasks, record)), settings=_list_settings(record)),
        _CITATION,
    ]
    return "".join(parts)


def _describe_column(name: str, meaning: str, families: dict[str, Task]) -> str:
    kind = _name_type(make_features(next(iter(families.values())))[name])
    for mark in ("{size}", "{difficulty}", "{token_difficulty}"):
        meaning = meaning.replace(f": {mark}", " (below, by task)")
    return f"| `{name}` | {kind} | {meaning} |\n"


def _name_type(feature: Any) -> str:
    if isinstance(feature, dict):
        return "struct of lists of int32"
    return f"list of {feature.feature.dtype}" if hasattr(feature, "feature") else feature.dtype


def describe(task: Task) -> str:
    """What the task asks for, with an example: the text at the head of its module."""
    return sys.modules[type(task).__module__].__doc__ or ""


def _describe_task(task: Task) -> str:
    """A section with what the columns mean for this task, and an example with its labels under its words."""
    lines = [
        f"\n## {task.name}\n",
        f"{describe(task)}\n",
        f"* `size`: {task.size_meaning}.",
        f"* `difficulty`: {task.difficulty_meaning}.",
        f"* `token_difficulty`: {task.token_difficulty_meaning}.",
        *(f"* `features.{name}`: {meaning}." for name, meaning in task.features.items()),
        f"* Right or wrong: {task.scoring}.\n",
        "```",
        *draw_labels(make_table(task, task.generate("validation", [find_readable(task)])).to_pylist()[0]),
        "```\n",
    ]
    return "\n".join(lines)


def find_readable(task: Task) -> int:
    """Index of an example that is short enough to be read, yet not of the least size if others are as short."""
    batch = task.generate("validation", range(64))
    lengths = [int(length) for length in batch.offsets[1:] - batch.offsets[:-1]]
    return sorted(range(len(lengths)), key=lambda row: (lengths[row], row))[len(lengths) // 4]


def draw_labels(row: dict[str, Any]) -> list[str]:
    """A row of a dataset as lines of text: its words, and under each word its labels."""
    words = row["text"].split()
    table = {"": words, "token_difficulty": [f"{value:.3g}" for value in row["token_difficulty"]]}
    table |= {name: [str(value) for value in values] for name, values in row["features"].items()}
    margin = max(len(name) for name in table) + 2
    lines = [f"size {row['size']}, difficulty {row['difficulty']}, answer_start {row['answer_start']}"]
    start = 0
    while start < len(words):
        end, used = start, margin
        while end < len(words) and used + _column_width(table, end) <= _WIDTH:
            used += _column_width(table, end)
            end += 1
        lines.append("")
        for name, values in table.items():
            cells = (values[i].rjust(_column_width(table, i)) for i in range(start, end))
            lines.append((name.ljust(margin) + "".join(cells)).rstrip())
        start = end
    return lines


def _column_width(table: dict[str, Sequence[str]], column: int) -> int:
    return 1 + max(len(values[column]) for values in table.values())


def _list_settings(record: dict[str, Any]) -> str:
    """What distinguishes the configs of one task, but for grammars, which are long and stand in the record."""
    lines = []
    for name, config in record["configs"].items():
        settings = (f"{key} {value}" for key, value in config["settings"].items() if not isinstance(value, dict))
        lines.append(f"* `{name}`: {', '.join(settings)}.")
    return "\n".join(lines)


def _list_splits(tasks: dict[str, Task], record: dict[str, Any]) -> list[str]:
    lines = []
    for name, task in tasks.items():
        for split, entry in record["configs"][name]["splits"].items():
            least, largest = task.config.size_range(split)
            rarest = "{1} of size {0}".format(*entry["rarest_size"]) if entry["rarest_size"] else ""
            cells = (name, split, entry["rows"], f"{least} to {largest}", rarest, entry["duplicates"])
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines
