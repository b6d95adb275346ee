"""Writes the tasks as a dataset repo: `load_dataset(DIR, "mano-mini", split="train")`, streaming too, without network.

    python datasets_scripts/build.py --out build/tasks --tasks mano-mini brevo-mini

The folder holds Parquet files by config and split, a card, the tokenizer, checksums, and `generation.json`, from which
any row can be made again. It appears when it is whole: until then all is in a folder beside it, `DIR.partial`, from
which the same command goes on if it was stopped. The same arguments and versions of the libraries give the same bytes.
"""

import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from tqdm import tqdm

from datasets_scripts.card import make_card
from datasets_scripts.columns import make_features, make_table
from datasets_scripts.files import write_whole
from datasets_scripts.grammar import Grammar
from datasets_scripts.lano import Lano, LanoConfig
from datasets_scripts.options import parse_options
from datasets_scripts.randomness import SPLITS, hundredths
from datasets_scripts.registry import PRESETS, TASKS, get_task
from datasets_scripts.task import Task, require
from datasets_scripts.tokenizer import make_tokenizer

RECORD = "generation.json"
CHECKSUMS = "SHA256SUMS"

# Of the generators: another number where the same settings, seed and index give another example.
DATA_VERSION = 1

_ROWS_PER_SHARD = 20_000
_ROWS_PER_GROUP = 1_000
# An evaluation split gives up after so many draws a row: then it has fewer instances than rows were asked for.
_DRAWS_PER_ROW = 50


@dataclass
class BuildArguments:
    """Write the tasks as a dataset repo."""

    out: str = field(metadata={"help": "Folder to write. It must not exist yet, or be empty."})
    tasks: list[str] | None = field(
        default=None, metadata={"help": f"Presets to write; all, unless there are --grammars. {', '.join(PRESETS)}."}
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
    """A Parquet file: the examples `indices` of a split, in this order; and a file of its instances' hashes."""

    task: Task
    split: str
    seed: int
    indices: np.ndarray
    path: Path
    hashes: Path


def build(arguments: BuildArguments) -> Path:
    """Writes the dataset repo, and returns its folder. Raises a ValueError for what cannot be built, before writing.

    All is written to `OUT.partial/repo`, and renamed to `OUT` when whole. `OUT.partial/plan.json` says what is being
    built, so that only the same build goes on there.
    """
    out = Path(arguments.out).resolve()
    partial = out.with_name(f"{out.name}.partial")
    tasks = _make_tasks(arguments)
    record, indices = _plan(tasks, arguments)
    if _is_finished(out, record):
        shutil.rmtree(partial, ignore_errors=True)
        print(f"{out} is already complete.")
        return out
    repo = _open_partial(partial, record)
    shards = [
        shard
        for (name, split), own in indices.items()
        for shard in _split_into_shards(tasks[name], split, arguments.seed, own, repo / name, partial / "hashes" / name)
    ]
    with tqdm(total=sum(map(len, indices.values())), unit="row", unit_scale=True, file=sys.stderr) as progress:
        _write_shards(shards, arguments.processes, progress)
    for (name, split), own in indices.items():
        files = [shard.hashes for shard in shards if shard.path.parent.name == name and shard.split == split]
        record["configs"][name]["splits"][split]["duplicates"] = _count_duplicates(files, len(own))
    finish(repo, tasks, record)
    if out.exists():
        out.rmdir()
    repo.rename(out)
    shutil.rmtree(partial)
    return out


def remake_row(folder: str | Path, config: str, split: str, row: int) -> dict[str, Any]:
    """Makes a row of a built dataset again, from what its `generation.json` says."""
    record = json.loads((Path(folder) / RECORD).read_text())
    require(
        record["data_version"] == DATA_VERSION, "data_version", record["data_version"], f"{DATA_VERSION}, this code's"
    )
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
    require(arguments.processes >= 1, "processes", arguments.processes, "at least 1")
    names = (list(PRESETS) if not arguments.grammars else []) if arguments.tasks is None else arguments.tasks
    require(len(set(names)) == len(names), "tasks", names, "without repetition")
    tasks = {name: get_task(name) for name in names}
    for path in arguments.grammars:
        grammar, name = Grammar.read(path), f"lano-{Path(path).stem}"
        require(
            name not in tasks and name not in PRESETS, "grammars", path, f"named otherwise: {name} is another config"
        )
        tasks[name] = Lano(LanoConfig(grammar.shortest, grammar.longest, grammar.longest, grammar))
    require(bool(tasks), "tasks", names, "at least one")
    return tasks


def _plan(
    tasks: dict[str, Task], arguments: BuildArguments
) -> tuple[dict[str, Any], dict[tuple[str, str], np.ndarray]]:
    """(what is to be built, as `generation.json` has it; the indices of the rows of every config and split)."""
    require(arguments.rows >= 1, "rows", arguments.rows, "at least 1")
    require(arguments.eval_rows >= 1, "eval_rows", arguments.eval_rows, "at least 1")
    configs: dict[str, Any] = {}
    indices: dict[tuple[str, str], np.ndarray] = {}
    for name, task in tasks.items():
        splits = {}
        for split in SPLITS:
            if split == "extrapolation" and task.config.extrapolation_size == task.config.max_size:
                continue
            field_name = "rows" if split == "train" else "eval_rows"
            rows = getattr(arguments, field_name)
            first, last = hundredths(split)
            existing = task.num_instances(split)
            if existing is not None and existing * (last - first) / 100 < rows:
                existing = round(existing * (last - first) / 100)
                require(False, field_name, rows, f"at most about {existing}: {name} has no more instances for {split}")
            indices[name, split], skipped, rarest = _choose_indices(name, task, split, arguments.seed, rows)
            splits[split] = {"rows": rows, "skipped": skipped, "rarest_size": rarest}
        # Compiled here, before processes fork and would each compile it again.
        make_table(task, task.generate("train", [0], arguments.seed))
        configs[name] = {"task": task.name, "settings": task.settings(), "splits": splits}
    record = {"data_version": DATA_VERSION, "seed": arguments.seed, "versions": _versions(), "configs": configs}
    return json.loads(json.dumps(record)), indices


def _versions() -> dict[str, str]:
    """What the bytes of the files depend on besides this code."""
    return {name: importlib.metadata.version(name) for name in ("datasets", "numba", "numpy", "pyarrow")}


def _is_finished(out: Path, record: dict[str, Any]) -> bool:
    """Whether `out` holds just this build. Refuses a folder that holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    built = json.loads((out / RECORD).read_text()) if (out / RECORD).is_file() else {}
    for config in built.get("configs", {}).values():
        for entry in config["splits"].values():
            entry.pop("duplicates")
    same = all(built.get(part) == record[part] for part in ("data_version", "seed", "configs"))
    require(same, "out", str(out), "a new or empty folder: this one holds something else")
    return True


def _open_partial(partial: Path, record: dict[str, Any]) -> Path:
    """The folder of the unfinished repo: that of a build with the same plan, or a new one."""
    plan, repo = partial / "plan.json", partial / "repo"
    wanted = {"rows_per_shard": _ROWS_PER_SHARD, "rows_per_group": _ROWS_PER_GROUP, **record}
    if partial.exists() and not plan.exists():
        strangers = [file.name for file in partial.iterdir() if file.suffix != ".unfinished"]
        require(not strangers, "out", str(partial), f"free: it holds {strangers[:3]}, which no build has left there")
    elif partial.exists():
        allowed = "that of a build with the same arguments and library versions; delete it to begin anew"
        require(json.loads(plan.read_text()) == wanted, "out", str(partial), allowed)
    partial.mkdir(parents=True, exist_ok=True)
    write_whole(plan, json.dumps(wanted))
    repo.mkdir(exist_ok=True)
    for file in partial.rglob("*.unfinished"):
        file.unlink(missing_ok=True)
    return repo


def _choose_indices(
    name: str, task: Task, split: str, seed: int, rows: int
) -> tuple[np.ndarray, list[int], tuple[int, int] | None]:
    """(the indices of the rows, those skipped because their instance had come before, the rarest size and its rows).

    `train` skips none, and its sizes are not counted.
    """
    if split == "train":
        return np.arange(rows, dtype=np.int64), [], None
    seen: set[int] = set()
    chosen: list[int] = []
    skipped: list[int] = []
    sizes: Counter[int] = Counter()
    chunk = max(256, min(rows, 4096))
    for start in range(0, _DRAWS_PER_ROW * rows + 10 * chunk, chunk):
        batch = task.generate(split, np.arange(start, start + chunk), seed)
        for place, (instance, size) in enumerate(zip(batch.instance.tolist(), batch.size.tolist(), strict=True)):
            if len(chosen) == rows:
                rarest, count = min(sizes.items(), key=lambda item: (item[1], item[0]))
                return np.array(chosen, dtype=np.int64), skipped, (rarest, count)
            (skipped if instance in seen else chosen).append(start + place)
            sizes[size] += instance not in seen
            seen.add(instance)
    raise ValueError(
        f"`eval_rows` is {rows}, but {split} of {name} has hardly more than {len(chosen)} different instances; "
        "ask for fewer rows, or allow larger sizes."
    )


def _split_into_shards(
    task: Task, split: str, seed: int, indices: np.ndarray, folder: Path, hashes: Path
) -> Iterator[Shard]:
    count = -(-len(indices) // _ROWS_PER_SHARD)
    for number in range(count):
        part = indices[number * _ROWS_PER_SHARD : (number + 1) * _ROWS_PER_SHARD]
        name = f"{split}-{number:05d}-of-{count:05d}"
        yield Shard(task, split, seed, part, folder / f"{name}.parquet", hashes / f"{name}.npy")


def _write_shards(shards: list[Shard], processes: int, progress: Any) -> None:
    """Writes those that are not there yet, in parallel."""
    missing = [shard for shard in shards if not shard.path.exists()]
    progress.update(sum(len(shard.indices) for shard in shards) - sum(len(shard.indices) for shard in missing))
    if processes == 1 or len(missing) <= 1:
        for shard in missing:
            _write_shard(shard)
            progress.update(len(shard.indices))
        return
    with ProcessPoolExecutor(min(processes, len(missing)), initializer=_end_with_parent) as pool:
        waiting = {pool.submit(_write_shard, shard): shard for shard in missing}
        try:
            for done in as_completed(waiting):
                done.result()
                progress.update(len(waiting[done].indices))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Ends this process soon after its parent was killed, also while it waits for work, which would never come.

    Until then it disturbs nobody, as unfinished files have names of their own.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None  # it is a worker

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_shard(shard: Shard) -> None:
    """Writes the hashes, then the Parquet file, whole or not at all."""
    unfinished = shard.path.with_suffix(f".{os.getpid()}.unfinished")
    hashes = []
    for folder in (shard.path.parent, shard.hashes.parent):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with pyarrow.parquet.ParquetWriter(unfinished, make_features(shard.task).arrow_schema) as writer:
            for start in range(0, len(shard.indices), _ROWS_PER_GROUP):
                batch = shard.task.generate(shard.split, shard.indices[start : start + _ROWS_PER_GROUP], shard.seed)
                hashes.append(batch.instance)
                writer.write_table(make_table(shard.task, batch))
        np.save(shard.hashes, np.concatenate(hashes))
        os.replace(unfinished, shard.path)
    finally:
        unfinished.unlink(missing_ok=True)


def _count_duplicates(files: list[Path], rows: int) -> int:
    """How many rows hold an instance that an earlier row holds. One part of all hashes is in memory at a time."""
    parts = -(-rows // 1_000_000)
    distinct = 0
    for part in range(parts):
        hashes = [own[own % np.uint64(parts) == part] for own in map(np.load, files)]
        distinct += len(np.unique(np.concatenate(hashes)))
    return rows - distinct


def finish(repo: Path, tasks: dict[str, Task], record: dict[str, Any], loaded_by: str = "path/to/this/folder") -> None:
    """Writes what belongs to the whole: tokenizer, card, record, checksums. `loaded_by`: what the card says to load."""
    make_tokenizer().save_pretrained(repo)
    write_whole(repo / "README.md", make_card(repo, tasks, record, loaded_by))
    write_whole(repo / RECORD, json.dumps(record, indent=1, sort_keys=True) + "\n")
    files = sorted(file for file in repo.rglob("*") if file.is_file() and file.name != CHECKSUMS)
    lines = [f"{_checksum(file)}  {file.relative_to(repo).as_posix()}\n" for file in files]
    write_whole(repo / CHECKSUMS, "".join(lines))


def _checksum(file: Path) -> str:
    checksum = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(2**20):
            checksum.update(part)
    return checksum.hexdigest()


def main() -> None:
    """Builds as the command line says; bad arguments and a full disk end in one sentence."""
    (arguments,) = parse_options(BuildArguments)
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
