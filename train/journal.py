"""What a run tells: a progress bar, `log.jsonl`, and trackers."""

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from datasets_scripts.files import read_json_lines, write_whole


class Journal:
    """Writes on the main process alone. Every line of `log.jsonl` has `step` and `kind` ("train" or "evaluation")."""

    def __init__(self, accelerator: Accelerator, path: Path, first_step: int, steps: int, whole: bool) -> None:
        """Takes up the log of a run that stopped after `first_step`; of one that is `whole`, as it stands.

        What the run makes again is dropped: all beyond that step, and the evaluation there (`lacks_evaluation`), which
        may be half done.
        """
        self.accelerator, self.path = accelerator, path
        lacks_evaluation = [False]
        if accelerator.is_main_process:
            known = read_json_lines(path) if path.exists() else []
            again = {"evaluation"} if not whole else set()
            lines = [
                line
                for line in known
                if line["step"] < first_step or (line["step"] == first_step and line["kind"] not in again)
            ]
            lacks_evaluation = [any(line["step"] == first_step and line["kind"] in again for line in known)]
            write_whole(path, "".join(f"{json.dumps(line)}\n" for line in lines))
        # All processes share an evaluation: all must know of it.
        (self.lacks_evaluation,) = broadcast_object_list(lacks_evaluation)
        self.bar = tqdm(
            total=steps, initial=first_step, unit="step", file=sys.stderr, disable=not accelerator.is_main_process
        )

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Adds a line, and tells the trackers its numbers."""
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a") as log:
            log.write(f"{json.dumps({'step': step, 'kind': kind, **values})}\n")
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        prefix = values.get("split", "train")
        self.accelerator.log({f"{prefix}/{name}": value for name, value in numbers.items()}, step=step)

    def show(self, step: int, values: dict[str, str]) -> None:
        """Moves the progress bar to `step`."""
        self.bar.set_postfix(values, refresh=False)
        self.bar.update(step - self.bar.n)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.accelerator.is_main_process:
            self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()
