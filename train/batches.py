"""What a training step reads: examples in an order that depends on the recipe alone, labelled and padded.

Examples are padded, not packed one behind the other. So no attention mask has to keep examples apart, and a token's
neighbours in training are those that it has when the model is used. Examples of like length go together in the
micro-batches of a step, but every step has all lengths: steps of one length each learn far slower (docs/log.md).

Every process works out the whole batch of a step and takes its own rows. So the batch of a step is the same for any
number of processes and micro-batches, and nothing but the step number is needed to go on after a stop.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from labels import IGNORED, make_labels
from recipe import Recipe, RecipeError
from torch.utils.data import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from datasets_scripts import Task
from datasets_scripts.columns import make_rows
from datasets_scripts.randomness import stream_key
from datasets_scripts.vocabulary import ANSWER, encode

Example = dict[str, Any]  # input_ids (list of int), answer_start, size, index (where in the source it stands)


class Source(Protocol):
    """Examples, numbered from 0 without end."""

    def read(self, start: int, count: int) -> list[Example]: ...


class StreamSource:
    """Fresh examples, none read twice; of the recipe's sizes, and under a curriculum up to what the step allows."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def read(self, start: int, count: int) -> list[Example]:
        # Not by `stream`, which shares examples out: here each process and worker takes its own of what all can read.
        recipe, indices = self.recipe, range(start, start + count)
        if not recipe.sizes:
            task = recipe.make_task(max_size=recipe.largest_size(start // recipe.batch_size))
            return _draw(task, indices, recipe.seed)
        rows = []
        for place, size in enumerate(recipe.sizes):
            own = [index for index in indices if index % len(recipe.sizes) == place]
            rows += _draw(recipe.make_task(min_size=size, max_size=size), own, recipe.seed) if own else []
        return sorted(rows, key=lambda row: row["index"])


def _draw(task: Task, indices: Sequence[int], seed: int) -> list[Example]:
    """The examples `indices` of a task's train split."""
    try:
        batch = task.generate("train", indices, seed)
    except ValueError as error:
        raise RecipeError(f"`curriculum` or `sizes`: {error}") from error
    rows = make_rows(task, batch, ("input_ids", "answer_start", "size"))
    return [{**row, "index": index} for index, row in zip(indices, rows, strict=True)]


class DatasetSource:
    """The rows of a built dataset, shuffled anew in every epoch."""

    def __init__(self, name: str, config: str, seed: int) -> None:
        from datasets import load_dataset

        try:
            self.rows = load_dataset(name, config, split="train").select_columns(["text", "answer_start", "size"])
        except Exception as error:
            hint = (
                "" if Path(name).is_dir() else " There is no folder of that name here, so it was looked for on the Hub."
            )
            raise RecipeError(f"`data` is {name!r}, but its config {config} cannot be loaded.{hint} {error}") from error
        self.seed = seed

    def read(self, start: int, count: int) -> list[Example]:
        indices = [self._index(place) for place in range(start, start + count)]
        table = self.rows[indices]
        return [
            {"input_ids": encode(text), "answer_start": answer, "size": size, "index": index}
            for text, answer, size, index in zip(
                table["text"], table["answer_start"], table["size"], indices, strict=True
            )
        ]

    def _index(self, place: int) -> int:
        epoch, within = divmod(place, len(self.rows))
        return int(self._order(epoch)[within])

    @lru_cache(maxsize=2)  # noqa: B019 (a source lives as long as its run)
    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))


def open_source(recipe: Recipe) -> Source:
    """Where the recipe's examples come from. Raises a RecipeError if a dataset cannot be loaded."""
    if recipe.data == "stream":
        return StreamSource(recipe)
    if recipe.task_settings:
        raise RecipeError("`task_settings` change what is drawn, so `data` must be 'stream' with them.")
    return DatasetSource(recipe.data, recipe.task, recipe.seed)


class StepBatches(Dataset):
    """Item s is what step s (from 0) reads: the micro-batches of this process.

    A micro-batch has `input_ids`, `attention_mask`, `labels`, each (rows, tokens), padded on the right, `answer_start`
    (rows,), `exit_noise` (rows, tokens, ...) or None, `depth` that all tokens get or None, and what the whole step
    holds: `step_labels` and `step_tokens`, numbers of shifted labels and of tokens, and `indices` of all its rows in
    the source.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        noise_shape: tuple[int, ...] | None,
        process: int = 0,
        num_processes: int = 1,
    ) -> None:
        """
        Args:
            noise_shape: Of the random numbers that the exit of one token needs, () for one; None if it needs none.
        """
        parts = num_processes * recipe.accumulation
        if recipe.batch_size % parts:
            raise RecipeError(
                f"`batch_size` is {recipe.batch_size}, but must be divisible by processes x accumulation, "
                f"{num_processes} x {recipe.accumulation}."
            )
        self.recipe, self.source, self.noise_shape = recipe, source, noise_shape
        self.process, self.num_processes = process, num_processes
        self.max_depth = recipe.make_config().max_depth
        # On the right, so that a token's place in the batch is its place in the example.
        tokenizer.padding_side = "right"
        self.collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=recipe.pad_to_multiple)

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> list[dict[str, Any]]:
        size = self.recipe.batch_size
        rows = sorted(self.source.read(step * size, size), key=lambda row: len(row["input_ids"]))
        loss_on = self.recipe.loss_on
        labels = [make_labels(row["input_ids"], row["answer_start"], loss_on, (ANSWER,)) for row in rows]
        totals = {
            "step_labels": sum(label != IGNORED for own in labels for label in own[1:]),
            "step_tokens": sum(len(row["input_ids"]) for row in rows),
            "indices": [row["index"] for row in rows],
            "depth": self._draw_depth(step),
        }
        noise = self._draw_noise(step, len(rows), max(len(row["input_ids"]) for row in rows))
        micro_size = size // self.recipe.accumulation
        micro_batches = []
        for micro in range(self.recipe.accumulation):
            # Lengths are shared out evenly among processes.
            own = slice(micro * micro_size + self.process, (micro + 1) * micro_size, self.num_processes)
            batch = self._pad(rows[own], labels[own])
            width = batch["input_ids"].shape[1]
            exit_noise = None if noise is None else _fit(noise[own], width)
            micro_batches.append({**batch, "exit_noise": exit_noise, **totals})
        return micro_batches

    def _pad(self, rows: list[Example], labels: list[list[int]]) -> dict[str, Any]:
        padded = self.collate(
            [{"input_ids": row["input_ids"], "labels": own} for row, own in zip(rows, labels, strict=True)]
        )
        answer_start = torch.tensor([row["answer_start"] for row in rows])
        return {**padded, "answer_start": answer_start}

    def _draw_depth(self, step: int) -> int | None:
        """The depth of all tokens of a step, from 1 to D; None if it is not drawn."""
        if not self.recipe.random_depth:
            return None
        return 1 + int(stream_key("depth", self.recipe.seed, step)) % self.max_depth

    def _draw_noise(self, step: int, rows: int, width: int) -> torch.Tensor | None:
        """Uniform numbers by row and position of the whole step, however it is shared out."""
        if self.noise_shape is None:
            return None
        generator = torch.Generator().manual_seed(int(stream_key("exits", self.recipe.seed, step)) % 2**63)
        return torch.rand((rows, width, *self.noise_shape), generator=generator)


def _fit(noise: torch.Tensor, width: int) -> torch.Tensor:
    """`noise` (rows, tokens, ...) cut or filled up (where there is only padding) to `width` tokens."""
    missing = max(0, width - noise.shape[1])
    filled = torch.cat([noise, noise.new_zeros(noise.shape[0], missing, *noise.shape[2:])], dim=1)
    return filled[:, :width].contiguous()
