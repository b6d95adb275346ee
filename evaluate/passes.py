"""Running a model over examples: answers, the depth of every token, and what it cost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from datasets_scripts import Batch, Task
from datasets_scripts.answers import Answer, ask
from datasets_scripts.vocabulary import PAD, WORDS


@dataclass(frozen=True)
class Depths:
    """How depths are decided in a pass.

    Args:
        name: As tables call it.
        options: For the model's forward and `generate`, such as min_depth, max_depth, exit_quantile.
        forced: Depths of each example by position, longer than any answer; None lets the model decide.
    """

    name: str
    options: dict[str, Any]
    forced: Sequence[Sequence[int]] | None = None


def run_examples(
    model: Any, task: Task, batch: Batch, depths: Depths, first: int, batch_size: int, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(one row a token, one row an example) of what the model answered.

    The token table has, for each token that was run: `example` (counted from `first`), `position`, `token`, `is_answer`
    (the next token is part of the answer), `exit_depth`, `expected_depth` (on the path taken), `expected_depth_full`
    (of the whole distribution, with all tokens at D), `nll` of the token that follows, `correct`, `size`, `difficulty`,
    `token_difficulty` and the task's features, all labelled from what the model wrote.
    """
    answers = ask(model, task, batch, batch_size, seed, depths.forced, **depths.options)
    written = _as_batch(batch, answers)
    labels = task.label(written)
    measured = list(_measure(model, written, depths, batch_size))
    tokens, examples = [], []
    for row, (answer, own) in enumerate(zip(answers, measured, strict=True)):
        length = len(answer.tokens) - 1
        here = slice(written.offsets[row], written.offsets[row] + length)
        at_answer = np.arange(length) >= answer.prompt_length - 1
        tokens.append(
            pd.DataFrame(
                {
                    "example": first + row,
                    "position": np.arange(length),
                    "token": [WORDS[token] for token in answer.tokens[:length]],
                    "is_answer": at_answer,
                    **{name: values[:length] for name, values in own.items()},
                    "correct": answer.verdict.correct,
                    "size": batch.size[row],
                    "difficulty": labels.difficulty[row],
                    "token_difficulty": labels.token_difficulty[here],
                    **{name: values[here] for name, values in labels.features.items()},
                }
            )
        )
        spent = own["exit_depth"][:length]
        examples.append(
            {
                "example": first + row,
                "size": int(batch.size[row]),
                "difficulty": int(labels.difficulty[row]),
                "correct": answer.verdict.correct,
                "reason": answer.verdict.reason,
                "text": " ".join(WORDS[token] for token in answer.tokens),
                "depth": float(spent[at_answer].mean()),
                "depth_all": float(spent.mean()),
                "num_tokens": length,
                "flops": _cost(model, spent),
                "flops_full": _cost(model, np.full(length, model.config.max_depth)),
            }
        )
    return pd.concat(tokens, ignore_index=True), pd.DataFrame(examples)


def score_given_answers(model: Any, batch: Batch, depths: Depths, batch_size: int) -> pd.DataFrame:
    """On the dataset's own answers, given to the model: mean `nll`, `hit` (each token was the likeliest) and depths."""
    rows = []
    for row, own in enumerate(_measure(model, batch, depths, batch_size)):
        start, length = int(batch.answer_start[row]), int(batch.offsets[row + 1] - batch.offsets[row])
        answer = slice(start - 1, length - 1)
        rows.append(
            {
                "nll": float(own["nll"][answer].mean()),
                "hit": bool(own["hit"][answer].all()),
                "depth": float(own["exit_depth"][answer].mean()),
                "depth_all": float(own["exit_depth"][: length - 1].mean()),
            }
        )
    return pd.DataFrame(rows)


def _as_batch(batch: Batch, answers: list[Answer]) -> Batch:
    """What the model wrote, as a batch that a task can label."""
    lengths = [len(answer.tokens) for answer in answers]
    return Batch(
        np.concatenate([np.array(answer.tokens, np.int32) for answer in answers]),
        np.concatenate([[0], np.cumsum(lengths)]),
        np.array([answer.prompt_length for answer in answers], np.int32),
        batch.size,
        batch.instance,
    )


def _measure(model: Any, batch: Batch, depths: Depths, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Depths and likelihoods of every token of every example, by forwards over the whole text.

    A cached run gives the same depths, as the model's tests show; so those of `generate` are not asked for.
    """
    lengths = np.diff(batch.offsets)
    order = np.argsort(lengths, kind="stable")
    found: dict[int, dict[str, np.ndarray]] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size].tolist()
        for row, own in zip(rows, _measure_together(model, batch, rows, depths), strict=True):
            found[row] = own
    for row in range(len(batch)):
        yield found[row]


@torch.no_grad()
def _measure_together(model: Any, batch: Batch, rows: list[int], depths: Depths) -> list[dict[str, np.ndarray]]:
    lengths = [int(batch.offsets[row + 1] - batch.offsets[row]) for row in rows]
    input_ids = torch.full((len(rows), max(lengths)), PAD)
    for place, row in enumerate(rows):
        own = batch.tokens[batch.offsets[row] : batch.offsets[row + 1]].astype(np.int64)
        input_ids[place, : len(own)] = torch.from_numpy(own)
    places = torch.arange(max(lengths))
    mask = (places < torch.tensor(lengths)[:, None]).long()
    inputs = {"input_ids": input_ids.to(model.device), "attention_mask": mask.to(model.device), "use_cache": False}
    options = dict(depths.options)
    if depths.forced is not None:
        forced = torch.zeros_like(input_ids)
        for place, row in enumerate(rows):
            forced[place, : lengths[place]] = torch.tensor(depths.forced[row][: lengths[place]])
        options["exit_depths"] = forced.to(model.device)
    output = model(**inputs, **options)
    whole = model(**inputs, exit_depths=(mask * model.config.max_depth).to(model.device))
    log_p = F.log_softmax(output.logits[:, :-1].float(), dim=-1)
    targets = input_ids[:, 1:].to(model.device)
    columns: dict[str, Any] = {
        "exit_depth": output.exit_depths[:, :-1],
        "expected_depth": output.expected_depth[:, :-1],
        "expected_depth_full": whole.expected_depth[:, :-1],
        "nll": -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        "hit": log_p.argmax(-1) == targets,
    }
    arrays: dict[str, np.ndarray] = {name: values.cpu().numpy() for name, values in columns.items()}
    return [
        {name: values[place, : lengths[place] - 1] for name, values in arrays.items()} for place in range(len(rows))
    ]


def _cost(model: Any, exit_depths: np.ndarray) -> int:
    """FLOPs of a run over one example with these depths."""
    return int(model.flops(torch.tensor(exit_depths, dtype=torch.int64)[None]).total)
