"""The tasks by name, and their presets by the names that datasets have as configs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from datasets_scripts import brevo, lano, mano
from datasets_scripts.task import Task, TaskConfig

_TASKS: tuple[tuple[type[Task], Mapping[str, TaskConfig]], ...] = (
    (mano.Mano, mano.PRESETS),
    (brevo.Brevo, brevo.PRESETS),
    (lano.Lano, lano.PRESETS),
)

TASKS: dict[str, type[Task]] = {task.name: task for task, _ in _TASKS}

PRESETS: dict[str, TaskConfig] = {
    f"{task.name}-{name}": config for task, presets in _TASKS for name, config in presets.items()
}


def get_task(name: str, **changes: Any) -> Task:
    """The task of a preset such as "mano-mini", its config with `changes`. A ValueError lists the presets."""
    if name not in PRESETS:
        raise ValueError(f"`task` is {name!r}, but must be one of {', '.join(PRESETS)}.")
    return TASKS[name.partition("-")[0]](dataclasses.replace(PRESETS[name], **changes))
