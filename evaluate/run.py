"""Runs a checkpoint on a task, and measures whether its depths follow difficulty.

    python evaluate/run.py --model build/runs/brevo-online/model --dataset build/tasks --config brevo-mini \
        --out build/evaluations/brevo-online

writes to OUT/SPLIT one row per token (tokens.parquet) and per example (examples.parquet), and OUT/metrics.json.
Examples are answered in parts; if the run is stopped, the same command goes on with the next part. Several processes
share the parts: `ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 evaluate/run.py ...`.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from controls import (
    full_depth,
    histogram,
    matched_random,
    matched_stability,
    one_depth,
    oracle,
    with_known_size_words,
)
from examples import EvaluationError, load_examples, open_task, read_record, spread, take
from loading import check_tokenizer, digest_weights, load_model
from measures import mean_depth, measure
from passes import AGAINST_EXACT, Depths, run_examples, run_given
from shares import pack, share_of
from tqdm import tqdm

from datasets_scripts import Batch
from datasets_scripts.files import write_whole
from datasets_scripts.options import parse_options
from modeling_anira.generation import CONFIG_OPTIONS

ROOT = Path(__file__).resolve().parent.parent

# What is measured on given answers, if the task has it.
GIVEN = ("nll", "hit", *AGAINST_EXACT)
# What figures depend on beside the data and the model. (Sampled answers depend on the last two.)
OPTIONS = ("rows", "sweep_rows", "resamples", "batch_size", "part_rows")
# Token table and example table.
BothTables = tuple[pd.DataFrame, pd.DataFrame]

# Folders of answers in which words for sizes beyond training were read as a known one.
KNOWN_WORDS = "-known-words"

SWEPT_QUANTILES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)


@dataclass
class EvaluationArguments:
    """Evaluate a checkpoint on a task."""

    model: str = field(
        metadata={"help": "Folder or Hub name of an ANIRA checkpoint, which runs with this clone's code."}
    )
    dataset: str = field(metadata={"help": "Folder or Hub name of a dataset that build.py wrote."})
    config: str = field(metadata={"help": "Config of the dataset, such as brevo-mini."})
    out: str = field(metadata={"help": "Folder for the results."})
    splits: list[str] = field(
        default_factory=lambda: ["test", "extrapolation"], metadata={"help": "Splits to answer; the first is analysed."}
    )
    rows: int = field(default=0, metadata={"help": "Rows of each split, at equal distances; 0 for all."})
    controls: bool = field(default=True, metadata={"help": "Whether to run the controls at equal mean depth."})
    sweep_rows: int = field(
        default=500, metadata={"help": "Rows on which exit_quantile and max_depth are swept; 0 leaves that out."}
    )
    batch_size: int = field(default=256, metadata={"help": "Examples at a time."})
    part_rows: int = field(default=512, metadata={"help": "Rows of a part, which is kept when a run is stopped."})
    seed: int = field(
        default=0, metadata={"help": "Of sampled answers, random depths and the bootstraps of --resamples."}
    )
    resamples: int = field(
        default=500,
        metadata={"help": "Of bootstraps of correlations and shares of variance; those of mean depths take 1,000."},
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of the model on the Hub."})
    training_log: str | None = field(
        default=None, metadata={"help": "log.jsonl of the training; by default that beside the model, if there is one."}
    )


class Evaluation:
    """One run of the command."""

    def __init__(self, arguments: EvaluationArguments) -> None:
        self.arguments, self.out = arguments, Path(arguments.out)
        for name, least in {"rows": 0, "sweep_rows": 0, "part_rows": 1, "batch_size": 1, "resamples": 1}.items():
            if getattr(arguments, name) < least:
                raise EvaluationError(f"`{name}` is {getattr(arguments, name)}, but must be at least {least}.")
        self.accelerator = Accelerator()
        self.task = open_task(arguments.dataset, arguments.config)
        self.batches = {
            split: load_examples(arguments.dataset, arguments.config, split, arguments.rows)
            for split in arguments.splits
        }
        check_tokenizer(arguments.model, self.batches[arguments.splits[0]], arguments.revision)
        if arguments.training_log and not Path(arguments.training_log).is_file():
            raise EvaluationError(f"`training_log` is {arguments.training_log}, but must be a file.")
        self.model = load_model(arguments.model, arguments.revision).to(self.accelerator.device)
        if (trained_on := self._trained_on()) != arguments.config:
            warnings.warn(f"{arguments.model} was trained on {trained_on}, not {arguments.config}.", stacklevel=2)
        self._check_length()
        self._open_folder()
        self.begun = time.perf_counter()

    def run(self) -> dict[str, Any]:
        """Answers, controls, analyses; what metrics.json holds."""
        arguments, main_split = self.arguments, self.arguments.splits[0]
        own = Depths("learned", self._own_options())
        tables = {split: self._answer(split, own, self.model) for split in arguments.splits}
        known = self._answer_with_known_words(own)
        given = self._read_given(main_split, own, self.model)
        if given is not None:
            kept = {split + KNOWN_WORDS: both for split, both in known.items()}
            for split, both in {**tables, **kept, f"{main_split}-given": given}.items():
                for kind, table in zip(("tokens", "examples"), both, strict=True):
                    write_table(table, self.out / split / f"{kind}.parquet")
        controls = self._run_controls(main_split, tables[main_split], given) if arguments.controls else []
        sweep = self._sweep(main_split)
        if given is None:
            self.accelerator.wait_for_everyone()
            return {}
        tokens, examples = tables[main_split]
        log = self._find_log()
        metrics = without_nan(
            {
                **self._describe(),
                "accuracy": share_of(examples["correct"]),
                "correct": pack(examples["correct"]),
                "depth": mean_depth(tokens[tokens["is_answer"]]),
                "depth_all": mean_depth(tokens),
                "depth_histogram": histogram(tokens),
                "flops": int(examples["flops"].sum()),
                "flops_full": int(examples["flops_full"].sum()),
                "given": {name: _mean_of(name, given[1]) for name in GIVEN if name in given[1]},
                "analyses": measure(
                    tables, given if self.task.sampled else None, main_split, self._size_limit(), log, arguments, known
                ),
                "controls": controls,
                "sweep": sweep,
                "wall_seconds": time.perf_counter() - self.begun,
            }
        )
        if log and log.is_file():
            shutil.copyfile(log, self.out / "log.jsonl")
        write_whole(self.out / "metrics.json", json.dumps(metrics, indent=1))
        self.accelerator.wait_for_everyone()
        return metrics

    def _own_options(self) -> dict[str, Any]:
        """What the checkpoint's generation config says of its exits: forwards must be told, `generate` knows."""
        said = {name: getattr(self.model.generation_config, name, None) for name in CONFIG_OPTIONS}
        return {name: value for name, value in said.items() if value is not None}

    def _check_length(self) -> None:
        """Refuses rows that `generate` would refuse, before the first is answered."""
        longest = max(int(batch.answer_start.max()) for batch in self.batches.values())
        config = self.model.config
        if longest > config.max_position_embeddings and config.rope_parameters["rope_type"] != "dynamic":
            raise EvaluationError(
                f"The `max_position_embeddings` of {self.arguments.model} is {config.max_position_embeddings}, but "
                f"prompts of {self.arguments.config} have up to {longest} tokens."
            )

    def _open_folder(self) -> None:
        """Makes the folder, or takes up what it holds. Refuses that of another evaluation."""
        # What answers do not depend on may be added or changed when the command is run again.
        ignored = {"out", "resamples", "training_log", "controls", "sweep_rows"}
        ignored |= set() if self.task.sampled else {"batch_size"}
        settings = {name: value for name, value in asdict(self.arguments).items() if name not in ignored}
        settings["fingerprint"] = fingerprint(self.model, self.batches)
        kept = self.out / "arguments.json"
        if kept.exists():
            known = json.loads(kept.read_text())
            differing = sorted(name for name in settings if settings[name] != known.get(name))
            if differing:
                raise EvaluationError(
                    f"{self.out} holds an evaluation whose {', '.join(differing)} differ (the fingerprint is that of "
                    "the weights, the model's settings and the rows); choose another --out."
                )
        elif self.out.exists() and any(self.out.iterdir()):
            raise EvaluationError(f"`out` is {self.out}, which holds something else; choose a new folder.")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process and not kept.exists():
            self.out.mkdir(parents=True, exist_ok=True)
            # Not compared: a later command may be of later code, but the first one's answers stay what they are.
            write_whole(kept, json.dumps({**settings, "commit": read_commit()}, indent=1))
        self.accelerator.wait_for_everyone()

    def _answer(self, split: str, depths: Depths, model: Any, batch: Batch | None = None) -> BothTables:
        """(token table, example table) of a split with these depths; parts that are there are not run again.

        `batch`: some of its examples, where not all are answered; `depths` is then named for them.
        """
        batch = self.batches[split] if batch is None else batch
        count = len(batch)
        parts = range(0, count, self.arguments.part_rows)
        shown = self.accelerator.is_local_main_process
        progress = tqdm(parts, f"{split}, {depths.name}", leave=False, disable=not shown, unit="part")
        folder = self.out / "parts" / split / depths.name
        folder.mkdir(parents=True, exist_ok=True)
        for number, start in enumerate(progress):
            if number % self.accelerator.num_processes != self.accelerator.process_index:
                continue
            paths = [folder / f"{start:08d}.{kind}.parquet" for kind in ("tokens", "examples")]
            if all(path.exists() for path in paths):
                continue
            here = range(start, min(start + self.arguments.part_rows, count))
            forced = None if depths.forced is None else depths.forced[here.start : here.stop]
            own = Depths(depths.name, depths.options, forced)
            # A seed of its own for each part: the same answers, however parts are shared out.
            seed = self.arguments.seed * 1_000_003 + number
            tables = run_examples(model, self.task, take(batch, here), own, start, self.arguments.batch_size, seed)
            for table, path in zip(tables, paths, strict=True):
                write_table(table, path)
        self.accelerator.wait_for_everyone()
        kinds = ("tokens", "examples")
        both = [
            pd.concat([pd.read_parquet(folder / f"{start:08d}.{kind}.parquet") for start in parts], ignore_index=True)
            for kind in kinds
        ]
        return both[0], both[1]

    def _answer_with_known_words(self, depths: Depths) -> dict[str, BothTables]:
        """The tables of each split with sizes beyond training, where prompts say them by words never trained."""
        limit, found = self._size_limit(), {}
        for split, batch in self.batches.items():
            model = with_known_size_words(self.model, self.task, limit, int(batch.size.max()))
            if model is not None:
                found[split] = self._answer(split, Depths(f"known words {limit}", depths.options), model)
        return found

    def _read_given(self, split: str, depths: Depths, model: Any) -> BothTables | None:
        """The tables of the dataset's own answers, given to the model, on the main process, which alone reads them."""
        if not self.accelerator.is_main_process:
            return None
        return run_given(model, self.task, self.batches[split], depths, 0, self.arguments.batch_size)

    def _run_controls(
        self,
        split: str,
        answered: BothTables,
        given: BothTables | None,
    ) -> list[dict[str, Any]]:
        """One row for the learned model, full depth, and each control: accuracy, depths, FLOPs, and likelihoods.

        All processes answer; none but the main one, which has `given`, gets rows.
        """
        model, task, batch, arguments = self.model, self.task, self.batches[split], self.arguments
        tokens = answered[0]
        mean, deepest, seed = float(tokens["exit_depth"].mean()), model.config.max_depth, arguments.seed
        options = self._own_options()
        bounds: dict[str, int] = {name: options[name] for name in options if name in ("min_depth", "max_depth")}
        choices: dict[str, Callable[[], tuple[Depths, Any]]] = {
            "full": lambda: (full_depth(deepest), model),
            "fixed": lambda: (one_depth(mean, deepest, task, batch, seed), model),
            "random": lambda: (matched_random(tokens, task, batch, seed), model),
            "random answers": lambda: (matched_random(tokens, task, batch, seed, answers_only=True), model),
            "stability": lambda: (
                Depths("stability", bounds),
                matched_stability(model, task, batch, bounds, mean, arguments.batch_size, seed),
            ),
        }
        found: list[tuple[str, BothTables | None, BothTables | None]] = [("learned", answered, given)]
        for name, choose in choices.items():
            depths, runner = choose()
            found.append((name, self._answer(split, depths, runner), self._read_given(split, depths, runner)))
        if given is not None:
            found.append(("oracle", None, self._read_given(split, oracle(given[0], task, batch), model)))
        return [_describe_control(name, own, read) for name, own, read in found if read is not None]

    def _sweep(self, split: str) -> list[dict[str, Any]]:
        """Accuracy against cost as `max_depth` moves, and `exit_quantile` if the exit rule reads it."""
        rows = self.arguments.sweep_rows
        if not rows:
            return []
        batch = take(self.batches[split], spread(rows, len(self.batches[split])))
        config, own = self.model.config, self._own_options()
        least = own.get("min_depth", config.min_depth)
        settings: list[dict[str, Any]] = [{"max_depth": depth} for depth in range(least, config.max_depth + 1)]
        if self.model.decider.learned and own.get("exit_rule", config.exit_rule) == "quantile":
            settings += [{"exit_quantile": quantile} for quantile in SWEPT_QUANTILES]
        found = []
        for options in settings:
            ((name, value),) = options.items()
            # Until 2026-11-26 the first rows were taken, in parts of another name.
            depths = Depths(f"{name}-{value}-{rows}-spread-rows", options)
            tokens, examples = self._answer(split, depths, self.model, batch)
            found.append(
                {
                    "setting": name,
                    "value": value,
                    "accuracy": share_of(examples["correct"]),
                    "depth": mean_depth(tokens[tokens["is_answer"]]),
                    "depth_all": mean_depth(tokens),
                    "flops_share": float(examples["flops"].sum() / examples["flops_full"].sum()),
                }
            )
        return found

    def _find_log(self) -> Path | None:
        """The log of the training, if it was one of this task."""
        if self.arguments.training_log:
            return Path(self.arguments.training_log)
        if self._trained_on() != self.arguments.config:
            return None
        return self._find_of_training("log.jsonl")

    def _trained_on(self) -> str:
        """The task of the recipe; that of the evaluation if there is no recipe."""
        return str(self._recipe.get("task", self.arguments.config))

    @cached_property
    def _recipe(self) -> dict[str, Any]:
        """The recipe that its training left with the model; nothing if there is none."""
        path = self._find_of_training("recipe.json")
        return json.loads(path.read_text()) if path else {}

    def _find_of_training(self, name: str) -> Path | None:
        """A file that its training left with the model, or beside it."""
        model = Path(self.arguments.model)
        return next((path for path in (model / name, model.parent / name) if path.is_file()), None)

    def _size_limit(self) -> int:
        """The largest size of training: by the recipe beside the model, if it is of this task, else by the dataset."""
        largest, recipe = self.task.config.max_size, self._recipe
        if recipe.get("task") != self.arguments.config:
            return largest
        return max(recipe["sizes"] or [recipe["task_settings"].get("max_size", largest)])

    def _describe(self) -> dict[str, Any]:
        """What the figures depend on."""
        names = ("torch", "transformers", "datasets", "numpy", "scipy", "statsmodels")
        config = self.model.config
        return {
            "model": _without_folders_of_this_machine(self.arguments.model),
            "dataset": _without_folders_of_this_machine(self.arguments.dataset),
            "config": self.arguments.config,
            "splits": self.arguments.splits,
            "rows": {split: len(batch) for split, batch in self.batches.items()},
            "seed": self.arguments.seed,
            "options": {name: getattr(self.arguments, name) for name in OPTIONS},
            "rows_digest": hashlib.sha256(
                b"".join(batch.tokens.tobytes() for batch in self.batches.values())
            ).hexdigest(),
            "drawn": self._describe_dataset(),
            "decider": config.decider,
            "max_depth": config.max_depth,
            "size_limit": self._size_limit(),
            "commonest_answer": {split: commonest_answer(batch) for split, batch in self.batches.items()},
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "weights_digest": digest_weights(dict(self.model.named_parameters())),
            "model_config": {name: value for name, value in config.to_diff_dict().items() if _is_plain(value)},
            "exits": {name: getattr(config, name) for name in CONFIG_OPTIONS} | self._own_options(),
            "versions": {name: importlib.metadata.version(name) for name in names},
            **self._read_commits(),
        }

    def _read_commits(self) -> dict[str, Any]:
        """The code that began this evaluation, and that of the analyses where a later one goes on from its answers."""
        begun, now = self._read_begun()["commit"], read_commit()
        return {"commit": begun} | ({} if now == begun else {"analyses_commit": now})

    def _describe_dataset(self) -> dict[str, Any] | None:
        """The options by which `build.py` draws the dataset again: it can have more rows than were taken of it."""
        record = read_record(self.arguments.dataset)
        if record is None:
            return None
        splits = record["configs"][self.arguments.config]["splits"]
        return {"seed": record["seed"], "rows": splits["train"]["rows"], "eval_rows": splits["test"]["rows"]}

    def _read_begun(self) -> dict[str, Any]:
        """What the command kept when it began, for the command that goes on; before 2026-11-26 that was no commit."""
        return {"commit": read_commit(), **json.loads((self.out / "arguments.json").read_text())}


def commonest_answer(batch: Batch) -> float:
    """The share of rows whose own answer is the commonest one: the accuracy of who always gives that."""
    starts, ends = batch.offsets[:-1] + batch.answer_start, batch.offsets[1:]
    answers = Counter(batch.tokens[start:end].tobytes() for start, end in zip(starts, ends, strict=True))
    return answers.most_common(1)[0][1] / len(batch)


def _describe_control(name: str, answered: BothTables | None, given: BothTables) -> dict[str, Any]:
    """A row of the table of controls; without answers, depths are those on the dataset's own."""
    tokens, examples = answered or given
    return {
        "depths": name,
        "accuracy": share_of(examples["correct"])
        if answered
        else {"value": None, "low": None, "high": None, "reason": "only on given answers"},
        "depth": mean_depth(tokens[tokens["is_answer"]]),
        "depth_all": mean_depth(tokens),
        "flops_share": float(examples["flops"].sum() / examples["flops_full"].sum()),
        "given_depth": mean_depth(given[0][given[0]["is_answer"]]),
        "given_nll": _mean_of("nll", given[1]),
        "given_hit": _mean_of("hit", given[1]),
    }


def _mean_of(name: str, examples: pd.DataFrame) -> dict[str, Any]:
    """A mean over examples with its 95 % interval: Wilson's for the share of hits, else 1.96 standard errors."""
    if name == "hit":
        return share_of(examples[name])
    numbers = examples[name].astype(float)
    margin = 1.96 * float(numbers.std(ddof=1)) / len(numbers) ** 0.5 if len(numbers) > 1 else float("nan")
    mean = float(numbers.mean())
    return {"value": mean, "low": mean - margin, "high": mean + margin, "n": len(numbers)}


def fingerprint(model: Any, batches: dict[str, Batch]) -> str:
    """A hash of what answers depend on: the weights, the settings, and the rows."""
    found = hashlib.sha256()
    found.update(digest_weights(model.state_dict()).encode())
    for config in (model.config, model.generation_config):
        settings = {name: value for name, value in config.to_dict().items() if name != "transformers_version"}
        found.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for batch in batches.values():
        found.update(batch.tokens.tobytes())
    return found.hexdigest()


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Writes a Parquet file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    table.to_parquet(unfinished, index=False)
    unfinished.replace(path)


def without_nan(value: Any) -> Any:
    """Plain values, with None for every number that is none."""
    if isinstance(value, dict):
        return {str(name): without_nan(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(own) for own in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def _without_folders_of_this_machine(name: str) -> str:
    """A name that may be published: of a folder outside of this clone only its last part."""
    path = Path(name).absolute()
    if not path.exists():
        return name
    return os.path.relpath(path, ROOT) if path.is_relative_to(ROOT) else path.name


def read_commit() -> str | None:
    """The commit of this clone, "+" if it has been changed since; None outside of one."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> None:
    """Evaluates as the command line says. What the user can mend ends in one sentence."""
    (arguments,) = parse_options(EvaluationArguments)
    torch.manual_seed(arguments.seed)
    try:
        evaluation = Evaluation(arguments)
        metrics = evaluation.run()
    except EvaluationError as error:
        sys.exit(f"run.py: {error}")
    except OSError as error:
        sys.exit(f"run.py: {error}. What was finished is kept in {arguments.out}; the same command goes on from there.")
    if evaluation.accelerator.is_main_process:
        accuracy = metrics["accuracy"]
        print(
            f"{arguments.out}: accuracy {accuracy['value']:.3f} ({accuracy['low']:.3f} to {accuracy['high']:.3f}), "
            f"depth {metrics['depth']['value']:.2f} at answers, {metrics['depth_all']['value']:.2f} over all tokens, "
            f"of {metrics['max_depth']}."
        )


if __name__ == "__main__":
    main()
