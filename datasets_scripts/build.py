"""Writes the tasks as a dataset repo: `load_dataset(DIR, "mano-mini", split="train")`, streaming too, without network.

    python datasets_scripts/build.py --out build/tasks --tasks mano-mini brevo-mini

The folder holds Parquet files by config and split, a card, the tokenizer, checksums, and `generation.json`, from which
any row can be made again. It appears when it is whole: until then all is in a folder beside it, `DIR.partial`, from
which the same command goes on if it was stopped. The same arguments and versions of the libraries give the same bytes.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from tqdm import tqdm
from transformers import HfArgumentParser

from datasets_scripts.card import write_card
from datasets_scripts.columns import make_features, make_table
from datasets_scripts.grammar import Grammar
from datasets_scripts.lano import Lano, LanoConfig
from datasets_scripts.randomness import SPLITS
from datasets_scripts.registry import PRESETS, TASKS, get_task
from datasets_scripts.task import Task, require
from datasets_scripts.tokenizer import make_tokenizer

RECORD = "generation.json"
CHECKSUMS = "SHA256SUMS"

_ROWS_PER_SHARD = 20_000
_ROWS_PER_GROUP = 1_000
# An evaluation split gives up after so many draws a row: then it has fewer instances than rows were asked for.
_DRAWS_PER_ROW = 50


@dataclass
class BuildArguments:
    """Write the tasks as a dataset repo."""

    out: str = field(metadata={"help": "Folder to write. It must not exist yet, or be empty."})
    tasks: list[str] = field(
        default_factory=lambda: list(PRESETS), metadata={"help": f"Presets to write: {', '.join(PRESETS)}."}
    )
    grammars: list[str] = field(
        default_factory=list,
        metadata={"help": "Published grammar files, such as cfg3b.json; each gives a config lano-NAME."},
    )
    rows: int = field(default=100_000, metadata={"help": "Rows of each train split."})
    eval_rows: int = field(default=5_000, metadata={"help": "Rows of each validation, test and extrapolation split."})
    seed: int = field(default=0, metadata={"help": "Another one, other examples; each instance stays in its split."})
    processes: int = field(default=os.cpu_count() or 1, metadata={"help": "How many processes draw examples."})


@dataclass(frozen=True)
class Shard:
    """A Parquet file: the examples `indices` of a split, in this order."""

    task: Task
    split: str
    seed: int
    indices: np.ndarray
    path: Path


def build(arguments: BuildArguments) -> Path:
    """Writes the dataset repo, and returns its folder. Raises a ValueError for what cannot be built, before writing."""
    out = Path(arguments.out)
    tasks = _make_tasks(arguments)
    record = _plan(tasks, arguments)
    if _is_finished(out, record):
        print(f"{out} is already complete.")
        return out
    partial = _open_partial(out, record)
    with tqdm(unit="row", unit_scale=True, desc="drawing", file=sys.stderr) as progress:
        shards: list[Shard] = []
        for name, task in tasks.items():
            # Compiled here, before processes fork and would each compile it again.
            make_table(task, task.generate("train", [0], arguments.seed))
            for split, entry in record["configs"][name]["splits"].items():
                indices, skipped = _choose_indices(task, split, arguments.seed, entry["rows"])
                entry["skipped"] = skipped
                shards += _split_into_shards(task, split, arguments.seed, indices, partial / name)
        progress.reset(total=sum(len(shard.indices) for shard in shards))
        _write_shards(shards, arguments.processes, progress)
    for name, config in record["configs"].items():
        for split, entry in config["splits"].items():
            entry["duplicates"] = _count_duplicates(partial / name, split, entry["rows"])
    _finish(partial, out, tasks, record)
    return out


def remake_row(folder: str | Path, config: str, split: str, row: int) -> dict[str, Any]:
    """Makes a row of a built dataset again, from what its `generation.json` says."""
    record = json.loads((Path(folder) / RECORD).read_text())
    require(config in record["configs"], "config", config, f"one of {', '.join(record['configs'])}")
    entry = record["configs"][config]
    require(split in entry["splits"], "split", split, f"one of {', '.join(entry['splits'])}")
    rows = entry["splits"][split]["rows"]
    require(0 <= row < rows, "row", row, f"0 to {rows - 1}")
    index = row
    for skipped in entry["splits"][split]["skipped"]:
        index += int(skipped <= index)
    task = TASKS[entry["task"]].from_settings(entry["settings"])
    return make_table(task, task.generate(split, [index], record["seed"])).to_pylist()[0]


def _make_tasks(arguments: BuildArguments) -> dict[str, Task]:
    """The tasks by config name."""
    require(len(set(arguments.tasks)) == len(arguments.tasks), "tasks", arguments.tasks, "without repetition")
    require(arguments.processes >= 1, "processes", arguments.processes, "at least 1")
    tasks = {name: get_task(name) for name in arguments.tasks}
    for path in arguments.grammars:
        grammar = Grammar.read(path)
        tasks[f"lano-{Path(path).stem}"] = Lano(LanoConfig(grammar.shortest, grammar.longest, grammar.longest, grammar))
    return tasks


def _plan(tasks: dict[str, Task], arguments: BuildArguments) -> dict[str, Any]:
    """What is to be built, as `generation.json` has it. Refuses more rows than there are instances."""
    require(arguments.rows >= 1, "rows", arguments.rows, "at least 1")
    require(arguments.eval_rows >= 1, "eval_rows", arguments.eval_rows, "at least 1")
    configs = {}
    for name, task in tasks.items():
        splits = {}
        for split in SPLITS:
            if split == "extrapolation" and task.config.extrapolation_size == task.config.max_size:
                continue
            rows = arguments.rows if split == "train" else arguments.eval_rows
            existing = task.num_instances(split)
            if existing is not None and existing < rows:
                field_name = "rows" if split == "train" else "eval_rows"
                require(False, field_name, rows, f"at most {existing}: {name} has no more instances for {split}")
            splits[split] = {"rows": rows}
        configs[name] = {"task": task.name, "settings": task.settings(), "splits": splits}
    return json.loads(json.dumps({"seed": arguments.seed, "configs": configs}))


def _is_finished(out: Path, record: dict[str, Any]) -> bool:
    """Whether `out` holds just this build. Refuses a folder that holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    built = json.loads((out / RECORD).read_text()) if (out / RECORD).is_file() else {}
    for config in built.get("configs", {}).values():
        for entry in config["splits"].values():
            entry.pop("skipped"), entry.pop("duplicates")
    require(built == record, "out", str(out), "a new or empty folder: this one holds something else")
    return True


def _open_partial(out: Path, record: dict[str, Any]) -> Path:
    """The folder of an unfinished build with the same plan, or a new one."""
    partial = out.with_name(f"{out.name}.partial")
    plan = partial / "plan.json"
    if partial.exists():
        known = json.loads(plan.read_text()) if plan.is_file() else None
        allowed = f"resumed with the arguments that it was begun with, or begun anew: then delete {partial}"
        require(known == record, "out", str(out), allowed)
        return partial
    partial.mkdir(parents=True)
    _write_text(plan, json.dumps(record))
    return partial


def _choose_indices(task: Task, split: str, seed: int, rows: int) -> tuple[np.ndarray, list[int]]:
    """(the indices of the rows, the indices skipped because their instance had come before). `train` skips none."""
    if split == "train":
        return np.arange(rows, dtype=np.int64), []
    seen: set[int] = set()
    chosen: list[int] = []
    skipped: list[int] = []
    chunk = max(256, min(rows, 4096))
    for start in range(0, _DRAWS_PER_ROW * rows + 10 * chunk, chunk):
        indices = np.arange(start, start + chunk)
        instances = task.generate(split, indices, seed).instance
        for index, instance in zip(indices.tolist(), instances.tolist(), strict=True):
            if len(chosen) == rows:
                return np.array(chosen, dtype=np.int64), skipped
            (skipped if instance in seen else chosen).append(index)
            seen.add(instance)
    raise ValueError(
        f"`eval_rows` is {rows}, but {split} of {task.name} ({task.settings()}) has hardly more than {len(chosen)} "
        "different instances; ask for fewer rows, or allow larger sizes."
    )


def _split_into_shards(task: Task, split: str, seed: int, indices: np.ndarray, folder: Path) -> Iterator[Shard]:
    count = -(-len(indices) // _ROWS_PER_SHARD)
    for number in range(count):
        part = indices[number * _ROWS_PER_SHARD : (number + 1) * _ROWS_PER_SHARD]
        yield Shard(task, split, seed, part, folder / f"{split}-{number:05d}-of-{count:05d}.parquet")


def _write_shards(shards: list[Shard], processes: int, progress: Any) -> None:
    """Writes those that are not there yet, in parallel."""
    missing = [shard for shard in shards if not (shard.path.exists() and _instances_path(shard.path).exists())]
    progress.update(sum(len(shard.indices) for shard in shards) - sum(len(shard.indices) for shard in missing))
    if processes == 1:
        for shard in missing:
            _write_shard(shard)
            progress.update(len(shard.indices))
        return
    with ProcessPoolExecutor(min(processes, max(1, len(missing)))) as pool:
        waiting = {pool.submit(_write_shard, shard): shard for shard in missing}
        try:
            for done in as_completed(waiting):
                done.result()
                progress.update(len(waiting[done].indices))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_shard(shard: Shard) -> None:
    """Writes one Parquet file, whole or not at all, and beside it the hashes of its instances."""
    shard.path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = shard.path.with_suffix(".unfinished")
    instances = []
    try:
        with pyarrow.parquet.ParquetWriter(unfinished, make_features(shard.task).arrow_schema) as writer:
            for start in range(0, len(shard.indices), _ROWS_PER_GROUP):
                batch = shard.task.generate(shard.split, shard.indices[start : start + _ROWS_PER_GROUP], shard.seed)
                instances.append(batch.instance)
                writer.write_table(make_table(shard.task, batch))
        np.save(_instances_path(shard.path), np.concatenate(instances))
        os.replace(unfinished, shard.path)
    finally:
        unfinished.unlink(missing_ok=True)


def _instances_path(shard: Path) -> Path:
    return shard.with_suffix(".instances.npy")


def _count_duplicates(folder: Path, split: str, rows: int) -> int:
    """How many rows hold an instance that an earlier row holds. One part of all hashes is in memory at a time."""
    files = sorted(folder.glob(f"{split}-*.instances.npy"))
    parts = -(-rows // 1_000_000)
    distinct = 0
    for part in range(parts):
        hashes = [np.load(file, mmap_mode="r") for file in files]
        distinct += len(np.unique(np.concatenate([own[own % np.uint64(parts) == part] for own in hashes])))
    return rows - distinct


def _finish(partial: Path, out: Path, tasks: dict[str, Task], record: dict[str, Any]) -> None:
    """Writes what belongs to the whole, and puts the folder in its place."""
    make_tokenizer().save_pretrained(partial)
    write_card(partial, tasks, record)
    _write_text(partial / RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")
    for file in [*partial.rglob("*.instances.npy"), partial / "plan.json"]:
        file.unlink(missing_ok=True)
    files = sorted(file for file in partial.rglob("*") if file.is_file() and file.name != CHECKSUMS)
    lines = [f"{_checksum(file)}  {file.relative_to(partial).as_posix()}\n" for file in files]
    _write_text(partial / CHECKSUMS, "".join(lines))
    if out.exists():
        out.rmdir()
    shutil.move(partial, out)


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _write_text(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def main() -> None:
    """Builds as the command line says; bad arguments and a full disk end in one sentence."""
    parser = HfArgumentParser(BuildArguments)  # type: ignore[arg-type]
    (arguments,) = parser.parse_args_into_dataclasses()
    try:
        out = build(arguments)
    except ValueError as error:
        sys.exit(f"build.py: {error}")
    except OSError as error:
        sys.exit(
            f"build.py: cannot write {error.filename or 'to ' + arguments.out}: {error.strerror or error}. "
            f"What is finished is kept in {arguments.out}.partial; the same command goes on from there."
        )
    except KeyboardInterrupt:
        sys.exit("build.py: stopped. The same command goes on from there.")
    print(f"Wrote {out}")


if __name__ == "__main__":
    main()
