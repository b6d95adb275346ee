"""The tasks by name, and their presets by the names that datasets have as configs."""

import dataclasses
from typing import Any

from datasets_scripts import brevo, lano, mano
from datasets_scripts.task import Task, TaskConfig

TASKS: dict[str, type[Task]] = {"mano": mano.Mano, "brevo": brevo.Brevo, "lano": lano.Lano}

PRESETS: dict[str, TaskConfig] = {
    f"{module.__name__.rpartition('.')[2]}-{name}": config
    for module in (mano, brevo, lano)
    for name, config in module.PRESETS.items()
}


def get_task(name: str, **changes: Any) -> Task:
    """The task of a preset such as "mano-mini", its config with `changes`. A ValueError lists the presets."""
    if name not in PRESETS:
        raise ValueError(f"`task` is {name!r}, but must be one of {', '.join(PRESETS)}.")
    return TASKS[name.partition("-")[0]](dataclasses.replace(PRESETS[name], **changes))
