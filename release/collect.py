"""Takes finished runs over into checkpoints/, without their code: in a clone it is there, on the Hub it is added.

    python release/collect.py build/mini/brevo-mini-online build/mini/brevo-mini-early

A run is a folder as release/experiments.py leaves it: `model/`, `recipe.json`, `log.jsonl`, `evaluation/metrics.json`.
"""

import dataclasses
import filecmp
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from cards import FILES, make_card, read_checkpoint
from pages import parse_folders_first
from repos import NOBODY, ReleaseError, whole

from datasets_scripts.files import write_whole

# Where in a run a file of a checkpoint stands, if not in `model/`.
_PLACES = {"recipe.json": "", "log.jsonl": "", "metrics.json": "evaluation"}


@dataclass
class CollectArguments:
    """Take finished runs over into checkpoints/."""

    runs: list[str] = field(metadata={"help": "Folders of runs; a checkpoint is named as its run."})
    out: str = field(default="checkpoints", metadata={"help": "Folder of the checkpoints."})
    replace: bool = field(default=False, metadata={"help": "Whether to replace checkpoints of the same names."})


def collect(run: Path, out: Path, replace: bool = False) -> Path:
    """Writes the checkpoint of a run, and returns its folder.

    Raises a ReleaseError if the run is not finished, or if it has taken its name from a checkpoint of other weights.
    """
    paths = [Path(_PLACES.get(name, "model")) / name for name in FILES]
    missing = [str(path) for path in paths if not (run / path).is_file()]
    if missing:
        raise ReleaseError(
            f"The run {run} lacks {', '.join(missing)}: let it finish, and evaluate it with "
            f"`evaluate/run.py --model {run / 'model'} --out {run / 'evaluation'} ...`."
        )
    weights = out / run.name / "model.safetensors"
    if weights.is_file() and not replace and not filecmp.cmp(weights, run / "model" / weights.name, shallow=False):
        raise ReleaseError(f"{weights.parent} holds other weights than {run}: rename the run, or say --replace.")
    with whole(out / run.name, "model") as folder:
        for path in paths:
            shutil.copyfile(run / path, folder / path.name)
        config = json.loads((folder / "config.json").read_text())
        # It would lead to code that is not beside it.
        config.pop("auto_map", None)
        write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")
        checkpoint = dataclasses.replace(read_checkpoint(folder), name=run.name)
        write_whole(folder / "README.md", make_card(checkpoint, NOBODY))
    return out / run.name


def main() -> None:
    """Takes over what the command line names. What the user can mend ends in one sentence."""
    parsed = parse_folders_first(CollectArguments, "--runs")
    try:
        for run in map(Path, parsed.runs):
            print(f"Wrote {collect(run, Path(parsed.out), parsed.replace)}")
    except (ReleaseError, OSError) as error:
        sys.exit(f"collect.py: {error}")


if __name__ == "__main__":
    main()
