"""`evaluate.load("evaluate/metrics/decision_timing")`: what depth is decided by."""

from typing import Any

import datasets
import evaluate
import pandas as pd

from .analysis import explain_depth

_DESCRIPTION = "A regression of depth on features of the instance and of the state, with size as categories."

_INPUTS = """
Args:
    predictions: depth of each token, in iterations.
    references: size of the token's example.
    examples: number of the token's example.
    features: {name: values of each token}; names end in `_static` or `_state`.
    places: where in the answer each token stands, any labels; without them there is no contrast given the place.
    resamples: of the bootstrap over examples.
    seed: of the bootstrap.

Returns:
    `r2`; under `terms`, for size, each feature, and all `static` and `state` ones: `alone`, `lost` (shares of variance)
    and `coefficient`, with intervals; `contrast`, `contrast_given_place`, `contrast_given_token`,
    `contrast_of_categories`; `left_out`; `reason` where nothing can be said.

Example:
    >>> metric = evaluate.load("evaluate/metrics/decision_timing")
    >>> frontier = [i % 5 for i in range(100)]
    >>> found = metric.compute(predictions=[2 * f for f in frontier], references=[3, 4] * 50,
    ...     examples=[i // 2 for i in range(100)], features={"frontier_state": frontier}, resamples=20)
    >>> round(found["terms"]["state"]["alone"]["value"], 3)
    1.0
"""


class DecisionTiming(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="ANIRA, arXiv 2602.08864, section 6.4",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float64"),
                    "references": datasets.Value("int64"),
                    "examples": datasets.Value("int64"),
                }
            ),
        )

    def _compute(
        self,
        predictions: list[float],
        references: list[int],
        examples: list[int],
        features: dict[str, list[float]],
        places: list[Any] | None = None,
        resamples: int = 200,
        seed: int = 0,
    ) -> dict[str, Any]:
        table = pd.DataFrame({"depth": predictions, "size": references, "example": examples, **features})
        if places is not None:
            table["place"] = places
        return explain_depth(table, resamples=resamples, seed=seed)
