"""`evaluate.load("evaluate/metrics/generalization")`: accuracy and depth beyond the sizes of training."""

from typing import Any

import datasets
import evaluate
import pandas as pd

from .analysis import beyond_training, by_size

_DESCRIPTION = "Accuracy and mean depth by size, and how both change beyond the largest size of training."

_INPUTS = """
Args:
    predictions: mean depth of each example, in iterations.
    references: size of each example.
    correct: whether it was answered correctly.
    limit: largest size that training had.

Returns:
    `by_size`: accuracy and depth with 95 % intervals at every size; `beyond`: their change beyond the limit, a verdict.

Example:
    >>> metric = evaluate.load("evaluate/metrics/generalization")
    >>> found = metric.compute(predictions=[2, 2, 3, 4] * 20, references=[3, 3, 9, 9] * 20,
    ...     correct=[True, True, False, False] * 20, limit=5)
    >>> found["beyond"]["verdict"]
    'accuracy falls while depth rises'
"""


class Generalization(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="ANIRA, arXiv 2602.08864, section 6.2",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float64"),
                    "references": datasets.Value("int64"),
                    "correct": datasets.Value("bool"),
                }
            ),
        )

    def _compute(
        self, predictions: list[float], references: list[int], correct: list[bool], limit: int
    ) -> dict[str, Any]:
        table = pd.DataFrame({"depth": predictions, "size": references, "correct": correct})
        return {"by_size": by_size(table), "beyond": beyond_training(table, limit)}
