"""Fresh examples for ever, shared out among processes and dataloader workers."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from datasets_scripts.columns import COLUMNS, check_columns, make_rows
from datasets_scripts.registry import get_task
from datasets_scripts.task import Task, require

# Examples are drawn so many at a time.
_CHUNK = 256


class TaskStream(IterableDataset):
    """An endless dataset. Of all its readers (processes x workers), reader r of R gets examples r, r + R, r + 2R, ...

    Every pass begins at the start, or once where a state was loaded. `state_dict()` and `load_state_dict()` say and set
    where this copy stands, at no cost however far it has come; with workers, torchdata's `StatefulDataLoader` gathers
    and restores those of all workers.
    """

    def __init__(
        self, task: Task, split: str, seed: int, columns: Sequence[str], process: int | None, num_processes: int | None
    ) -> None:
        super().__init__()
        self.task, self.split, self.seed, self.columns = task, split, seed, tuple(columns)
        self.process, self.num_processes = process, num_processes
        self._loaded: dict[str, Any] | None = None
        self._state: dict[str, Any] = {"position": 0, "num_readers": None}

    def __getstate__(self) -> dict[str, Any]:
        """A worker that is spawned, and so gets a copy, knows nothing of this process's group: the copy does."""
        state = self.__dict__.copy()
        if self.process is None and _has_group():
            state["process"], state["num_processes"] = _find_process()
        return state

    def __iter__(self) -> Iterator[dict[str, Any]]:
        reader, num_readers = self._place()
        start, self._loaded = self._loaded or {"position": 0, "num_readers": None}, None
        if start["num_readers"] not in (None, num_readers):
            raise ValueError(
                f"The state is that of a stream with {start['num_readers']} readers (processes x workers), but there "
                f"are {num_readers} now: they would repeat examples. Resume with as many."
            )
        return self._read(start["position"], reader, num_readers)

    def _read(self, position: int, reader: int, num_readers: int) -> Iterator[dict[str, Any]]:
        while True:
            chunk = position - position % _CHUNK
            indices = (chunk + np.arange(_CHUNK, dtype=np.int64)) * num_readers + reader
            unread = indices[position - chunk :]
            for row in make_rows(self.task, self.task.generate(self.split, unread, self.seed), self.columns):
                position += 1
                self._state = {"position": position, "num_readers": num_readers}
                yield row

    def state_dict(self) -> dict[str, Any]:
        """How many examples the pass that was read last has given, and among how many readers."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next pass begin where `state` was taken."""
        require(state["position"] >= 0, "position", state["position"], "at least 0")
        self._loaded = self._state = dict(state)

    def _place(self) -> tuple[int, int]:
        """(number of this reader, number of readers)."""
        process, num_processes = self.process, self.num_processes
        if process is None or num_processes is None:
            process, num_processes = _find_process()
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        return process * num_workers + worker_id, num_processes * num_workers


def stream(
    task: str | Task,
    split: str = "train",
    seed: int = 0,
    columns: Sequence[str] = tuple(COLUMNS),
    process: int | None = None,
    num_processes: int | None = None,
) -> TaskStream:
    """Endless examples of a task, as rows of its dataset.

    No instance of a stream is in another split, whatever the seed, since an instance decides its split. Within a split
    instances can come again; `build.py` writes evaluation splits in which they do not.

    Args:
        task: Name of a preset, such as "mano-mini", or a task of your own.
        split: "train", "validation", "test" or "extrapolation".
        seed: Another one, other examples.
        columns: Which columns rows have: those of the dataset, and "input_ids". It is faster to leave out the others.
        process: Number of this process, if not to be read from torch.distributed or RANK and WORLD_SIZE.
        num_processes: How many processes share the stream.
    """
    found = get_task(task) if isinstance(task, str) else task
    check_columns(columns)
    found.config.size_range(split)
    require((process is None) == (num_processes is None), "num_processes", num_processes, "given if `process` is")
    if process is not None and num_processes is not None:
        require(0 <= process < num_processes, "process", process, f"0 to {num_processes - 1}")
    return TaskStream(found, split, seed, columns, process, num_processes)


def _has_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _find_process() -> tuple[int, int]:
    """(number of this process, number of processes), as torch.distributed or its launcher's environment has them."""
    if _has_group():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
