"""Shares of rows, and differences of two of them, with 95 % intervals."""

import base64
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

Share = dict[str, Any]  # value, low, high; n rows


def share(right: int, count: int) -> Share:
    """`right` of `count` rows, with Wilson's interval."""
    low, high = proportion_confint(right, count, method="wilson")
    return {"value": right / count, "low": float(low), "high": float(high), "n": count}


def share_of(flags: pd.Series) -> Share:
    """The share of rows of a column of booleans that are true."""
    return share(int(flags.sum()), len(flags))


def pool(sizes: list[dict[str, Any]]) -> Share:
    """The share of rows that are right over sizes, each with its `accuracy` over `n` rows."""
    return share(sum(round(own["accuracy"] * own["n"]) for own in sizes), sum(own["n"] for own in sizes))


def part_at(limit: int, sizes: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The entries of `sizes`, each with its `size`, up to the largest size of training, and those beyond."""
    return [own for own in sizes if own["size"] <= limit], [own for own in sizes if own["size"] > limit]


def pack(flags: pd.Series) -> str:
    """A column of booleans as text, eight to a byte."""
    return base64.b64encode(np.packbits(flags.to_numpy(bool)).tobytes()).decode()


def unpack(packed: str, count: int) -> np.ndarray:
    """The (count,) booleans that `pack` was given."""
    return np.unpackbits(np.frombuffer(base64.b64decode(packed), np.uint8), count=count).astype(bool)


def difference(first: Share, second: Share) -> dict[str, float]:
    """The first share less the second, of other rows, with Newcombe's interval."""
    counts = [(round(own["value"] * own["n"]), own["n"]) for own in (first, second)]
    low, high = confint_proportions_2indep(*counts[0], *counts[1], method="newcomb")
    return {"value": first["value"] - second["value"], "low": float(low), "high": float(high)}


def paired_difference(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """The share of `first` less that of `second`, booleans (n,) of the same rows, with a bootstrap's interval.

    Where no row differs from another, a bootstrap knows no doubt: Newcombe's, as if the rows were others.
    """
    change = first.astype(float) - second
    value = float(change.mean())
    if np.ptp(change) == 0:
        return difference(*(share(int(own.sum()), len(own)) for own in (first, second)))
    found = bootstrap((change,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(0))
    return {"value": value, "low": float(found.confidence_interval.low), "high": float(found.confidence_interval.high)}
