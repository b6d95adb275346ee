"""Runs tasks of lm-eval (the extra `harness`) on a checkpoint, with mean depth beside their own figures.

    python evaluate/harness.py --model path/to/model --tasks arc_easy hellaswag --limit 200 --out build/harness

The model must have been trained on natural language: the released mini checkpoints know numbers and letters alone.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from examples import EvaluationError
from loading import load_model, load_tokenizer
from run import without_nan

from datasets_scripts.files import write_whole
from datasets_scripts.options import parse_options


@dataclass
class HarnessArguments:
    """Run lm-eval tasks on an ANIRA checkpoint."""

    model: str = field(
        metadata={"help": "Folder or Hub name of an ANIRA checkpoint, which runs with this clone's code."}
    )
    tasks: list[str] = field(metadata={"help": "Names of lm-eval tasks, groups or tags."})
    out: str = field(metadata={"help": "Folder for harness.json."})
    limit: int | None = field(default=None, metadata={"help": "Examples of each task; all by default."})
    include_path: str | None = field(default=None, metadata={"help": "Folder with task files of your own."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the model on the Hub."})
    seed: int = field(default=0, metadata={"help": "Of few-shot examples and sampling."})


class DepthCounter:
    """Mean number of iterations per token, over all forwards of a model since it was last read."""

    def __init__(self, model: Any) -> None:
        self._depths = self._tokens = 0
        model.register_forward_hook(self._observe)

    def read(self) -> float | None:
        """The mean; None if the model was not run. Begins anew."""
        mean = self._depths / self._tokens if self._tokens else None
        self._depths = self._tokens = 0
        return mean

    def _observe(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        depths = getattr(output, "exit_depths", None)
        if depths is not None:
            self._depths += int(depths.sum())
            self._tokens += int((depths > 0).sum())


def run_tasks(arguments: HarnessArguments) -> dict[str, Any]:
    """{task: {metric: value, "depth": mean}}, for a group or a tag with {"tasks": {task: metrics}}.

    `harness.json` is written after each, so that what fails takes nothing with it.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SystemExit(f"harness.py needs lm-eval: pip install lm-eval ({error})") from error
    tokenizer = load_tokenizer(arguments.model, arguments.revision)
    model = load_model(arguments.model, arguments.revision).to(Accelerator().device)
    counter = DepthCounter(model)
    # One at a time: lm-eval pads rows without saying where, and the padding's depths would be counted.
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    manager = TaskManager(include_path=arguments.include_path)
    unknown = [task for task in arguments.tasks if not manager.match_tasks([task])]
    if unknown:
        raise EvaluationError(
            f"`tasks` has {', '.join(unknown)}, which lm-eval does not know; `lm-eval ls tasks` does."
        )
    found: dict[str, Any] = {}
    for task in arguments.tasks:
        results = simple_evaluate(
            wrapped,
            tasks=[task],
            limit=arguments.limit,
            task_manager=manager,
            random_seed=arguments.seed,
            torch_random_seed=arguments.seed,
            fewshot_random_seed=arguments.seed,
            bootstrap_iters=0,
        )["results"]
        # A group may have figures of its own, a tag has none; both have those of their tasks.
        figures = {name: _numbers(own) for name, own in results.items()}
        parts = {name: own for name, own in figures.items() if name != task}
        found[task] = {
            **figures.get(task, {}),
            **({"tasks": parts} if parts else {}),
            "depth": counter.read(),
            "max_depth": model.config.max_depth,
        }
        _write(found, Path(arguments.out))
    return found


def _numbers(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if isinstance(value, int | float)}


def _write(found: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "harness.json", json.dumps(without_nan(found), indent=1))


def main() -> None:
    """Runs the tasks, and prints what harness.json holds."""
    (arguments,) = parse_options(HarnessArguments)
    try:
        found = run_tasks(arguments)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"harness.py: {error}")
    print(json.dumps(without_nan(found), indent=1))


if __name__ == "__main__":
    main()
