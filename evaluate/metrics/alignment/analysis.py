"""Does depth follow difficulty? Rank correlations with intervals (ANIRA section 6.1)."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse, stats

# A share of resamples in which a correlation may be undefined; with more, the interval would rest on the others alone.
_UNDEFINED = 0.05
# Of a size, to count in a correlation where all weigh the same.
_LEAST_EXAMPLES = 30

Estimate = dict[str, Any]  # value, low, high (95 %), n, and reason where value is None
Statistic = Callable[[np.ndarray], float]  # Of how often each row occurs.


def align(
    table: pd.DataFrame,
    depth: str = "depth",
    against: tuple[str, ...] = ("size", "difficulty"),
    given: tuple[tuple[str, ...], ...] = (("size",),),
    resamples: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """Spearman's correlation of depth with each column of `against`, and its partial ones.

    Args:
        table: One row a token (or example): `example`, `correct`, `depth`, and the columns of `against`.
        depth: Column of the depths, allocated or expected, in iterations.
        given: Columns held constant together, in a partial correlation for each such group of columns; their values are
            taken as categories.
        resamples: Of the bootstrap, which draws examples, not tokens, with replacement.

    Returns:
        {"correct" or "all": {name, "name given size", "name given size and length", or "size balanced": estimate}}: on
        items answered correctly, as in the paper, and on all, which has no selection in it.
    """
    found: dict[str, Any] = {}
    for subset, rows in (("correct", table[table["correct"].astype(bool)]), ("all", table)):
        found[subset] = {}
        for name in against:
            found[subset][name] = estimate(rows, spearman, (depth, name), resamples, seed)
            for held in given:
                if name not in held:
                    controlled = estimate(rows, partial_spearman, (depth, name, *held), resamples, seed)
                    found[subset][f"{name} given {' and '.join(held)}"] = controlled
        if "size" in against:
            found[subset]["size balanced"] = _estimate_balanced(rows, depth, resamples, seed)
    return found


def _estimate_balanced(rows: pd.DataFrame, depth: str, resamples: int, seed: int) -> Estimate:
    """`balanced_spearman` with size, over those with examples enough: one of seven would weigh as one of 2,000."""
    known = rows.groupby("size")["example"].transform("nunique") >= _LEAST_EXAMPLES
    if rows["size"][known].nunique() < 2:
        return _undefined(f"fewer than two sizes have {_LEAST_EXAMPLES} examples", int(known.sum()))
    return estimate(rows[known], balanced_spearman, (depth, "size"), resamples, seed)


def spearman(depth: np.ndarray, other: np.ndarray) -> Statistic:
    """Spearman's correlation of rows, each of which occurs so often; NaN if either is constant.

    It takes numbers (rows,), and is a function of repeats (rows,), as for the partial one.
    """
    left, right = _rank(depth), _rank(other)
    return lambda repeats: _correlate(left(repeats), right(repeats), repeats)


def balanced_spearman(depth: np.ndarray, size: np.ndarray) -> Statistic:
    """Spearman's correlation where each size weighs the same, however many rows have it; NaN if either is constant.

    Of small sizes few different instances exist: where each occurs once, nearly all rows are of the one or two largest,
    and the plain correlation is that within so narrow a range.
    """
    left, right = _rank(depth), _rank(size)
    groups = np.unique(size, return_inverse=True)[1]

    def correlate(repeats: np.ndarray) -> float:
        # A size that does not occur has no rows to weigh.
        weights = repeats / np.maximum(np.bincount(groups, repeats), 1)[groups]
        return _correlate(left(weights), right(weights), weights)

    return correlate


def partial_spearman(depth: np.ndarray, other: np.ndarray, *given: np.ndarray) -> Statistic:
    """The correlation of ranks left after each group of equal `given` is centred; NaN if nothing varies within groups.

    So whatever `given` alone explains, linear or not, is gone.
    """
    left, right = _rank(depth), _rank(other)
    groups = np.unique(np.stack(given), axis=1, return_inverse=True)[1].ravel()

    def centre(ranks: np.ndarray, repeats: np.ndarray) -> np.ndarray:
        # A group that does not occur has no mean, and no weight.
        means = np.bincount(groups, ranks * repeats) / np.maximum(np.bincount(groups, repeats), 1)
        return ranks - means[groups]

    return lambda repeats: _correlate(centre(left(repeats), repeats), centre(right(repeats), repeats), repeats)


def _rank(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The rank of each row, the mean of those that are tied, as a function of how often each occurs (or its weight)."""
    values = np.asarray(values, dtype=float)
    codes = np.unique(values, return_inverse=True)[1]

    def rank(repeats: np.ndarray) -> np.ndarray:
        counts = np.bincount(codes, repeats)
        ranks = np.cumsum(counts) - (counts - 1) / 2
        return np.where(np.isnan(values), np.nan, ranks[codes])

    return rank


def _correlate(left: np.ndarray, right: np.ndarray, weights: np.ndarray) -> float:
    """Pearson's correlation of rows of such weights; NaN if either is constant, but for rounding."""
    covariance = np.cov(left, right, ddof=0, aweights=weights)
    variances = np.diag(covariance)
    return float(covariance[0, 1] / np.sqrt(variances.prod())) if variances.min() > 1e-9 else float("nan")


def estimate(
    rows: pd.DataFrame,
    statistic: Callable[..., Statistic],
    columns: tuple[str, ...],
    resamples: int,
    seed: int,
) -> Estimate:
    """`statistic` of columns of the rows, with a 95 % percentile interval over resampled examples; never a NaN.

    Args:
        rows: `example`, and the columns, of numbers.
        statistic: It takes the columns, and is then a function of how often each of their rows occurs. So a resample
            costs no more than there are different rows, which are few where depths are whole.
    """
    if not len(rows):
        return _undefined("there are no items", 0)
    examples, names = pd.factorize(rows["example"], sort=True)
    alike = rows.groupby(list(columns), sort=False, dropna=False)
    kinds = alike.size().index.to_frame()
    # (kinds, examples): how often each kind of row is in each example.
    counts = sparse.coo_array((np.ones(len(rows)), (alike.ngroup(), examples))).tocsr()
    of_kinds = statistic(*(kinds[column].to_numpy() for column in columns))
    value = of_kinds(counts.sum(axis=1))
    if not np.isfinite(value):
        return _undefined("depth or the other quantity is constant", len(rows))
    if len(names) < 10:
        return {
            "value": value,
            "low": None,
            "high": None,
            "n": len(rows),
            "reason": "fewer than 10 examples: no interval",
        }
    with warnings.catch_warnings():
        # Of resamples in which nothing varies: they are counted below.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        drawn = stats.bootstrap(
            (np.arange(len(names)),),
            lambda chosen: of_kinds(counts @ np.bincount(chosen, minlength=len(names))),
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
