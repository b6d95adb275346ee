"""Trains and evaluates the runs of a plan, several side by side; what is finished is not done again.

    python release/experiments.py --plan release/mini.yaml --out build/mini

A plan is a YAML file of runs: `NAME: {recipe: train/recipes/R.yaml, set: [seed=1], evaluate: [--rows, "500"]}`, where
`set` changes settings of the recipe and `evaluate` has options of the evaluation. Each run has a folder OUT/NAME as
`train/pretrain.py` writes it, with `evaluation/` as `evaluate/run.py` does. A run that was stopped goes on from its
last checkpoint; one whose recipe has changed since is refused.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "train"))

import yaml
from names import choose
from recipe import RecipeError, list_differences, read_kept, read_recipe
from tqdm import tqdm

from datasets_scripts.options import parse_options

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class PlanArguments:
    """Train and evaluate what a plan lists."""

    plan: str = field(metadata={"help": "The plan, a YAML file."})
    out: str = field(metadata={"help": "Folder of the runs."})
    dataset: str = field(default="build/tasks", metadata={"help": "A dataset that build.py wrote, to evaluate on."})
    jobs: int = field(default=2, metadata={"help": "Runs side by side; each has an equal share of the cores."})
    only: str = field(default="", metadata={"help": "A regular expression; runs whose name lacks it are left out."})
    train: bool = field(default=True, metadata={"help": "Whether to train; else what is trained is evaluated."})
    evaluate: bool = field(default=True, metadata={"help": "Whether to evaluate."})


@dataclass(frozen=True)
class Planned:
    """One run of a plan."""

    name: str
    recipe: str
    set: list[str] = field(default_factory=list)
    evaluate: list[str] = field(default_factory=list)


class PlanError(ValueError):
    """A plan that cannot be run."""


def read_plan(path: Path, only: str = "") -> list[Planned]:
    """The runs of a plan, in its order. Raises a PlanError that names what is wrong."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PlanError(f"The plan {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise PlanError(f"The plan {path} must be a mapping of runs, NAME: {{recipe: ...}}.")
    runs = []
    for name, settings in content.items():
        known = settings if isinstance(settings, dict) else {}
        if set(known) - {"recipe", "set", "evaluate"} or "recipe" not in known:
            raise PlanError(
                f"The run {name} of {path} has {sorted(map(str, known))}, but must have recipe, and may have set and "
                "evaluate."
            )
        for part in ("set", "evaluate"):
            if not isinstance(settings.get(part, []), list):
                raise PlanError(f"`{part}` of the run {name} is {settings[part]!r}, but must be a list.")
        runs.append(Planned(str(name), **settings))
    chosen = choose((run.name for run in runs), only, PlanError)
    return [run for run in runs if run.name in chosen]


def carry_out(run: Planned, arguments: PlanArguments) -> str:
    """Trains and evaluates one run; what went wrong, or ""."""
    folder = Path(arguments.out) / run.name
    # Commands run in the clone, and what they were told goes into their records: no path of this machine.
    out, dataset = (os.path.relpath(path, ROOT) for path in (folder, arguments.dataset))
    if (folder / "recipe.json").exists():
        try:
            planned = read_recipe(ROOT / run.recipe, run.set).plain()
        except RecipeError as refusal:
            return f"{run.name}: training failed: {refusal}"
        if differing := list_differences(read_kept(folder / "recipe.json"), planned):
            return f"{run.name}: {out} holds a run with other settings: {differing}. Move it, or choose another --out."
    if arguments.train and not (folder / "model").exists():
        settings = ["--set", *run.set] if run.set else []
        command = ["train/pretrain.py", "--config", run.recipe, "--out", out, "--resume", *settings]
        if error := _call(command, folder / "train.txt", arguments.jobs):
            return f"{run.name}: training failed: {error}"
        if not (folder / "model").exists():  # a training that is told to stop ends well
            return f"{run.name}: training was stopped; the same command goes on from its checkpoint."
    trained, evaluated = (folder / "model").exists(), (folder / "evaluation" / "metrics.json").exists()
    if arguments.evaluate and trained and not evaluated:
        # The run's own record: a plan may have set another task than its recipe has.
        task = json.loads((folder / "recipe.json").read_text())["task"]
        command = ["evaluate/run.py", "--model", f"{out}/model", "--dataset", dataset, "--config", task]
        command += ["--out", f"{out}/evaluation", *run.evaluate]
        if error := _call(command, folder / "evaluate.txt", arguments.jobs):
            return f"{run.name}: evaluation failed: {error}"
    return ""


def _call(command: list[str], log: Path, jobs: int) -> str:
    """Runs a command of this repository on a share of the cores; the last line that it said if it failed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    # More threads than cores wait for one another by spinning, a hundred times as slow.
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    with log.open("a") as opened:
        before = opened.tell()
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": threads},
            stdout=opened,
            stderr=subprocess.STDOUT,
            check=False,
        )
    said = log.read_bytes()[before:].decode(errors="replace").splitlines() or ["nothing"]
    return "" if done.returncode == 0 else f"it ended with {done.returncode} and said last: {said[-1]} (all in {log})"


def main() -> None:
    """Carries out the plan; exits with what failed, after the rest is done."""
    (arguments,) = parse_options(PlanArguments)
    if arguments.jobs < 1:
        sys.exit(f"experiments.py: `jobs` is {arguments.jobs}, but must be at least 1.")
    try:
        runs = read_plan(Path(arguments.plan), arguments.only)
    except PlanError as error:
        sys.exit(f"experiments.py: {error}")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = pool.map(lambda run: carry_out(run, arguments), runs)
        failures = [error for error in tqdm(found, total=len(runs), unit="run") if error]
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
