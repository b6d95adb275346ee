"""What learned depths are held against, at equal mean depth: one for all, at random, by stability, by the truth."""

import copy
from collections import defaultdict
from typing import Any

import numpy as np
import pandas as pd
from accelerate.utils import broadcast_object_list
from examples import spread, take
from passes import Depths, run_examples

from datasets_scripts import Batch, Task

# Halvings of the stability threshold's range, on a logarithmic scale.
_HALVINGS = 12
_ROWS_FOR_THRESHOLD = 256


def full_depth(depth: int) -> Depths:
    """Every token as deep as the model goes."""
    return Depths("full", {"min_depth": depth, "max_depth": depth})


def one_depth(mean: float, max_depth: int, task: Task, batch: Batch, seed: int) -> Depths:
    """One depth for all tokens of an example: the whole number below `mean`, or the one above, so that it is met."""
    mean = min(max(mean, 1.0), float(max_depth))
    low = int(mean)
    rng = np.random.default_rng([seed, 0])
    # Spread evenly rather than drawn, so that the share of the deeper ones is exact.
    deeper = rng.permutation(np.arange(len(batch)) < round((mean - low) * len(batch)))
    longest = task.longest_answer(int(batch.size.max()))
    forced = []
    for row, more in enumerate(deeper.tolist()):
        length = int(max(batch.answer_start[row] + longest, batch.offsets[row + 1] - batch.offsets[row]))
        forced.append([low + int(more)] * length)
    return Depths("fixed", {}, forced)


def matched_random(tokens: pd.DataFrame, task: Task, batch: Batch, seed: int, answers_only: bool = False) -> Depths:
    """Depths drawn for every token from those that the learned model gave at the same place.

    Places count from `<ans>`: the histogram of the prompt's tokens by their distance to it, and of the answer's.

    Args:
        tokens: Token table of the learned model.
        batch: Examples to draw for.
        answers_only: Whether prompts keep the depths that the learned model gave them.
    """
    prompts = _prompt_depths(tokens)
    start = tokens[tokens["is_answer"]].groupby("example")["position"].min()
    places = tokens["position"] - tokens["example"].map(start)
    pools: dict[int, np.ndarray] = {
        int(place): group.to_numpy() for place, group in tokens["exit_depth"].groupby(places)
    }
    least, largest = min(pools), max(pools)
    forced = []
    # Rows that are answered together may all go on for as long as the longest of them.
    longest = task.longest_answer(int(batch.size.max()))
    for row in range(len(batch)):
        rng = np.random.default_rng([seed, row])
        answer = int(batch.answer_start[row]) - 1
        length = int(max(answer + 1 + longest, batch.offsets[row + 1] - batch.offsets[row]))
        drawn = [int(rng.choice(pools[min(max(place - answer, least), largest)])) for place in range(length)]
        forced.append([*prompts[row], *drawn[answer:]] if answers_only else drawn)
    return Depths("random answers" if answers_only else "random", {}, forced)


def _prompt_depths(tokens: pd.DataFrame) -> list[list[int]]:
    """The depths of each example's tokens before `<ans>`, in the order of examples."""
    return tokens[~tokens["is_answer"]].groupby("example")["exit_depth"].agg(list).tolist()


def oracle(tokens: pd.DataFrame, task: Task, batch: Batch) -> Depths:
    """The learned model's depths, dealt out anew: the hardest tokens of all answers get the deepest.

    Only for the dataset's own answers: while answering, nobody knows how hard the next token will be. Prompts keep the
    depths that the learned model gave them.

    Args:
        tokens: Token table of the learned model.
        batch: Examples, with their own answers.
    """
    labels = task.label(batch)
    prompts = _prompt_depths(tokens)
    given = np.sort(tokens.loc[tokens["is_answer"], "exit_depth"].to_numpy())
    where, hardness = [], []
    forced = []
    for row in range(len(batch)):
        first, last = int(batch.offsets[row]), int(batch.offsets[row + 1])
        kept = prompts[row]
        forced.append([*kept, *[0] * (last - first - 1 - len(kept)), 1])
        # To the position that predicts the last token, which itself is not run.
        for position in range(int(batch.answer_start[row]) - 1, last - first - 1):
            where.append((row, position))
            hardness.append(float(labels.token_difficulty[first + position]))
    rank = np.random.default_rng(0).permutation(len(where))
    order = np.lexsort((rank, np.array(hardness)))
    for place, depth in zip(order.tolist(), given.tolist(), strict=True):
        row, position = where[place]
        forced[row][position] = int(depth)
    return Depths("oracle", {}, forced)


def with_known_size_words(model: Any, task: Task, limit: int, largest: int) -> Any | None:
    """A copy of the model that reads words for sizes above `limit` as the one for `limit`; None if prompts say no size.

    Training had none of those words, so their embeddings are as they were drawn: without this, what a model does beyond
    the sizes of its training is in part what it does at a word that it does not know.
    """
    if task.size_word(limit) is None or largest <= limit:
        return None
    model = copy.deepcopy(model)
    embeddings = model.get_input_embeddings().weight.data
    for size in range(limit + 1, largest + 1):
        embeddings[task.size_word(size)] = embeddings[task.size_word(limit)]
    return model


def with_stability(model: Any, threshold: float) -> Any:
    """The same weights, exiting where a token has stopped moving."""
    config = copy.deepcopy(model.config)
    # `mode` looks at a whole q, which a rule that decides on the way does not have.
    config.decider, config.stability_threshold, config.exit_rule = "stability", threshold, "quantile"
    other = type(model)(config)
    missing = other.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert not missing, missing
    return other.to(device=model.device, dtype=model.dtype).eval()


def matched_stability(
    model: Any, task: Task, batch: Batch, bounds: dict[str, int], mean_depth: float, batch_size: int, seed: int
) -> Any:
    """The model with the stability threshold whose mean depth over all tokens is nearest to `mean_depth`.

    On some of the batch's examples. `bounds`: `min_depth` and `max_depth` to run it with, if not the config's. All
    processes have the main one's threshold.
    """
    some = take(batch, spread(_ROWS_FOR_THRESHOLD, len(batch)))
    low, high = 1e-4, 10.0
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        depths = Depths("stability", bounds)
        tokens, _ = run_examples(with_stability(model, middle), task, some, depths, 0, batch_size, seed)
        # The higher the threshold, the earlier a token counts as stable.
        low, high = (low, middle) if tokens["exit_depth"].mean() < mean_depth else (middle, high)
    (threshold,) = broadcast_object_list([(low * high) ** 0.5])
    return with_stability(model, threshold)


def histogram(tokens: pd.DataFrame) -> dict[str, list[int]]:
    """How many tokens got each depth, at answers and in all: {"answer": [depth 1, depth 2, ...], "all": ...}."""
    counts: dict[str, list[int]] = defaultdict(list)
    for name, rows in (("answer", tokens[tokens["is_answer"]]), ("all", tokens)):
        counts[name] = np.bincount(rows["exit_depth"])[1:].tolist()
    return dict(counts)
