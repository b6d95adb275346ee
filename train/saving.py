"""Checkpoints of a run: whole or not at all, the last few kept."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from recipe import RecipeError
from safetensors import SafetensorError

_PROGRESS = "progress.json"


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Makes an OSError that names `what` of every error for which a disk that is full may be the reason."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # safetensors and torch have errors of their own for it.
        raise OSError(f"{what} cannot be written: {error}") from error


def save_checkpoint(accelerator: Accelerator, folder: Path, step: int, progress: dict[str, Any], keep: int) -> Path:
    """Writes `folder`/step-NNN with everything that `load_checkpoint` needs, then drops all but the last `keep`.

    It is written beside its place and renamed when whole, so that a kill or a full disk leaves the older ones.
    """
    path = folder / f"step-{step:08d}"
    unfinished = path.with_suffix(".unfinished")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        with writing(f"the checkpoint {path.name}"):
            accelerator.save_state(str(unfinished))
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (unfinished / _PROGRESS).write_text(json.dumps({"step": step, **progress}))
        _flush(unfinished)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(unfinished, path)
        kept = list_checkpoints(folder)[-keep:]
        # Among the rest are those of which a kill left half, while they were written or removed.
        for old in folder.glob("step-*"):
            if old not in kept:
                shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints, oldest first."""
    return sorted(
        path for path in folder.glob("step-*") if path.suffix != ".unfinished" and (path / _PROGRESS).exists()
    )


def read_progress(path: Path) -> dict[str, Any]:
    """What was saved besides the state of model and optimiser: `step` and whatever the caller gave."""
    return json.loads((path / _PROGRESS).read_text())


def load_checkpoint(accelerator: Accelerator, path: Path) -> dict[str, Any]:
    """Sets model, optimiser and random state to those of a checkpoint, and returns its progress."""
    progress = read_progress(path)
    found = progress.get("processes")
    if found != accelerator.num_processes:
        raise RecipeError(
            f"The checkpoint {path} is that of {found} processes, but there are {accelerator.num_processes}; "
            "resume with as many."
        )
    accelerator.load_state(str(path))
    return progress


def _flush(folder: Path) -> None:
    """Asks the system to put the files on the disk, so that the rename cannot come before them."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
