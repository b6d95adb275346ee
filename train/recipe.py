"""A recipe: everything that a training run depends on, as one YAML file."""

import dataclasses
import difflib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from datasets_scripts import PRESETS, Task, get_task
from datasets_scripts.vocabulary import BOS, EOS, PAD, WORDS
from modeling_anira import AniraConfig
from modeling_anira.deciders import DECIDERS

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant_with_warmup", "cosine")
PRECISIONS = ("no", "bf16")
_EXPONENT = re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$")

# What may change when a run is taken up again, since no weight depends on it.
_CHANGEABLE = {"log_every", "evaluate_every", "eval_rows", "checkpoint_every", "keep_checkpoints", "max_loss"}

# Fields of AniraConfig that a recipe settles elsewhere.
_NOT_THE_MODELS = {
    "compute_weight": "the recipe's own `compute_weight` is what training reads",
    "return_dict": "training reads fields by name",
    "dtype": "training keeps weights in fp32; `mixed_precision` says what it computes in",
    **dict.fromkeys(("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"), "the tasks' vocabulary settles it"),
}

# Fields that came when there were runs already, and what those did.
_OLD = {"restart": 0.0}


class RecipeError(ValueError):
    """A recipe that cannot be run."""


@dataclass
class Recipe:
    """
    Args:
        task: Preset of a task, such as "mano-mini".
        task_settings: Fields of its config that differ from the preset.
        data: "stream" for fresh examples for ever, or a folder or Hub name of a built dataset.
        curriculum: Share of the run over which the largest size that is drawn grows from the task's least to its
            largest; 0 draws all sizes from the first step on.
        sizes: The only sizes that are trained, in equal shares; empty: all of the task's, by its weights.
        loss_on: "completion", or "all": the prompt's tokens are learnt as well. `<ans>` is never a target.
        seed: Of the weights, the data and the exits.
        steps: Optimiser steps.
        batch_size: Examples in a step, over all processes and micro-batches.
        accumulation: Micro-batches that a process makes of its share of a step, cut by length: the more, the less
            is padded.
        pad_to_multiple: Batches are padded to a multiple of so many tokens; a compiled model is compiled by length.
        optimizer: "adamw", or "muon": the layers' matrices by Muon, all else by AdamW.
        learning_rate, warmup_steps, schedule: Linear warm-up, then "constant_with_warmup", or "cosine" to 0.
        weight_decay: On matrices alone.
        betas, epsilon: Of AdamW.
        max_grad_norm: Gradients are clipped to this norm.
        compute_weight: gamma, the weight of the KL term, from the step on at which it is fully on.
        press_from, press_to: Shares of the run between which gamma rises from 0. Both 0: constant, as in the paper.
            Otherwise the task is learnt first, and depth pressed down afterwards.
        restart: Where pressing begins, a cosine that has come to 0 there is warmed up again, to this share of
            `learning_rate`. 0: one schedule from the first step to the last.
        random_depth: Whether each step draws one depth for all its tokens, evenly from 1 to D; for `decider: fixed`.
        mixed_precision: "no" or "bf16".
        compile: Whether the model is compiled.
        max_loss: A loss above this ends the run.
        log_every, evaluate_every, checkpoint_every: In steps; 0 turns it off. The last step does all three, and
            a checkpoint comes before every evaluation.
        eval_rows: Rows of each split that are answered on the way.
        keep_checkpoints: The last so many are kept.
        model: Fields of AniraConfig; those of the vocabulary are filled in.
    """

    task: str
    steps: int
    batch_size: int
    learning_rate: float
    model: dict[str, Any]
    task_settings: dict[str, Any] = field(default_factory=dict)
    data: str = "stream"
    curriculum: float = 0.0
    sizes: tuple[int, ...] = ()
    loss_on: Literal["completion", "all"] = "completion"
    seed: int = 0
    accumulation: int = 1
    pad_to_multiple: int = 1
    optimizer: str = "adamw"
    warmup_steps: int = 100
    schedule: str = "constant_with_warmup"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-6
    max_grad_norm: float = 1.0
    compute_weight: float = 0.01
    press_from: float = 0.0
    press_to: float = 0.0
    restart: float = 0.0
    random_depth: bool = False
    mixed_precision: str = "no"
    compile: bool = False
    max_loss: float = 100.0
    log_every: int = 10
    evaluate_every: int = 200
    eval_rows: int = 256
    checkpoint_every: int = 200
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        self.betas, self.sizes = (self.betas[0], self.betas[1]), tuple(self.sizes)
        _require(self.task in PRESETS, "task", self.task, f"one of {', '.join(PRESETS)}")
        for name in ("steps", "batch_size", "accumulation", "pad_to_multiple", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("warmup_steps", "log_every", "evaluate_every", "eval_rows", "checkpoint_every"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("weight_decay", "compute_weight"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "at least 0, and finite")
        for name in ("learning_rate", "max_grad_norm", "max_loss", "epsilon"):
            _require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "above 0, and finite")
        _require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "two numbers from 0 up to below 1")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 2^32 - 1")
        _require(self.loss_on in ("completion", "all"), "loss_on", self.loss_on, "'completion' or 'all'")
        _require(self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, f"one of {OPTIMIZERS}")
        _require(self.schedule in SCHEDULES, "schedule", self.schedule, f"one of {SCHEDULES}")
        _require(self.mixed_precision in PRECISIONS, "mixed_precision", self.mixed_precision, f"one of {PRECISIONS}")
        # After it the largest size is drawn.
        _require(0 <= self.curriculum < 1, "curriculum", self.curriculum, "from 0 to below 1, a share of the run")
        allowed = "0 where `data` is a built dataset, whose rows come in one order; take data='stream'"
        _require(not self.curriculum or self.data == "stream", "curriculum", self.curriculum, allowed)
        allowed = "empty with a curriculum or a built dataset, which settle the sizes"
        _require(not self.sizes or (self.data == "stream" and not self.curriculum), "sizes", self.sizes, allowed)
        _require(0 <= self.press_from <= 1, "press_from", self.press_from, "from 0 to 1, a share of the run")
        allowed = f"from press_from={self.press_from} to 1"
        _require(self.press_from <= self.press_to <= 1, "press_to", self.press_to, allowed)
        _require(0 <= self.restart <= 1, "restart", self.restart, "from 0 to 1, a share of `learning_rate`")
        if self.restart:
            _require(self.schedule == "cosine", "restart", self.restart, "0 unless `schedule` is 'cosine'")
            fits = round(self.press_from * self.steps) > 0 and self.press_from < 1
            _require(fits, "press_from", self.press_from, "below 1, and a step or more of the run, with a `restart`")
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Refuses a task whose examples do not fit the model, and settings that do not fit one or the other."""
        config = self.make_config()
        task = self.make_task()
        allowed = f"from {task.config.min_size} to {task.config.max_size}, the task's sizes"
        within = all(task.config.min_size <= size <= task.config.max_size for size in self.sizes)
        _require(within, "sizes", self.sizes, allowed)
        learns = DECIDERS[config.decider].learned
        allowed = "'auto' or 'masked' where a decider is to learn the depths"
        _require(not (learns and config.execution == "packed"), "model.execution", config.execution, allowed)
        allowed = "False where a decider is to learn the depths"
        _require(not self.random_depth or config.decider == "fixed", "random_depth", self.random_depth, allowed)
        longest = task.longest_example(task.config.extrapolation_size)
        allowed = f"at least {longest}, the longest example of the task"
        _require(
            config.max_position_embeddings >= longest,
            "model.max_position_embeddings",
            config.max_position_embeddings,
            allowed,
        )

    def make_task(self, **limits: Any) -> Task:
        """The task, with its settings, and with those in `limits`, such as a curriculum's `max_size`."""
        known = [entry.name for entry in dataclasses.fields(PRESETS[self.task])]
        for name in map(str, self.task_settings):
            _refuse_unknown(f"task_settings.{name}", name, known)
        try:
            return get_task(self.task, **{**self.task_settings, **limits})
        except (ValueError, TypeError, AttributeError) as error:
            raise RecipeError(f"task_settings: {error}") from error

    def make_config(self) -> AniraConfig:
        """The model's config."""
        known = [entry.name for entry in dataclasses.fields(AniraConfig)]
        for name in map(str, self.model):
            _refuse_unknown(f"model.{name}", name, known)
            if name in _NOT_THE_MODELS:
                raise RecipeError(f"`model.{name}` is set, but {_NOT_THE_MODELS[name]}.")
        vocabulary = {"vocab_size": len(WORDS), "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
        try:
            return AniraConfig(**{**vocabulary, "compute_weight": self.compute_weight, **self.model})
        except Exception as error:
            # transformers wraps what a validator says; the last line is the reason.
            raise RecipeError(f"model: {str(error).splitlines()[-1].strip()}") from error

    def plain(self) -> dict[str, Any]:
        """Its settings as JSON keeps them: tuples are lists."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def largest_size(self, step: int) -> int:
        """The largest size that is drawn at `step`, from 0: each size is let in after an equal share of steps."""
        task = self.make_task().config
        if step >= self.curriculum * self.steps:
            return task.max_size
        return task.min_size + int(step / (self.curriculum * self.steps) * (task.max_size - task.min_size))

    def learning_share(self, step: int) -> float:
        """The share of `learning_rate` at `step`, from 0, of a cosine that restarts where pressing begins."""
        begin = round(self.press_from * self.steps)
        peak, step, steps = (1.0, step, begin) if step < begin else (self.restart, step - begin, self.steps - begin)
        if step < self.warmup_steps:
            return peak * step / self.warmup_steps
        return peak * (1 + math.cos(math.pi * (step - self.warmup_steps) / max(1, steps - self.warmup_steps))) / 2

    def pressure(self, step: int) -> float:
        """gamma at `step`, from 0."""
        begin, end = self.press_from * self.steps, self.press_to * self.steps
        if step >= end:
            return self.compute_weight
        return 0.0 if step <= begin else self.compute_weight * (step - begin) / (end - begin)


def read_recipe(path: str | Path, settings: list[str]) -> Recipe:
    """Reads a recipe, changed by `settings` such as "steps=100" or "model.max_depth=8".

    Raises a RecipeError that names the field, its value, and what is allowed.
    """
    try:
        content = _read_yaml(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error}") from error
    _require(isinstance(content, dict), "recipe", path, "a YAML file of `name: value` lines")
    for setting in settings:
        name, equals, value = setting.partition("=")
        _require(bool(equals), "--set", setting, "of the form name=value")
        place, _, inner = name.partition(".")
        target = content.setdefault(place, {}) if inner else content
        _require(isinstance(target, dict), "--set", setting, f"of a map; `{place}` is {target!r}")
        try:
            target[inner or place] = _read_yaml(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"`--set` is {setting!r}, but its value cannot be read: {error}") from error
    return make_recipe(content)


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as the number it is; YAML 1.1 wants a dot in it."""


_Loader.yaml_implicit_resolvers = {
    **yaml.SafeLoader.yaml_implicit_resolvers,
    **{
        first: [*yaml.SafeLoader.yaml_implicit_resolvers[first], ("tag:yaml.org,2002:float", _EXPONENT)]
        for first in "-+0123456789"
    },
}


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def make_recipe(content: dict[str, Any]) -> Recipe:
    """A recipe from plain values; their types are checked against the fields."""
    fields = {entry.name: entry for entry in dataclasses.fields(Recipe)}
    for name in content:
        _refuse_unknown(str(name), str(name), list(fields))
    for name, entry in fields.items():
        missing = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if missing and name not in content:
            raise RecipeError(f"The recipe lacks `{name}`.")
    values = {name: _convert(name, value, fields[name].type) for name, value in content.items()}
    return Recipe(**values)


def _convert(name: str, value: Any, kind: Any) -> Any:
    """`value` if it is of the field's type."""
    wanted = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        dict[str, Any]: "a map",
        tuple[int, ...]: "a list of whole numbers",
        tuple[float, float]: "two numbers",
    }
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if (kind is int and isinstance(value, int) and not isinstance(value, bool)) or (
        kind is bool and isinstance(value, bool)
    ):
        return value
    if kind is str and isinstance(value, str | bool):
        # YAML reads `no` as false.
        return "no" if value is False else str(value)
    if kind == dict[str, Any] and isinstance(value, dict):
        return value
    if kind == tuple[int, ...] and isinstance(value, list | tuple):
        return tuple(_convert(name, entry, int) for entry in value)
    if kind == tuple[float, float] and isinstance(value, list | tuple) and len(value) == 2:
        return (_convert(name, value[0], float), _convert(name, value[1], float))
    if kind not in wanted:
        return value
    raise RecipeError(f"`{name}` is {value!r}, but must be {wanted[kind]}.")


def read_kept(path: Path) -> dict[str, Any]:
    """The settings of a run that was begun, from its `recipe.json`."""
    return {**_OLD, **json.loads(path.read_text())}


def list_differences(known: dict[str, Any], settings: dict[str, Any], place: str = "") -> str:
    """What a run has that `settings` say otherwise, such as "steps is 900, not 100"; "" if nothing.

    Both as plain values, as JSON reads them; what no weight depends on may differ.
    """
    found = []
    for name in sorted(known.keys() | settings.keys()):
        before, now = known.get(name), settings.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            found.append(list_differences(before, now, f"{place}{name}."))
        elif before != now and f"{place}{name}" not in _CHANGEABLE:
            found.append(f"{place}{name} is {_say(before)}, not {_say(now)}")
    return ", ".join(filter(None, found))


def _say(value: Any) -> str:
    return "left out" if value is None else str(value)


def _require(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise RecipeError(f"`{name}` is {value!r}, but must be {allowed}.")


def _refuse_unknown(shown: str, name: str, known: list[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean `{shown.removesuffix(name)}{near[0]}`?" if near else f" Known are: {', '.join(known)}."
        raise RecipeError(f"`{shown}` is no setting of a recipe.{hint}")
