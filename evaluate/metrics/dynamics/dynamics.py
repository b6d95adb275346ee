"""`evaluate.load("evaluate/metrics/dynamics")`: the phases of depth during training."""

from typing import Any

import datasets
import evaluate

from .analysis import find_phases

_DESCRIPTION = "Whether mean depth rises and then falls over training, and at which step it turns."

_INPUTS = """
Args:
    predictions: mean depth at each logged step, in iterations.
    references: the steps, ascending.
    accuracy: accuracy at each step.

Returns:
    `phases` ("rise, then fall", "fall", "rise" or "none"), `rise` to the peak and `fall` from it in iterations, their
    `scatter`, `turn` (the step from which depth falls) or None, `accuracy_change` up to the turn and from it, and a
    `reason` where nothing can be said.

Example:
    >>> metric = evaluate.load("evaluate/metrics/dynamics")
    >>> depth = [min(i, 30 - i) + 0.1 * (i % 3) for i in range(30)]
    >>> metric.compute(predictions=depth, references=list(range(30)), accuracy=[0.5] * 30)["phases"]
    'rise, then fall'
"""


class Dynamics(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="ANIRA, arXiv 2602.08864, section 6.3",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float64"),
                    "references": datasets.Value("float64"),
                    "accuracy": datasets.Value("float64"),
                }
            ),
        )

    def _compute(self, predictions: list[float], references: list[float], accuracy: list[float]) -> dict[str, Any]:
        return find_phases(references, predictions, accuracy)
