"""Shares of rows, and differences of two of them, with 95 % intervals."""

from typing import Any

import pandas as pd
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

Share = dict[str, Any]  # value, low, high; n rows


def share(right: int, count: int) -> Share:
    """`right` of `count` rows, with Wilson's interval."""
    low, high = proportion_confint(right, count, method="wilson")
    return {"value": right / count, "low": float(low), "high": float(high), "n": count}


def share_of(flags: pd.Series) -> Share:
    """The share of rows of a column of booleans that are true."""
    return share(int(flags.sum()), len(flags))


def difference(first: Share, second: Share) -> dict[str, float]:
    """The first share less the second, of other rows or models, with Newcombe's interval."""
    counts = [(round(own["value"] * own["n"]), own["n"]) for own in (first, second)]
    low, high = confint_proportions_2indep(*counts[0], *counts[1], method="newcomb")
    return {"value": first["value"] - second["value"], "low": float(low), "high": float(high)}
