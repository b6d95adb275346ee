"""Tasks whose difficulty is known, token by token: generators, labels, verifiers, and the command that writes datasets.

    task = get_task("brevo-mini")
    batch = task.generate("train", range(4))
    task.verify("<bos> 4 2 <query> 2 <ans>", "4 2 <eos>")

A new task is one module with a `Task` and its `PRESETS`, and its line in `registry.py`.
"""

from datasets_scripts.grammar import Grammar
from datasets_scripts.registry import PRESETS, TASKS, get_task
from datasets_scripts.streaming import stream
from datasets_scripts.task import Batch, Labels, Task, TaskConfig, Verdict
from datasets_scripts.tokenizer import make_tokenizer

__all__ = [
    "PRESETS",
    "TASKS",
    "Batch",
    "Grammar",
    "Labels",
    "Task",
    "TaskConfig",
    "Verdict",
    "get_task",
    "make_tokenizer",
    "stream",
]
