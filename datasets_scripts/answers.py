"""Asking a model: generates answers to the examples of a task, and judges them.

Works for any causal language model of transformers; depths are given if its `generate` returns them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from datasets_scripts.randomness import stream_key
from datasets_scripts.task import Batch, Task, Verdict
from datasets_scripts.vocabulary import EOS, PAD


@dataclass(frozen=True)
class Answer:
    """What a model answered to one example.

    Args:
        tokens: Ids of the prompt and of the answer, without padding: up to its `<eos>`, or to where the longest answer
            to an example of its size would have it.
        prompt_length: How many of them are the prompt.
        verdict: Whether it is right.
        depths: Iterations of each token, as many as `tokens`; 0 at the last, which was not run. None if not known.
    """

    tokens: list[int]
    prompt_length: int
    verdict: Verdict
    depths: list[int] | None


def depths_at_answer(depths: Sequence[int], prompt_length: int) -> Sequence[int]:
    """Depths of the tokens from which the answer is predicted: token i predicts token i + 1; the last was not run."""
    return depths[prompt_length - 1 : -1]


def ask(
    model: Any,
    task: Task,
    batch: Batch,
    batch_size: int = 256,
    seed: int = 0,
    exit_depths: Sequence[Sequence[int]] | None = None,
    **options: Any,
) -> list[Answer]:
    """Answers to all examples of `batch`, in its order: greedy, or sampled at temperature 1 where the task says so.

    Args:
        model: A causal language model; its mode and random state are left as they were.
        batch_size: Prompts at a time; those of like length go together, padded on the left.
        seed: Of the sampling. The same seed and batch size give the same answers.
        exit_depths: Depths of each example by position, prompt and longest answer; None lets the model decide.
        options: For `generate`, such as `exit_quantile`.
    """
    was_training = model.training
    model.eval()
    answers: dict[int, Answer] = {}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=_cuda_of(model)):
            for number, rows in enumerate(_group_by_length(batch, batch_size)):
                torch.manual_seed(int(stream_key("answers", seed, number)) % 2**63)
                for row, answer in zip(
                    rows, _ask_together(model, task, batch, rows, exit_depths, options), strict=True
                ):
                    answers[row] = answer
    finally:
        model.train(was_training)
    return [answers[row] for row in range(len(batch))]


def sampling(task: Task) -> dict[str, Any]:
    """How `generate` draws answers to a task: greedy, or sampled at temperature 1."""
    if not task.sampled:
        return {"do_sample": False, "top_k": None, "top_p": None, "temperature": None}
    return {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}


def _cuda_of(model: Any) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


def _group_by_length(batch: Batch, batch_size: int) -> Iterator[list[int]]:
    order = np.argsort(batch.answer_start, kind="stable").tolist()
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _ask_together(
    model: Any,
    task: Task,
    batch: Batch,
    rows: list[int],
    exit_depths: Sequence[Sequence[int]] | None,
    options: dict[str, Any],
) -> list[Answer]:
    prompts = [batch.tokens[batch.offsets[row] : batch.offsets[row] + batch.answer_start[row]] for row in rows]
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(rows), width), PAD)
    for place, prompt in enumerate(prompts):
        input_ids[place, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
    longest = task.longest_answer(int(batch.size[rows].max()))
    if exit_depths is not None:
        forced = torch.zeros(len(rows), width + longest, dtype=torch.int64)
        for place, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            own = torch.tensor(exit_depths[row][: len(prompt) + longest])
            forced[place, width - len(prompt) : width - len(prompt) + len(own)] = own
        options = {**options, "exit_depths": forced.to(model.device)}
    output = model.generate(
        input_ids.to(model.device),
        attention_mask=(input_ids != PAD).long().to(model.device),
        max_new_tokens=longest,
        **sampling(task),
        eos_token_id=EOS,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        **options,
    )
    depths = getattr(output, "exit_depths", None)
    return [
        _judge(
            task,
            prompt.tolist(),
            output.sequences[place, width - len(prompt) :].tolist(),
            None if depths is None else depths[place, width - len(prompt) :].tolist(),
            task.longest_answer(int(batch.size[row])),
        )
        for place, (row, prompt) in enumerate(zip(rows, prompts, strict=True))
    ]


def _judge(task: Task, prompt: list[int], tokens: list[int], depths: list[int] | None, longest: int) -> Answer:
    # Rows that are answered together go on for as long as the largest of them may.
    completion = tokens[len(prompt) : len(prompt) + longest]
    if EOS in completion:
        completion = completion[: completion.index(EOS) + 1]
    length = len(prompt) + len(completion)
    verdict = task.verify(prompt, completion)
    # The last is 0 also where the row went on for the sake of others.
    own = None if depths is None else [*depths[: length - 1], 0]
    return Answer(prompt + completion, len(prompt), verdict, own)
