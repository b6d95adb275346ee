"""Running a model over examples: answers, the depth of every token, and what it cost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from datasets_scripts import Batch, Task
from datasets_scripts.answers import ask
from datasets_scripts.vocabulary import PAD, WORDS

# Columns that a task with an exact distribution adds, as `_compare_with_exact` makes them.
AGAINST_EXACT = ("kl", "exact_nll")


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
    (the next token is part of the answer), `exit_depth` (of `generate`), `expected_depth` (on the path taken),
    `expected_depth_full` (of the whole distribution, with all tokens at D), `nll` of the token that follows, `correct`,
    `size`, `difficulty`, `token_difficulty` and the task's features, all labelled from what the model wrote.
    """
    answers = ask(model, task, batch, batch_size, seed, depths.forced, **depths.options)
    written = Batch(
        np.concatenate([np.array(answer.tokens, np.int32) for answer in answers]),
        np.concatenate([[0], np.cumsum([len(answer.tokens) for answer in answers])]),
        np.array([answer.prompt_length for answer in answers], np.int32),
        np.array(
            [task.written_size(answer.tokens, int(size)) for answer, size in zip(answers, batch.size, strict=True)],
            np.int32,
        ),
        batch.instance,
    )
    # Every other figure is of the very path that `generate` took. Its last token was not run.
    taken = [[*(answer.depths or [])[:-1], 1] for answer in answers]
    tokens, examples = _tabulate(model, task, written, Depths(depths.name, {}, taken), first, batch_size)
    correct = pd.Series([answer.verdict.correct for answer in answers])
    tokens["correct"] = correct.loc[tokens["example"] - first].to_numpy()
    examples["correct"] = correct
    examples["reason"] = [answer.verdict.reason for answer in answers]
    return tokens, examples


def run_given(
    model: Any, task: Task, batch: Batch, depths: Depths, first: int, batch_size: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The same tables for the dataset's own answers, given to the model.

    The example table also has mean `nll`, `hit` (each token of the answer was the likeliest) and, where the task knows
    the exact distribution, over the answer and in nats the mean `kl` from it to the model's, and its own `exact_nll`: a
    model whose `nll` is lower knows more than the words say. All count as correct.
    """
    tokens, examples = _tabulate(model, task, batch, depths, first, batch_size)
    return tokens.assign(correct=True), examples.assign(correct=True, reason="")


def _tabulate(
    model: Any, task: Task, batch: Batch, depths: Depths, first: int, batch_size: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(token table, example table) of a batch as it stands; its answers begin at `answer_start`."""
    labels = task.label(batch)
    features = {**labels.features, **batch.derived}
    tokens, examples = [], []
    for row, own in enumerate(_measure(model, task, batch, depths, batch_size)):
        length = len(own["exit_depth"])
        here = slice(batch.offsets[row], batch.offsets[row] + length)
        at_answer = np.arange(length) >= batch.answer_start[row] - 1
        words = [WORDS[token] for token in batch.tokens[batch.offsets[row] : batch.offsets[row + 1]]]
        measured = [name for name in AGAINST_EXACT if name in own]
        against_exact: dict[str, float] = {name: float(own.pop(name)[at_answer].mean()) for name in measured}
        tokens.append(
            pd.DataFrame(
                {
                    "example": first + row,
                    "position": np.arange(length),
                    "token": words[:length],
                    "is_answer": at_answer,
                    **own,
                    "size": batch.size[row],
                    "difficulty": labels.difficulty[row],
                    "token_difficulty": labels.token_difficulty[here],
                    **{name: values[here] for name, values in features.items()},
                }
            )
        )
        spent = own["exit_depth"]
        examples.append(
            {
                "example": first + row,
                "size": int(batch.size[row]),
                "difficulty": int(labels.difficulty[row]),
                "text": " ".join(words),
                "depth": float(spent[at_answer].mean()),
                "depth_all": float(spent.mean()),
                "num_tokens": length,
                "nll": float(own["nll"][at_answer].mean()),
                "hit": bool(own["hit"][at_answer].all()),
                **against_exact,
                "flops": _cost(model, spent),
                "flops_full": _cost(model, np.full(length, model.config.max_depth)),
            }
        )
    return pd.concat(tokens, ignore_index=True), pd.DataFrame(examples)


def _measure(model: Any, task: Task, batch: Batch, depths: Depths, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Depths and likelihoods of every token of every example but its last, by forwards over whole texts."""
    lengths = np.diff(batch.offsets)
    order = np.argsort(lengths, kind="stable")
    found: dict[int, dict[str, np.ndarray]] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size].tolist()
        for row, own in zip(rows, _measure_together(model, task, batch, rows, depths), strict=True):
            found[row] = own
    for row in range(len(batch)):
        yield found[row]


@torch.no_grad()
def _measure_together(
    model: Any, task: Task, batch: Batch, rows: list[int], depths: Depths
) -> list[dict[str, np.ndarray]]:
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
    found = [
        {name: values[place, : length - 1] for name, values in arrays.items()} for place, length in enumerate(lengths)
    ]
    for place, row in enumerate(rows):
        text = batch.tokens[batch.offsets[row] : batch.offsets[row + 1]]
        exact = task.exact_distribution(text[:-1])
        if exact is not None:
            own_log_p = log_p[place, : lengths[place] - 1].cpu().numpy()
            found[place] |= _compare_with_exact(*exact, own_log_p, text[1:])
    return found


def _compare_with_exact(
    outcomes: list[int], exact: np.ndarray, log_p: np.ndarray, targets: np.ndarray
) -> dict[str, np.ndarray]:
    """At every position, in nats: `kl`, KL(exact || model), and `exact_nll`, -log exact(target).

    Shapes: exact (n, outcomes), the model's log p (n, V), targets (n,) -> (n,) each. `exact_nll` is 0 at `<ans>`, which
    is no outcome.
    """
    logs = np.log(exact, out=np.zeros_like(exact), where=exact > 0)
    given = targets[:, None] == np.asarray(outcomes)
    return {"kl": (exact * (logs - log_p[:, outcomes])).sum(axis=1), "exact_nll": -(given * logs).sum(axis=1)}


def _cost(model: Any, exit_depths: np.ndarray) -> int:
    """FLOPs of a run over one example with these depths."""
    return int(model.flops(torch.tensor(exit_depths, dtype=torch.int64)[None]).total)
