"""Two phases of training: depth rises while the task is learnt, then falls at equal accuracy (ANIRA section 6.3)."""

from typing import Any

import numpy as np
import statsmodels.api as sm
from scipy import stats

# A slope counts, and two lines are better than one, at this level.
_LEVEL = 0.01
# Points that each phase must have: so many, and this share of all.
_LEAST = 4
_LEAST_SHARE = 0.1


def find_phases(steps: list[float], depth: list[float], accuracy: list[float] | None = None) -> dict[str, Any]:
    """Fits one line, and two that meet at a turn, to mean depth over training steps.

    Args:
        steps: Ascending steps of the log.
        depth: Mean depth at each, in iterations.
        accuracy: Accuracy at each, if known.

    Returns:
        `phases`: "rise, then fall" (the paper's two), "fall", "rise", "none", or a pair of "rise", "flat", "fall"; None
        if nothing can be said. `turn`: the step at which the lines meet, with `low` and `high`, steps whose fit is not
        worse (F, 95 %), or None. `slopes`: iterations per 1,000 steps of each phase. `accuracy_change`: that of each
        phase, from its first to its last point. `reason`.
    """
    t, y = np.asarray(steps, float), np.asarray(depth, float)
    if len(t) < 2 * _LEAST + 1:
        return _nothing(f"{len(t)} points; at least {2 * _LEAST + 1} are needed")
    if np.ptp(y) < 1e-9:
        return _nothing("depth is constant")
    line = _fit(t, y, None)
    least = max(_LEAST, round(_LEAST_SHARE * len(t)))
    knots = t[least:-least]
    fits = [_fit(t, y, knot) for knot in knots]
    errors = np.array([fit.ssr for fit in fits])
    best = int(errors.argmin())
    # Neighbouring steps are alike: so many independent points the curve is worth.
    residuals = np.asarray(fits[best].resid)
    alike = 0.0
    if np.ptp(residuals) > 1e-9 * np.ptp(y):
        alike = min(max(float(np.corrcoef(residuals[1:], residuals[:-1])[0, 1]), 0.0), 0.99)
    worth = len(t) * (1 - alike) / (1 + alike)
    # Two lines have two numbers more than one: a slope, and where they meet.
    freedom = worth - 4
    if freedom < 1:
        return _nothing("neighbouring steps are too alike to tell a turn from drift")
    gain = (line.ssr - errors[best]) / 2 / max(errors[best] / freedom, 1e-12)
    fit, turn, place = fits[best], float(knots[best]), least + best
    second = fit.t_test([0, 1, 1])
    slopes = [float(fit.params[1]), float(np.squeeze(second.effect))]
    directions = [_direction(slopes[0], fit.pvalues[1]), _direction(slopes[1], float(np.squeeze(second.pvalue)))]
    # The turn was chosen among many, each of which had its chance to look good (Bonferroni).
    if stats.f.sf(gain, 2, freedom) * len(knots) > _LEVEL or directions[0] == directions[1]:
        direction = _direction(line.params[1], line.pvalues[1])
        return {
            "phases": "none" if direction == "flat" else direction,
            "turn": None,
            "slopes": [float(line.params[1]) * 1000],
            "accuracy_change": _changes(accuracy, [(0, len(t) - 1)]),
            "reason": "two lines are not better than one, or go the same way",
        }
    limit = errors[best] * (1 + stats.f.ppf(0.95, 1, freedom) / freedom)
    near = knots[errors <= limit]
    return {
        "phases": ", then ".join(directions),
        "turn": {"value": turn, "low": float(near.min()), "high": float(near.max())},
        "slopes": [slope * 1000 for slope in slopes],
        "accuracy_change": _changes(accuracy, [(0, place), (place, len(t) - 1)]),
        "reason": "",
    }


def _fit(t: np.ndarray, y: np.ndarray, knot: float | None) -> Any:
    """Least squares of y on a line, or on two that meet at `knot`; allows for errors alike at neighbouring steps."""
    columns = [np.ones_like(t), t - t[0]] + ([] if knot is None else [np.maximum(0, t - knot)])
    lags = int(4 * (len(t) / 100) ** (2 / 9))
    return sm.OLS(y, np.column_stack(columns)).fit(cov_type="HAC", cov_kwds={"maxlags": lags})


def _direction(slope: float, p_value: float) -> str:
    if not np.isfinite(p_value) or p_value > _LEVEL:
        return "flat"
    return "rise" if slope > 0 else "fall"


def _changes(accuracy: list[float] | None, phases: list[tuple[int, int]]) -> list[float] | None:
    return None if accuracy is None else [float(accuracy[end] - accuracy[start]) for start, end in phases]


def _nothing(reason: str) -> dict[str, Any]:
    return {"phases": None, "turn": None, "slopes": [], "accuracy_change": None, "reason": reason}
