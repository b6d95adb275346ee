"""What happens beyond the sizes of training: accuracy and depth by size (ANIRA section 6.2)."""

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint


def by_size(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Accuracy (with Wilson's 95 % interval) and mean depth (with a bootstrap's, over examples) at every size.

    Args:
        table: One row an example: `size`, `correct`, `depth` (its mean depth, in iterations; NaN where it has none).
    """
    rows = []
    for size, group in table.groupby("size"):
        right, count = int(group["correct"].sum()), len(group)
        low, high = proportion_confint(right, count, method="wilson")
        depths = group["depth"].dropna().to_numpy(float)
        depth_low, depth_high = _mean_interval(depths)
        rows.append(
            {
                "size": int(size),
                "n": count,
                "accuracy": right / count,
                "accuracy_low": float(low),
                "accuracy_high": float(high),
                "depth": float(depths.mean()) if len(depths) else None,
                "depth_low": depth_low,
                "depth_high": depth_high,
            }
        )
    return rows


def beyond_training(table: pd.DataFrame, limit: int) -> dict[str, Any]:
    """How accuracy and depth change beyond the largest size of training.

    Args:
        table: As for `by_size`.
        limit: Largest size that training had.

    Returns:
        `accuracy_within`, `accuracy_beyond`, `depth_within`, `depth_beyond`; `accuracy_change`, `depth_change` and
        `depth_slope` (iterations a size, beyond the limit), each with `value`, `low`, `high` (95 %); and `verdict`:
        "accuracy falls while depth rises", or what else is seen. None with a `reason` where a side has no two examples.
    """
    within, beyond = table[table["size"] <= limit], table[table["size"] > limit]
    for side, rows in (("within", within), ("beyond", beyond)):
        count = int(rows["depth"].notna().sum())
        if count < 2:
            reason = f"{count} examples {side} the limit"
            return {"accuracy_change": None, "depth_change": None, "verdict": None, "reason": reason}
    counts = [int(beyond["correct"].sum()), len(beyond), int(within["correct"].sum()), len(within)]
    low, high = confint_proportions_2indep(*counts, compare="diff", method="newcomb")
    accuracy = {"value": counts[0] / counts[1] - counts[2] / counts[3], "low": float(low), "high": float(high)}
    within, beyond = (side.dropna(subset=["depth"]) for side in (within, beyond))
    depth = _mean_change(within["depth"].to_numpy(float), beyond["depth"].to_numpy(float))
    return {
        "accuracy_within": counts[2] / counts[3],
        "accuracy_beyond": counts[0] / counts[1],
        "depth_within": float(within["depth"].mean()),
        "depth_beyond": float(beyond["depth"].mean()),
        "accuracy_change": accuracy,
        "depth_change": depth,
        "depth_slope": _slope(beyond),
        "verdict": f"accuracy {_direction(accuracy)} while depth {_direction(depth)}",
        "reason": "",
    }


def _mean_interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """A 95 % percentile interval of a mean, by a bootstrap; None for a single value."""
    if len(values) < 2:
        return None, None
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=1000, batch=100, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(found.low), float(found.high)


def _mean_change(within: np.ndarray, beyond: np.ndarray) -> dict[str, float]:
    """Welch's interval for the difference of means; a difference of constants is exact."""
    value = float(beyond.mean() - within.mean())
    if np.ptp(within) == 0 and np.ptp(beyond) == 0:
        return {"value": value, "low": value, "high": value}
    interval = stats.ttest_ind(beyond, within, equal_var=False).confidence_interval()
    return {"value": value, "low": float(interval.low), "high": float(interval.high)}


def _slope(beyond: pd.DataFrame) -> dict[str, float] | None:
    """Least-squares slope of depth over the sizes beyond the limit, exact for one depth.

    None if there is one size, or two examples, through which a line always goes.
    """
    if beyond["size"].nunique() < 2 or len(beyond) < 3:
        return None
    if beyond["depth"].nunique() == 1:
        return {"value": 0.0, "low": 0.0, "high": 0.0}
    fit = stats.linregress(beyond["size"], beyond["depth"])
    margin = float(stats.t.ppf(0.975, len(beyond) - 2) * fit.stderr)
    return {"value": float(fit.slope), "low": float(fit.slope - margin), "high": float(fit.slope + margin)}


def _direction(change: dict[str, float]) -> str:
    if change["low"] > 0:
        return "rises"
    return "falls" if change["high"] < 0 else "stays"
