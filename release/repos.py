"""Folders that are Hub repos: of which kind they are, and how they are written whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

# A metric is a Space: `evaluate.load("owner/name")` reads HF_ENDPOINT/spaces/owner/name/resolve/REVISION/name.py, and
# the modules that it imports from beside it (evaluate 0.4.6, `HUB_EVALUATE_URL`). No other kind of repo is looked at.
Kind = Literal["model", "dataset", "space"]

DATASET = "anira-tasks"

# Stands for the account in cards that belong to none yet.
NOBODY = "OWNER"


class ReleaseError(ValueError):
    """Something that the user can mend."""


def kind_of(folder: Path) -> Kind | None:
    """What a folder is to the libraries that load it, by the file that they look for; None if it is no repo."""
    marks: dict[Kind, str] = {"model": "config.json", "dataset": "generation.json", "space": f"{folder.name}.py"}
    return next((kind for kind in get_args(Kind) if (folder / marks[kind]).is_file()), None)


def list_files(folder: Path) -> list[Path]:
    """The files of a repo, relative to its folder, sorted."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


@contextmanager
def whole(folder: Path, kind: Kind) -> Iterator[Path]:
    """A new folder to write a repo to, which takes the place of `folder` when the block ends without an error.

    Refuses a `folder` that holds anything but a repo of this kind.
    """
    if folder.exists() and kind_of(folder) != kind:
        raise ReleaseError(f"{folder} would be replaced, but holds no {kind} repo; choose another --out.")
    unfinished, replaced = (folder.with_name(f".{folder.name}.{state}") for state in ("unfinished", "replaced"))
    for left in (unfinished, replaced):
        shutil.rmtree(left, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        # Removing takes a while, renaming does not: a kill leaves the old repo, or none, or the new one.
        if folder.exists():
            folder.rename(replaced)
        unfinished.rename(folder)
    finally:
        for left in (unfinished, replaced):
            shutil.rmtree(left, ignore_errors=True)
