"""`evaluate.load("evaluate/metrics/alignment")`: does depth follow difficulty?"""

from typing import Any

import datasets
import evaluate
import pandas as pd

from .analysis import align

_DESCRIPTION = (
    "Spearman's correlation of the depth of tokens with size and difficulty, also given size, with intervals."
)

_INPUTS = """
Args:
    predictions: depth of each token, in iterations, allocated or expected.
    references: difficulty of each token.
    sizes: size of the token's example.
    examples: number of the token's example; the bootstrap draws examples.
    correct: whether the example was answered correctly.
    resamples: of the bootstrap.
    seed: of the bootstrap.

Returns:
    For "correct" items and for "all": an estimate (value, low, high, n, reason) of "size", "size balanced" (each size
    of 30 examples or more weighs the same), "difficulty" and "difficulty given size". `value` is None, with a reason,
    where a correlation is not defined.

Example:
    >>> metric = evaluate.load("evaluate/metrics/alignment")
    >>> rows = range(40)
    >>> found = metric.compute(predictions=[i % 4 for i in rows], references=[i % 4 for i in rows], sizes=[3] * 40,
    ...     examples=list(rows), correct=[True] * 40, resamples=20)
    >>> round(found["all"]["difficulty"]["value"], 3)
    1.0
"""


class Alignment(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="ANIRA, arXiv 2602.08864, section 6.1",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float64"),
                    "references": datasets.Value("float64"),
                    "sizes": datasets.Value("int64"),
                    "examples": datasets.Value("int64"),
                    "correct": datasets.Value("bool"),
                }
            ),
        )

    def _compute(
        self,
        predictions: list[float],
        references: list[float],
        sizes: list[int],
        examples: list[int],
        correct: list[bool],
        resamples: int = 500,
        seed: int = 0,
    ) -> dict[str, Any]:
        table = pd.DataFrame(
            {"depth": predictions, "difficulty": references, "size": sizes, "example": examples, "correct": correct}
        )
        return align(table, resamples=resamples, seed=seed)
