"""Assembles the Hub repos, as they will be uploaded: a model per checkpoint, the dataset, and the metrics.

    python release/assemble.py --out build/hub --owner NAME

A model repo `anira-CHECKPOINT` has weights as safetensors, the model's code, the tokenizer, the log of the training,
the evaluation, and a card made from these. Each repo is written whole or not at all; the same command writes it anew.
"""

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cards import FILES, make_card, read_checkpoint
from repos import DATASET, NOBODY, ReleaseError, whole

from datasets_scripts import TASKS
from datasets_scripts.build import RECORD, finish
from datasets_scripts.files import write_whole
from datasets_scripts.options import parse_options
from modeling_anira import AniraForCausalLM

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class AssembleArguments:
    """Assemble the Hub repos."""

    out: str = field(default="build/hub", metadata={"help": "Folder in which each repo gets a folder."})
    checkpoints: list[str] = field(
        default_factory=list, metadata={"help": "Folders of checkpoints; all in checkpoints/ by default."}
    )
    dataset: str = field(default="build/tasks", metadata={"help": "Folder that datasets_scripts/build.py wrote."})
    owner: str = field(default=NOBODY, metadata={"help": "Account on the Hub that the links in the cards lead to."})


def assemble(arguments: AssembleArguments) -> list[Path]:
    """Writes all repos, and returns their folders. Raises a ReleaseError before writing if something is missing."""
    out, owner, dataset = Path(arguments.out), arguments.owner, Path(arguments.dataset)
    found = sorted(path.parent for path in (ROOT / "checkpoints").glob("*/config.json"))
    checkpoints = [Path(folder) for folder in arguments.checkpoints] or found
    if not checkpoints:
        raise ReleaseError("There is no checkpoint in checkpoints/; name folders with --checkpoints.")
    tasks = {read_checkpoint(checkpoint).metrics["config"] for checkpoint in checkpoints}
    if not (dataset / RECORD).is_file():
        raise ReleaseError(
            f"`dataset` is {dataset}, which is no built dataset; "
            f"`python datasets_scripts/build.py --out {dataset}` writes it."
        )
    missing = sorted(tasks - json.loads((dataset / RECORD).read_text())["configs"].keys())
    if missing:
        raise ReleaseError(
            f"`dataset` is {dataset}, which lacks {', '.join(missing)}, on which checkpoints were evaluated; build one "
            "of all tasks in another folder."
        )
    metrics = sorted(path.parent for path in (ROOT / "evaluate" / "metrics").glob("*/README.md"))
    return [
        *(assemble_model(checkpoint, out, owner) for checkpoint in checkpoints),
        assemble_dataset(dataset, out, owner),
        *(assemble_metric(metric, out, owner) for metric in metrics),
    ]


def assemble_model(checkpoint: Path, out: Path, owner: str) -> Path:
    """Writes the repo of a checkpoint, and returns its folder."""
    found = read_checkpoint(checkpoint)
    with whole(out / found.repo, "model") as folder:
        # Loaded rather than copied: so weights fit the config, no pickle is read, and saving adds code and auto_map.
        loaded: Any = AniraForCausalLM.from_pretrained(checkpoint, use_safetensors=True, output_loading_info=True)
        model, report = loaded
        wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
        if wrong:
            raise ReleaseError(f"The weights of {checkpoint} do not fit its config: {wrong}.")
        model.save_pretrained(folder)
        for name in FILES:
            if not (folder / name).exists():  # else saving wrote it
                shutil.copyfile(checkpoint / name, folder / name)
        shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
        write_whole(folder / "README.md", make_card(found, owner))
    return out / found.repo


def assemble_dataset(dataset: Path, out: Path, owner: str) -> Path:
    """Writes the repo of a built dataset, whose card then names the repo, and returns its folder."""
    with whole(out / DATASET, "dataset") as folder:
        shutil.copytree(dataset, folder, dirs_exist_ok=True)
        record = json.loads((folder / RECORD).read_text())
        tasks = {name: TASKS[own["task"]].from_settings(own["settings"]) for name, own in record["configs"].items()}
        finish(folder, tasks, record, f"{owner}/{DATASET}")
    return out / DATASET


def assemble_metric(metric: Path, out: Path, owner: str) -> Path:
    """Writes the repo of a metric, whose texts then name the repo, and returns its folder."""
    with whole(out / metric.name, "space") as folder:
        for path in [*metric.glob("*.py"), metric / "README.md"]:
            text = path.read_text().replace(f"evaluate/metrics/{metric.name}", f"{owner}/{metric.name}")
            write_whole(folder / path.name, text)
    return out / metric.name


def main() -> None:
    """Assembles as the command line says. What the user can mend ends in one sentence."""
    (arguments,) = parse_options(AssembleArguments)
    try:
        for folder in assemble(arguments):
            print(f"Wrote {folder}")
    except ReleaseError as error:
        sys.exit(f"assemble.py: {error}")
    except OSError as error:
        sys.exit(f"assemble.py: {error}. What is finished is whole; the same command writes the rest.")


if __name__ == "__main__":
    main()
