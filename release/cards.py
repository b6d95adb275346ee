"""Writes the card of a checkpoint from what its run and its evaluation left there; no number in it is typed.

python release/cards.py checkpoints/NAME ...
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from repos import DATASET, NOBODY, ReleaseError
from safetensors.torch import load_file

from datasets_scripts import Task, get_task
from datasets_scripts.card import describe, find_readable
from datasets_scripts.files import write_whole
from datasets_scripts.vocabulary import decode

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "evaluate"))

from loading import digest_weights
from pages import parse_folders_first, render
from shares import Share, part_at, pool

PAPER = "2602.08864"

# A checkpoint's folder holds at least these.
FILES = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "log.jsonl",
    "recipe.json",
    "metrics.json",
)


@dataclass
class CardArguments:
    """Write the cards of checkpoints."""

    checkpoints: list[str] = field(metadata={"help": "Folders of checkpoints."})
    owner: str = field(default=NOBODY, metadata={"help": "Account on the Hub that the links lead to."})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's name, and what its files say of it."""

    name: str
    config: dict[str, Any]
    generation: dict[str, Any]
    recipe: dict[str, Any]
    metrics: dict[str, Any]

    @property
    def exits(self) -> dict[str, Any]:
        """Its settings by which tokens exit, among others: the generation config's word is before the config's."""
        return self.config | {name: value for name, value in self.generation.items() if value is not None}

    @property
    def repo(self) -> str:
        """Its repo's name on the Hub."""
        return f"anira-{self.name}"


@dataclass(frozen=True)
class Example:
    """A prompt of the task, and how long its answer can be."""

    prompt: str
    longest_answer: int


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises a ReleaseError that names what is missing or does not fit."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ReleaseError(f"The checkpoint {folder} lacks {', '.join(missing)}.")
    config, generation, recipe, metrics = (
        _read(folder / f"{name}.json") for name in ("config", "generation_config", "recipe", "metrics")
    )
    for name, evaluated, own in (
        ("config", metrics["config"], recipe["task"]),
        ("decider", metrics["decider"], config["decider"]),
        ("max_depth", metrics["max_depth"], config["max_depth"]),
    ):
        if evaluated != own:
            raise ReleaseError(
                f"`{name}` in {folder}/metrics.json is {evaluated!r}, but must be {own!r}, as this checkpoint's is."
            )
    if metrics.get("weights_digest") != digest_weights(load_file(folder / "model.safetensors")):
        raise ReleaseError(f"{folder}/metrics.json is of other weights than those beside it; evaluate these.")
    if "places" not in metrics["analyses"]:
        raise ReleaseError(
            f"{folder}/metrics.json is of an evaluation from before 2026-11-26: make its analyses again by "
            "`python evaluate/analyse.py`, and collect it anew."
        )
    found = Checkpoint(folder.resolve().name, config, generation, recipe, metrics)
    # Evaluations from before 2026-11-26 do not say by which rule tokens exited.
    for name, evaluated in metrics.get("exits", {}).items():
        own = found.exits.get(name, evaluated)
        if own != evaluated:
            raise ReleaseError(
                f"`{name}` in {folder}/metrics.json is {evaluated!r}, but {own!r} beside it; evaluate that."
            )
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ReleaseError(f"{path} is no JSON: {error}.") from error


def make_card(checkpoint: Checkpoint, owner: str) -> str:
    """The text of a checkpoint's README.md, with links to the repos of `owner`."""
    task = get_task(checkpoint.recipe["task"], **checkpoint.recipe["task_settings"])
    text = render(
        ROOT / "release" / "card.md.jinja",
        # A card that belongs to no account is read in a clone, where the checkpoint is a folder.
        in_clone=owner == NOBODY,
        repo=f"checkpoints/{checkpoint.name}" if owner == NOBODY else f"{owner}/{checkpoint.repo}",
        dataset=f"{owner}/{DATASET}",
        paper=PAPER,
        checkpoint=checkpoint,
        config=checkpoint.config,
        exits=checkpoint.exits,
        recipe=_flatten(checkpoint.recipe),
        metrics=checkpoint.metrics,
        analyses=checkpoint.metrics["analyses"],
        beyond=_pool_sizes(checkpoint.metrics),
        task=task,
        description=describe(task).strip(),
        settings={name: value for name, value in vars(task.config).items() if isinstance(value, int)},
        example=_find_example(task),
    )
    return f"---\n{_make_header(checkpoint, owner).to_yaml()}\n---\n{text}"


def _make_header(checkpoint: Checkpoint, owner: str) -> ModelCardData:
    """What the Hub reads of the card."""
    return ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["anira", "adaptive-computation", "recurrent-depth", "custom_code", f"arxiv:{PAPER}"],
        datasets=[f"{owner}/{DATASET}"],
        model_name=checkpoint.repo,
        eval_results=_list_results(checkpoint.metrics, f"{owner}/{DATASET}"),
    )


def _list_results(metrics: dict[str, Any], dataset: str) -> list[EvalResult]:
    """The results that the Hub shows: on the first split, and beyond the sizes of training if that was measured."""
    found = [
        ("accuracy", "Accuracy", metrics["splits"][0], metrics["accuracy"]["value"]),
        ("mean_depth", "Mean depth at answers", metrics["splits"][0], metrics["depth"]["value"]),
    ]
    beyond = metrics["analyses"]["generalization"].get("beyond", {})
    if "accuracy_beyond" in beyond and "kl" not in metrics["given"]:
        found.append(("accuracy", "Accuracy beyond training sizes", metrics["splits"][-1], beyond["accuracy_beyond"]))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=f"ANIRA tasks, {metrics['config']}",
            dataset_config=metrics["config"],
            dataset_split=split,
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for kind, name, split, value in found
    ]


def _pool_sizes(metrics: dict[str, Any]) -> dict[str, Share | float] | None:
    """Accuracy and depth up to the largest size of training and beyond; None if there is nothing beyond."""
    limit, found = metrics["size_limit"], metrics["analyses"]["generalization"]
    sizes = found.get("by_size", [])
    within, further = part_at(limit, sizes)
    largest = [row for row in sizes if row["size"] == limit]
    # Where answers are sampled, no prompt asks for a size, and what is long is what the model wrote.
    if not largest or not further or "kl" in metrics["given"]:
        return None
    depths = {name: found["beyond"][name] for name in ("depth_within", "depth_beyond")}
    return {"within": pool(within), "further": pool(further), "depth_largest": largest[0]["depth"], **depths}


def _flatten(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as name and value, "model.max_depth" for what is in a map."""
    flat: dict[str, Any] = {}
    for name, value in recipe.items():
        flat |= {f"{name}.{inner}": own for inner, own in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _find_example(task: Task) -> Example:
    """A short prompt of the validation split, which is never trained on; always the same."""
    batch = task.generate("validation", [find_readable(task)])
    prompt = decode(batch.tokens[: int(batch.answer_start[0])].tolist())
    return Example(prompt, task.longest_answer(int(batch.size[0])))


def main() -> None:
    """Writes the cards, and says where they are."""
    parsed = parse_folders_first(CardArguments, "--checkpoints")
    try:
        for folder in map(Path, parsed.checkpoints):
            write_whole(folder / "README.md", make_card(read_checkpoint(folder), parsed.owner))
            print(f"Wrote {folder / 'README.md'}")
    except (ReleaseError, OSError) as error:
        sys.exit(f"cards.py: {error}")


if __name__ == "__main__":
    main()
