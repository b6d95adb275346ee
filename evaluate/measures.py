"""The four analyses of a finished run, by the metrics' own functions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from metrics.alignment.analysis import align
from metrics.decision_timing.analysis import STATE, STATIC, explain_depth
from metrics.dynamics.analysis import find_phases
from metrics.generalization.analysis import beyond_training, by_size
from scipy import stats

from datasets_scripts.files import read_json_lines
from datasets_scripts.vocabulary import EOS, WORDS

Tables = dict[str, tuple[pd.DataFrame, pd.DataFrame]]

# Depth as allocated; as the decider expected it on the path taken; and as it would have with all tokens at D.
DEPTHS = ("exit_depth", "expected_depth", "expected_depth_full")
PLACES = FIRST, MIDDLE, END = "first", "middle", "end"
# One more whenever the same tables would give other figures: those of an older edition are named as such.
EDITION = 2


def measure(
    tables: Tables,
    given: tuple[pd.DataFrame, pd.DataFrame] | None,
    split: str,
    limit: int,
    log: Path | None,
    arguments: Any,
    known_words: Tables | None = None,
) -> dict[str, Any]:
    """All four, and mean depth by place.

    What cannot be measured has None, or nothing, with a `reason`; it takes nothing else with it.

    Args:
        tables: (token table, example table) by split.
        given: The tables of the dataset's own answers: where answers are sampled, alignment and decision timing are
            measured on these.
        split: The one that both are measured on.
        limit: Largest size of training.
        log: log.jsonl of the training, if known.
        known_words: The tables of sizes beyond training, with words for those sizes read as a known one's
            (`controls.with_known_size_words`).
    """
    tokens, examples = tables[split] if given is None else given
    answers = add_places(tokens)
    return {
        "edition": EDITION,
        "places": _guard(lambda: measure_places(tokens, answers)),
        "alignment": _guard(lambda: measure_alignment(answers, examples, arguments)),
        "generalization": _guard(lambda: measure_generalization(tables, limit, given is not None, known_words)),
        "dynamics": _guard(lambda: measure_dynamics(log)),
        "decision_timing": _guard(
            lambda: {depth: measure_timing(answers, depth, arguments) for depth in _list_different(answers)}
        ),
    }


def measure_places(tokens: pd.DataFrame, answers: pd.DataFrame) -> dict[str, Any]:
    """Mean depth over the prompt, and over each place of the answers; `but_end` is over all but their end.

    `answers`: as in `measure_alignment`.
    """
    places = {place: answers[answers["place"] == place] for place in PLACES}
    parts = {"prompt": tokens[~tokens["is_answer"]], **places, "but_end": answers[answers["place"] != END]}
    return {name: mean_depth(rows) for name, rows in parts.items()}


def mean_depth(rows: pd.DataFrame) -> dict[str, Any]:
    """Mean depth over rows of a token table, with a 95 % percentile interval of a bootstrap over examples."""
    if not len(rows):
        return {"value": None, "low": None, "high": None, "n": 0, "reason": "there are no such tokens"}
    sums = rows.groupby("example")["exit_depth"].agg(["sum", "count"])
    depths, counts = sums["sum"].to_numpy(float), sums["count"].to_numpy(float)
    value = float(depths.sum() / counts.sum())
    if len(sums) < 2:
        return {"value": value, "low": None, "high": None, "n": len(sums)}
    drawn = stats.bootstrap(
        (depths, counts),
        lambda depths, counts, axis: depths.sum(axis) / counts.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=1000,
        batch=100,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return {"value": value, "low": float(drawn.low), "high": float(drawn.high), "n": len(sums)}


def measure_alignment(answers: pd.DataFrame, examples: pd.DataFrame, arguments: Any) -> dict[str, Any]:
    """Correlations of depth, per example and per token.

    `answers`: the token table of the answers, with their places (`add_places`).

    Per example, depth is the mean over the answer (`per_example`, also as it was expected); over all but the position
    that predicts its end (`but_end`), which is easy and weighs the more the shorter the answer is; or that at `<ans>`
    alone (`first`). `given length` holds the number of the answer's tokens constant. `per_token` is with the difficulty
    of each token; `features`, per token as well, with each feature of the task, such as the level of the constituent
    that ends there. `given cell` holds the place of a token constant, and with it the length of the answer, as `given
    size` does the size. As size hides behind place, and place behind size, both are also held at once.
    """
    units = {
        "per_example": (answers, DEPTHS[:2]),
        "but_end": (answers[answers["place"] != END], DEPTHS[:1]),
        "first": (answers[answers["place"] == FIRST], DEPTHS[:1]),
    }
    facts = examples.set_index("example")[["size", "difficulty", "correct"]]
    facts = facts.assign(length=answers.groupby("example").size())
    found = {}
    for unit, (rows, depths) in units.items():
        table = rows.groupby("example")[list(depths)].mean().join(facts).reset_index()
        found[unit] = _align(table, arguments, depths, given=(("size",), ("length",), ("size", "length")))
    tokens = answers.assign(difficulty=answers["token_difficulty"])
    held = (("size",), ("cell",), ("size", "cell"))
    found["per_token"] = _align(tokens, arguments, DEPTHS[:1], given=held)
    found["features"] = _align(answers, arguments, DEPTHS[:1], tuple(_features(answers)), held)
    return found


def _align(
    table: pd.DataFrame,
    arguments: Any,
    depths: tuple[str, ...],
    against: tuple[str, ...] = ("size", "difficulty"),
    given: tuple[tuple[str, ...], ...] = (("size",),),
) -> dict[str, Any]:
    return {
        depth: align(table, depth, against, given, resamples=arguments.resamples, seed=arguments.seed)
        for depth in depths
    }


def add_places(tokens: pd.DataFrame) -> pd.DataFrame:
    """The rows of the token table that predict answers, with two columns for where in its answer a token stands.

    `place` is one of PLACES: at `<ans>`, between, or the last, where the answer's end is predicted, or was due in an
    answer that was cut; `cell` is a number for each pair of distances from either end: answers of another length have
    other cells.
    """
    answers = tokens[tokens["is_answer"]]
    from_start = answers.groupby("example").cumcount()
    to_end = answers.groupby("example").cumcount(ascending=False)
    place = np.select([to_end == 0, from_start == 0], [END, FIRST], MIDDLE)
    return answers.assign(place=place, cell=from_start * (to_end.max() + 1) + to_end)


def has_end(examples: pd.DataFrame) -> pd.Series:
    """Whether each answer has its end, rather than being cut where the longest answer of its size would end."""
    return examples["text"].str.endswith(f" {WORDS[EOS]}")


def measure_generalization(
    tables: Tables, limit: int, sampled: bool, known_words: Tables | None = None
) -> dict[str, Any]:
    """Accuracy and depth by size, and their change beyond `limit`.

    Depth is the mean over the answer without the place of its end (`beyond`), which is easy, and whose share grows as
    answers get shorter; of an answer that is nothing else it is the end's. `beyond_ended`: the same of answers that
    end. `beyond_first`: depth at `<ans>` alone, which every answer has. `beyond_known_words`, `by_size_known_words`: of
    the answers where words for larger sizes are read as a known one, if there are. Where answers are sampled, size is
    that of what the model wrote, and no prompt asks for more than training had: then nothing is said of beyond.
    """
    every = pd.concat([_without_end(*both) for both in tables.values()], ignore_index=True)
    found = {"by_size": by_size(every)}
    if sampled:
        reason = "answers are sampled: their size is what the model wrote, not what was asked for"
        return {**found, "beyond": {"verdict": None, "reason": reason}}
    parts = {
        "beyond": every,
        "beyond_ended": every[has_end(every)],
        "beyond_first": every.assign(depth=every["first"]),
    }
    if known_words:
        known = pd.concat([_without_end(*both) for both in (tables | known_words).values()], ignore_index=True)
        parts["beyond_known_words"], found["by_size_known_words"] = known, by_size(known)
    return {**found, **{name: beyond_training(rows, limit) for name, rows in parts.items()}}


def _without_end(tokens: pd.DataFrame, examples: pd.DataFrame) -> pd.DataFrame:
    """The example table with `depth` over the answer without its end, unless that is all it is, and at `<ans>`."""
    answers = add_places(tokens)
    first = answers.groupby("example")["exit_depth"].first()
    depth = answers[answers["place"] != END].groupby("example")["exit_depth"].mean().reindex(first.index).fillna(first)
    own = examples["example"]
    return examples.assign(depth=own.map(depth), first=own.map(first).astype(float))


def measure_dynamics(log: Path | None) -> dict[str, Any]:
    """The phases of depth at answers, by the evaluations on the validation split that were made on the way."""
    if log is None:
        return {"phases": None, "reason": "no log.jsonl of the training was found; --training_log says where it is"}
    points = read_evaluations(log)
    if not len(points):
        return {"phases": None, "reason": f"{log} has no evaluations"}
    return find_phases(points["step"].tolist(), points["depth"].tolist(), points["accuracy"].tolist())


def read_evaluations(log: Path) -> pd.DataFrame:
    """`step`, `depth`, `depth_all`, `accuracy` of the validation split on the way."""
    return pd.DataFrame(
        [
            {name: line[name] for name in ("step", "depth", "depth_all", "accuracy")}
            for line in read_json_lines(log)
            if line.get("kind") == "evaluation" and line.get("split") == "validation"
        ]
    )


def _list_different(answers: pd.DataFrame) -> list[str]:
    """The depths that are not another's copy: what an early decider expects does not hang on the path."""
    return [
        depth
        for number, depth in enumerate(DEPTHS)
        if not any(answers[depth].equals(answers[other]) for other in DEPTHS[:number])
    ]


def measure_timing(answers: pd.DataFrame, depth: str, arguments: Any) -> dict[str, Any]:
    """The regression on the task's features."""
    features = _features(answers)
    if not features:
        return {"r2": None, "terms": {}, "contrast": None, "reason": "the text has no features"}
    table = answers[["example", "size", "place", depth, *features]]
    return explain_depth(table, depth, arguments.resamples, arguments.seed)


def _features(table: pd.DataFrame) -> list[str]:
    return [str(name) for name in table.columns if str(name).endswith((STATIC, STATE))]


def _guard(compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return compute()
    except Exception as error:
        return {"reason": f"{type(error).__name__}: {error}"}
