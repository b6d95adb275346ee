"""Trains a model from scratch as a recipe says.

    accelerate launch train/pretrain.py --config train/recipes/mano-mini-online.yaml --out build/runs/mano-online

writes the model (weights, code, config, tokenizer) to OUT/model, and on the way OUT/log.jsonl and OUT/checkpoints.
Stopped by a signal or killed, the same command with --resume goes on; on one process bit for bit as if nothing had
happened.
Two processes on a CPU: `ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 train/pretrain.py ...`.
"""

import fcntl
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, LoggerType, set_seed
from batches import StepBatches, open_source
from journal import Journal
from optimizers import make_optimizers, make_scheduler
from recipe import Recipe, RecipeError, list_differences, read_kept, read_recipe
from saving import list_checkpoints, load_checkpoint, save_checkpoint, writing
from torch.utils.data import DataLoader
from validation import validate

from datasets_scripts import make_tokenizer
from datasets_scripts.files import write_whole
from datasets_scripts.options import parse_options
from modeling_anira import AniraForCausalLM
from modeling_anira.exits import noise_shape


@dataclass
class RunArguments:
    """Train an ANIRA model from scratch."""

    config: str = field(metadata={"help": "The recipe, a YAML file."})
    out: str = field(metadata={"help": "Folder of the run."})
    set: list[str] = field(
        default_factory=list, metadata={"help": "Settings that replace those of the recipe, such as model.max_depth=8."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in OUT, if there is one."})
    report_to: str = field(default="none", metadata={"help": "A tracker that Accelerate knows, such as tensorboard."})
    workers: int = field(default=0, metadata={"help": "1: examples are made in a process beside the training."})


class Diverged(RuntimeError):
    """A loss that is not a number, or out of bounds."""


class Pretraining:
    """One run: model, optimiser, data and where it stands."""

    def __init__(self, recipe: Recipe, arguments: RunArguments) -> None:
        self.recipe, self.out = recipe, Path(arguments.out)
        tracker = None if arguments.report_to == "none" else arguments.report_to
        if tracker not in (None, *LoggerType.list()):
            raise RecipeError(
                f"`--report_to` is {tracker!r}, but must be none or one of {', '.join(LoggerType.list())}."
            )
        if arguments.workers < 0:
            raise RecipeError(f"`--workers` is {arguments.workers}, but must be at least 0.")
        config = recipe.make_config()
        # With one iteration there is nothing to decide, and the decider gets no gradient.
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=config.max_depth == 1)]
        self.accelerator = Accelerator(
            mixed_precision=recipe.mixed_precision,
            log_with=tracker,
            project_dir=str(self.out / "trackers"),
            kwargs_handlers=handlers,
        )
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            kind = self.accelerator.distributed_type.value
            raise RecipeError(
                f"`accelerate config` says {kind}, which shards weights; these runs are small enough for whole ones: "
                "say MULTI_GPU, or no distributed training at all."
            )
        # A recipe accumulates by itself; what the launcher's environment says would scale gradients.
        self.accelerator.gradient_accumulation_steps = 1
        self.task = recipe.make_task()
        for split in self._list_splits():
            try:
                self.task.generate(split, [0])
            except ValueError as error:
                raise RecipeError(f"`task_settings` leave nothing for {split}: {error}") from error
        set_seed(recipe.seed)
        model = AniraForCausalLM(config)
        # From here on each process draws its own dropout.
        set_seed(recipe.seed, device_specific=True)
        decider = model.decider
        # Under every decider, though `fixed` reads none: a model that is given none draws a seed, and dropout moves on.
        noise = None if recipe.random_depth else noise_shape(decider, (1, 1), config.max_depth, training=True)[2:]
        self.batches = StepBatches(
            recipe,
            open_source(recipe),
            make_tokenizer(),
            noise,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        optimizers = make_optimizers(model, recipe)
        self.schedulers = [make_scheduler(optimizer, recipe) for optimizer in optimizers]
        self.accelerator.register_for_checkpointing(*self.schedulers)
        self.model, *self.optimizers = self.accelerator.prepare(model, *optimizers)
        self.run_model = torch.compile(self.model) if recipe.compile else self.model
        self.step, self.tokens = 0, 0
        self.workers = arguments.workers
        self.stop_signal = 0
        self._open_folder(arguments.resume)
        if tracker:
            self.accelerator.init_trackers("anira", config={name: str(value) for name, value in asdict(recipe).items()})
            if self.accelerator.is_main_process and not self.accelerator.trackers:
                raise RecipeError(f"`--report_to` is {tracker!r}, which is not installed.")
        self.finished = self.step == recipe.steps and (self.out / "model").exists()
        # An evaluation that may be half done is made again, unless there are none any more.
        whole = self.finished or not recipe.eval_rows
        self.journal = Journal(self.accelerator, self.out / "log.jsonl", self.step, recipe.steps, whole)

    def _open_folder(self, resume: bool) -> None:
        """Makes the run's folder, or takes up what it holds. Refuses another recipe's."""
        kept, settings = self.out / "recipe.json", self.recipe.plain()
        checkpoints = list_checkpoints(self.out / "checkpoints")
        if kept.exists():
            differing = list_differences(read_kept(kept), settings)
            if differing:
                raise RecipeError(
                    f"{self.out} holds a run with other settings: {differing}. Say its own, or choose another --out."
                )
            if not checkpoints and (self.out / "model").exists():
                raise RecipeError(
                    f"{self.out} holds a model whose checkpoints are gone, so that its run cannot be taken up again. "
                    "Choose another --out."
                )
            if not resume and checkpoints:
                raise RecipeError(f"{self.out} holds this run already. Add --resume to go on, or choose another --out.")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.out / "lock")
            # A run killed while it writes this must not leave half of it: it could not be taken up again.
            write_whole(kept, json.dumps(settings, indent=1))
        if resume and checkpoints:
            progress = load_checkpoint(self.accelerator, checkpoints[-1])
            self.step, self.tokens = progress["step"], progress["tokens"]
        self.accelerator.wait_for_everyone()

    def run(self) -> None:
        """Trains until the last step, or until a signal asks to stop."""
        recipe = self.recipe
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note_signal)
        loader = DataLoader(
            self.batches,
            sampler=range(self.step, recipe.steps),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            worker_init_fn=_leave_signals_to_the_run,
            # Else a loader draws from the global random state, once more after each resumption.
            generator=torch.Generator(),
        )
        if self.step and not self.finished:
            self._evaluate_if_due(again=self.journal.lacks_evaluation)
        self.model.train()
        begun, tokens_then, step_then = time.perf_counter(), self.tokens, self.step
        for micro_batches in loader:
            values, stop = self._train_step(micro_batches)
            self.step += 1
            last = self.step == recipe.steps
            elapsed = time.perf_counter() - begun
            self.journal.show(
                self.step,
                {
                    "ce": f"{values['ce']:.3f}",
                    "depth": f"{values['depth']:.2f}",
                    "tokens/s": f"{(self.tokens - tokens_then) / elapsed:.0f}",
                },
            )
            if last or _due(self.step, recipe.log_every):
                speed = {"tokens_per_second": (self.tokens - tokens_then) / elapsed, "steps": self.step - step_then}
                self.journal.write(
                    "train",
                    self.step,
                    {**values, "tokens": self.tokens, "processes": self.accelerator.num_processes, **speed},
                )
                begun, tokens_then, step_then = time.perf_counter(), self.tokens, self.step
            # First: what asks to stop during an evaluation may not wait for its end. The next start makes up for it.
            due = _due(self.step, recipe.checkpoint_every) or _due(self.step, recipe.evaluate_every)
            if last or stop or due:
                self._save_checkpoint()
            if stop and not last:
                self.journal.say(f"Stopped by a signal after step {self.step}; --resume goes on from there.")
                return
            if self._evaluate_if_due():
                begun, tokens_then, step_then = time.perf_counter(), self.tokens, self.step
        self._save_model()

    def _train_step(self, micro_batches: list[dict[str, Any]]) -> tuple[dict[str, float], bool]:
        """One optimiser step: what is logged of it, over all processes, and whether one of them was asked to stop."""
        accelerator, weight = self.accelerator, self.recipe.pressure(self.step)
        sums = torch.zeros(7, dtype=_summing_dtype(accelerator.device), device=accelerator.device)
        for number, batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            with accelerator.no_sync(self.model) if not last else nullcontext():
                loss, parts = self._loss(batch, weight)
                # DDP takes the mean over processes of what are shares of a sum.
                accelerator.backward(loss * accelerator.num_processes)
            sums += parts
        sums[-1] = self.stop_signal
        sums = accelerator.reduce(sums, reduction="sum")
        ce, kl, depths, tokens, answer_depths, answer_tokens, stop = sums.tolist()
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        self._check(ce + weight * kl, float(norm), micro_batches[0]["indices"])
        values = {
            "loss": ce + weight * kl,
            "ce": ce,
            "kl": kl,
            "depth": answer_depths / max(1, answer_tokens),
            "depth_all": depths / tokens,
            "compute_weight": weight,
            "learning_rate": self.schedulers[0].get_last_lr()[0],
            "gradient_norm": float(norm),
        }
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        self.tokens += round(tokens)
        return values, stop > 0

    def _loss(self, batch: dict[str, Any], weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        """This micro-batch's share of the step's loss, and of what is logged.

        Means over all labels and all tokens of the step: so the step is the same, however it is shared out.
        """
        device = self.accelerator.device
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "labels")}
        noise, depth = batch["exit_noise"], batch["depth"]
        given = None if depth is None else depth * inputs["attention_mask"]
        with self.accelerator.autocast():
            output = self.run_model(**inputs, exit_noise=None if noise is None else noise.to(device), exit_depths=given)
        real, labels = inputs["attention_mask"].bool(), inputs["labels"]
        ce = output.ce_loss * (labels[:, 1:] != -100).sum() / batch["step_labels"]
        kl = output.compute_loss * real.sum() / batch["step_tokens"]
        # Position i predicts token i + 1: the answer is predicted from its <ans> on, up to the token before <eos>.
        places = torch.arange(real.shape[1], device=device)
        lengths = real.sum(1, keepdim=True)
        answer = (places >= batch["answer_start"].to(device)[:, None] - 1) & (places < lengths - 1)
        depths = output.exit_depths
        counts = (depths.sum(), real.sum(), (depths * answer).sum(), answer.sum(), torch.zeros((), device=device))
        precise = _summing_dtype(device)
        parts = torch.stack([part.detach().to(precise) for part in (ce, kl, *counts)])
        return ce + weight * kl, parts

    def _check(self, loss: float, norm: float, indices: list[int]) -> None:
        """Ends the run before a step that would spoil the weights."""
        if math.isfinite(loss) and loss <= self.recipe.max_loss and math.isfinite(norm):
            return
        checkpoints = list_checkpoints(self.out / "checkpoints")
        last = str(checkpoints[-1]) if checkpoints else "none"
        raise Diverged(
            f"The loss is {loss:.6g} and the norm of its gradient {norm:.4g} at step {self.step + 1}, both must be "
            f"finite, and the loss at most max_loss={self.recipe.max_loss}. Rows of the data that were read: "
            f"{indices}. Last good checkpoint: {last}."
        )

    def _evaluate_if_due(self, again: bool = False) -> bool:
        """Answers rows of the validation splits, if the recipe wants that after this step; whether it did.

        `again`: this step's evaluation was dropped from the log, whatever the recipe wants by now.
        """
        if self.step < self.recipe.steps and not again and not _due(self.step, self.recipe.evaluate_every):
            return False
        for split in self._list_splits():
            values = validate(self.accelerator, self.model, self.task, split, self.recipe.eval_rows)
            self.journal.write("evaluation", self.step, {"split": split, "tokens": self.tokens, **values})
            self.journal.say(
                f"step {self.step} {split}: accuracy {values['accuracy']:.3f}, depth {values['depth']:.2f} at answers, "
                f"{values['depth_all']:.2f} over all tokens"
            )
        return True

    def _list_splits(self) -> list[str]:
        """The splits that are answered on the way."""
        config = self.task.config
        beyond = ["extrapolation"] if config.extrapolation_size > config.max_size else []
        return ["validation", *beyond] if self.recipe.eval_rows else []

    def _save_checkpoint(self) -> None:
        progress = {"tokens": self.tokens, "processes": self.accelerator.num_processes}
        save_checkpoint(self.accelerator, self.out / "checkpoints", self.step, progress, self.recipe.keep_checkpoints)

    def _save_model(self) -> None:
        """The model with its tokenizer, as `from_pretrained` takes it; whole or not at all."""
        if self.accelerator.is_main_process:
            unfinished, finished = self.out / "model.unfinished", self.out / "model"
            with writing("the model"):
                model = self.accelerator.unwrap_model(self.model)
                model.save_pretrained(unfinished)
                make_tokenizer(model.config.max_position_embeddings).save_pretrained(unfinished)
            shutil.rmtree(finished, ignore_errors=True)
            unfinished.rename(finished)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def _note_signal(self, number: int, frame: Any) -> None:
        self.stop_signal = number


def _lock(path: Path) -> IO[str]:
    """The file `path`, locked for as long as this process lives. Refuses it if a run that lives has locked it."""
    opened = path.open("a+")
    try:
        # Not `flock`, which workers would inherit, and hold for a while after a run that was killed.
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        opened.seek(0)
        raise RecipeError(
            f"Process {opened.read() or 'unknown'} still trains in {path.parent}. Stop it first: a launcher that was "
            "killed may have left it."
        ) from None
    opened.truncate(0)
    opened.write(str(os.getpid()))
    opened.flush()
    return opened


def _leave_signals_to_the_run(worker: int) -> None:
    """A signal to the whole group must not take the batches away before the run has written its checkpoint."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _summing_dtype(device: torch.device) -> torch.dtype:
    """What losses are summed in: fp64, which Apple's GPUs do not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def main() -> None:
    """Trains as the command line says. What the user can mend ends in one sentence."""
    (arguments,) = parse_options(RunArguments)
    if sum(word.partition("=")[0] == "--set" for word in sys.argv) > 1:
        sys.exit("pretrain.py: `--set` is given twice; put all settings behind one: --set steps=100 seed=1.")
    try:
        pretraining = Pretraining(read_recipe(arguments.config, arguments.set), arguments)
        try:
            pretraining.run()
        finally:
            pretraining.journal.close()
    except (RecipeError, Diverged) as error:
        # A data worker's comes with its traceback.
        sys.exit(f"pretrain.py: {str(error).strip().rpartition('RecipeError: ')[2]}")
    except OSError as error:
        sys.exit(
            f"pretrain.py: writing to {error.filename or arguments.out} failed: {error.strerror or error}. "
            "Finished checkpoints are kept; --resume goes on from the last."
        )


if __name__ == "__main__":
    main()
