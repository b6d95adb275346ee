"""Two phases of training: depth rises while the task is learnt, then falls at equal accuracy (ANIRA section 6.3)."""

import itertools
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

_LEAST_POINTS = 9
# A rise or fall counts if it is as large, in iterations, and as many times the scatter about the fitted curve. Noise
# whose neighbouring points are alike, as those of training are, seldom reaches it (a test draws some).
LEAST_CHANGE = 0.25
_LEAST_OVER_SCATTER = 10.0
# Where so much of the fall is done, depth has turned.
_TURNED = 0.1


def find_phases(steps: list[float], depth: list[float], accuracy: list[float] | None = None) -> dict[str, Any]:
    """How far mean depth rises to its highest and falls from it, by the curve with one peak that fits it best.

    The curve is of least squares among all that rise, if at all, up to some step and fall, if at all, after it,
    whatever their shape.

    Args:
        steps: Ascending steps of the log.
        depth: Mean depth at each, in iterations.
        accuracy: Accuracy at each, if known.

    Returns:
        `phases`: "rise, then fall" (the paper's two), "fall", "rise", "none"; None if nothing can be said. `rise`,
        `fall`: iterations from the first point up to the peak, and from there down to the last; `scatter`: standard
        deviation of the points about the curve. `turn`: where depth falls, the last step before a tenth of the fall is
        done; else None. `accuracy_change`: up to the turn, and from it; without a turn that of the whole. `reason`.
    """
    y = np.asarray(depth, float)
    if len(y) < _LEAST_POINTS:
        return _nothing(f"{len(y)} points; at least {_LEAST_POINTS} are needed")
    if np.ptp(y) < 1e-9:
        return _nothing("depth is constant")
    curve = fit_peak(y)
    levels = 1 + int((np.abs(np.diff(curve)) > 1e-12).sum())
    scatter = float(np.sqrt(((y - curve) ** 2).sum() / max(1, len(y) - levels)))
    rise, fall = float(curve.max() - curve[0]), float(curve.max() - curve[-1])
    least = max(LEAST_CHANGE, _LEAST_OVER_SCATTER * scatter)
    seen = [name for name, change in (("rise", rise), ("fall", fall)) if change >= least]
    turn = None
    if "fall" in seen:
        turn = int(np.flatnonzero(curve > curve.max() - _TURNED * fall)[-1])
    return {
        "phases": ", then ".join(seen) or "none",
        "rise": rise,
        "fall": fall,
        "scatter": scatter,
        "turn": None if turn is None else float(steps[turn]),
        "accuracy_change": _changes(accuracy, [0, len(y) - 1] if turn is None else [0, turn, len(y) - 1]),
        "reason": ""
        if seen
        else f"rise and fall are below {least:.2f} iterations, as noise of such a scatter would be",
    }


def fit_peak(y: np.ndarray) -> np.ndarray:
    """(n,) -> (n,): the curve of least squares that never falls before some point, and never rises after it."""
    curves = [
        np.concatenate([_isotonic(y[:peak], rising=True), _isotonic(y[peak:], rising=False)])
        for peak in range(len(y) + 1)
    ]
    return min(curves, key=lambda curve: float(((y - curve) ** 2).sum()))


def _isotonic(y: np.ndarray, rising: bool) -> np.ndarray:
    return isotonic_regression(y, increasing=rising).x if len(y) else y


def _changes(accuracy: list[float] | None, ends: list[int]) -> list[float] | None:
    if accuracy is None:
        return None
    return [float(accuracy[end] - accuracy[start]) for start, end in itertools.pairwise(ends)]


def _nothing(reason: str) -> dict[str, Any]:
    nothing = dict.fromkeys(("phases", "rise", "fall", "scatter", "turn", "accuracy_change"))
    return {**nothing, "reason": reason}
