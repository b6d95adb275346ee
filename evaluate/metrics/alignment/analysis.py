"""Does depth follow difficulty? Rank correlations with intervals (ANIRA section 6.1)."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

# A share of resamples in which a correlation may be undefined; with more, the interval would rest on the others alone.
_UNDEFINED = 0.05

Estimate = dict[str, Any]  # value, low, high (95 %), n, and reason where value is None


def align(
    table: pd.DataFrame,
    depth: str = "depth",
    against: tuple[str, ...] = ("size", "difficulty"),
    given: tuple[str, ...] = ("size",),
    resamples: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Spearman's correlation of depth with each column of `against`, and its partial ones.

    Args:
        table: One row a token (or example): `example`, `correct`, `depth`, and the columns of `against`.
        depth: Column of the depths, allocated or expected, in iterations.
        given: Columns held constant, each in a partial correlation of its own; their values are taken as categories.
        resamples: Of the bootstrap, which draws examples, not tokens, with replacement.

    Returns:
        {"correct" or "all": {name or "name given size": estimate}}: on items answered correctly, as in the paper, and
        on all, which has no selection in it.
    """
    found: dict[str, Any] = {}
    right = table["correct"].astype(bool)
    # Resampling copies all columns, of which a table of tokens has many.
    table = table[list(dict.fromkeys(["example", depth, *against, *given]))]
    for subset, rows in (("correct", table[right]), ("all", table)):
        found[subset] = {}
        for name in against:
            found[subset][name] = estimate(rows, partial(_correlate, depth, name), resamples, seed)
            for held in given:
                if name != held:
                    controlled = partial(_correlate, depth, name, given=held)
                    found[subset][f"{name} given {held}"] = estimate(rows, controlled, resamples, seed)
    return found


def _correlate(depth: str, other: str, rows: pd.DataFrame, given: str | None = None) -> float:
    if given is None:
        return spearman(rows[depth], rows[other])
    return partial_spearman(rows[depth], rows[other], rows[given])


def spearman(depth: pd.Series, other: pd.Series) -> float:
    """Spearman's correlation; NaN if either is constant."""
    if depth.nunique() < 2 or other.nunique() < 2:
        return float("nan")
    return float(stats.spearmanr(depth, other).statistic)


def partial_spearman(depth: pd.Series, other: pd.Series, given: pd.Series) -> float:
    """The correlation of ranks left after each group of equal `given` is centred; NaN if nothing varies within groups.

    So whatever `given` alone explains, linear or not, is gone.
    """
    left, right = (values.rank() - values.rank().groupby(given).transform("mean") for values in (depth, other))
    if np.ptp(left) < 1e-9 or np.ptp(right) < 1e-9:
        return float("nan")
    return float(stats.pearsonr(left, right).statistic)


def estimate(rows: pd.DataFrame, statistic: Callable[[pd.DataFrame], float], resamples: int, seed: int) -> Estimate:
    """`statistic` of the rows, with a 95 % percentile interval over resampled examples; never a NaN."""
    if not len(rows):
        return _undefined("there are no items", 0)
    value = statistic(rows)
    if not np.isfinite(value):
        return _undefined("depth or the other quantity is constant", len(rows))
    places = list(rows.reset_index(drop=True).groupby("example").indices.values())
    if len(places) < 10:
        return {
            "value": value,
            "low": None,
            "high": None,
            "n": len(rows),
            "reason": "fewer than 10 examples: no interval",
        }

    def resample(chosen: np.ndarray) -> float:
        return statistic(rows.iloc[np.concatenate([places[example] for example in chosen])])

    with warnings.catch_warnings():
        # Of resamples in which nothing varies: they are counted below.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        drawn = stats.bootstrap(
            (np.arange(len(places)),),
            resample,
            n_resamples=resamples,
            vectorized=False,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).bootstrap_distribution
    if np.isnan(drawn).mean() > _UNDEFINED:
        reason = "constant in too many resamples: no interval"
        return {"value": value, "low": None, "high": None, "n": len(rows), "reason": reason}
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high), "n": len(rows), "reason": ""}


def _undefined(reason: str, n: int) -> Estimate:
    return {"value": None, "low": None, "high": None, "n": n, "reason": reason}
