"""The pictures of a report. Each function draws one figure and gives the table behind it."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pages import name_depths

_COLORS = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
_DEPTHS = plt.get_cmap("YlOrRd")
_TOKENS_A_LINE = 26
_LINES = 6
_LEAST_SHARE = 0.01
_PANELS_A_LINE = 3
# What fits into one line above a figure of twelve inches.
_LEGEND_CHARACTERS = 150


@dataclass(frozen=True)
class Run:
    """A finished evaluation.

    Args:
        name: What figures call it.
        metrics: metrics.json.
        tables: (token table, example table) by split.
        log: `step`, `depth`, `depth_all`, `accuracy` of the training's evaluations; empty if not known.
    """

    name: str
    metrics: dict[str, Any]
    tables: dict[str, tuple[pd.DataFrame, pd.DataFrame]]
    log: pd.DataFrame

    @property
    def main(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The tables of the split that is analysed."""
        return self.tables[self.metrics["splits"][0]]


Drawn = tuple[Figure, pd.DataFrame] | None


def draw_tokens(runs: Sequence[Run]) -> Drawn:
    """A hard example, and how many iterations each run gave each of its tokens."""
    example = _choose_example(runs)
    rows = []
    for run in runs:
        tokens = run.main[0]
        own = tokens[tokens["example"] == example]
        rows.append(
            own.assign(run=run.name)[["run", "position", "token", "is_answer", "exit_depth", "token_difficulty"]]
        )
    table = pd.concat(rows, ignore_index=True)
    heights = [int(np.ceil(len(own) / _TOKENS_A_LINE)) for own in rows]
    figure, axes = plt.subplots(
        len(runs), 1, figsize=(11, 0.75 * sum(heights) + 0.55 * len(runs)), height_ratios=heights, squeeze=False
    )
    deepest = max(run.metrics["max_depth"] for run in runs)
    for run, own, axis in zip(runs, rows, axes[:, 0], strict=True):
        _draw_boxes(axis, own, deepest, run.name)
    figure.tight_layout()
    return figure, table


def draw_alignment(runs: Sequence[Run]) -> Drawn:
    """Mean depth against size, difficulty of the example, and difficulty of the token, where they vary.

    Without runs whose depth is one; a value that less than one in a hundred answer tokens has is left out.
    """
    colors = {run.name: _COLORS[_place(runs, run.name)] for run in runs}
    runs = [run for run in runs if run.metrics["decider"] != "fixed"]
    panels: tuple[tuple[str, str], ...] = (
        ("size", "size of the example"),
        ("difficulty", "difficulty of the example"),
        ("token_difficulty", "difficulty of the token"),
    )
    panels = tuple(panel for panel in panels if any(run.main[0][panel[0]].nunique() > 1 for run in runs))
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.8), sharey=True, squeeze=False)
    parts = []
    for axis, (column, label) in zip(axes[0], panels, strict=True):
        for run in runs:
            answers = run.main[0][run.main[0]["is_answer"]]
            values = answers[column]
            if values.nunique() > 15:
                values = pd.cut(values, 12).map(lambda interval: interval.mid).astype(float)
            common = values.map(values.value_counts(normalize=True)) >= _LEAST_SHARE
            found = _mean_by(answers.assign(**{column: values})[common], column)
            axis.errorbar(
                found[column],
                found["mean"],
                yerr=found["margin"],
                marker="o",
                ms=4,
                color=colors[run.name],
                label=run.name,
            )
            parts.append(found.rename(columns={column: "value"}).assign(against=column, run=run.name))
        axis.set_xlabel(label)
    axes[0, 0].set_ylabel("iterations per answer token")
    put_legend(figure, axes[0, 0])
    return figure, pd.concat(parts, ignore_index=True)


def draw_generalization(runs: Sequence[Run]) -> Drawn:
    """Accuracy and mean depth by size, with the limit of training marked. Nothing where answers are sampled.

    There size is that of what the model wrote.
    """
    runs = [run for run in runs if "by_size" in run.metrics["analyses"]["generalization"]]
    if not runs or any("kl" in run.metrics["given"] for run in runs):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(12, 3.8))
    parts = []
    for color, run in zip(itertools.cycle(_COLORS), runs, strict=False):
        found = pd.DataFrame(run.metrics["analyses"]["generalization"]["by_size"]).assign(run=run.name)
        for axis, name in zip(axes, ("accuracy", "depth"), strict=True):
            axis.plot(found["size"], found[name].astype(float), marker="o", ms=4, color=color, label=run.name)
            low, high = found[f"{name}_low"].astype(float), found[f"{name}_high"].astype(float)
            axis.fill_between(found["size"], low, high, color=color, alpha=0.2)
        parts.append(found)
    for axis in axes:
        axis.axvline(runs[0].metrics["size_limit"] + 0.5, color="gray", ls="--", lw=1)
        axis.set_xlabel("size of the example (dashed: limit of training)")
    axes[0].set_ylabel("accuracy")
    axes[0].set_ylim(-0.03, 1.03)
    axes[1].set_ylabel("iterations, without the answer's end")
    put_legend(figure, axes[0])
    return figure, pd.concat(parts, ignore_index=True)


def draw_phases(runs: Sequence[Run]) -> Drawn:
    """Depth and accuracy over training, with the turn that was found."""
    logged = [(color, run) for color, run in zip(itertools.cycle(_COLORS), runs, strict=False) if len(run.log)]
    if not logged:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(12, 3.8))
    for color, run in logged:
        axes[0].plot(run.log["step"], run.log["depth"], marker=".", color=color, label=run.name)
        axes[1].plot(run.log["step"], run.log["accuracy"], marker=".", color=color, label=run.name)
        turn = run.metrics["analyses"]["dynamics"].get("turn")
        if turn is not None:
            axes[0].axvline(turn, color=color, ls=":", lw=1)
    axes[0].set_ylabel("iterations per answer token")
    axes[1].set_ylabel("accuracy, validation")
    axes[1].set_ylim(-0.03, 1.03)
    for axis in axes:
        axis.set_xlabel("training step (dotted: turn)")
    put_legend(figure, axes[0])
    return figure, pd.concat([run.log.assign(run=run.name) for _, run in logged], ignore_index=True)


def draw_decision_timing(runs: Sequence[Run]) -> Drawn:
    """Shares of the variance of expected depth: what each term explains alone, and what is lost without it."""
    rows = []
    for run in runs:
        found = run.metrics["analyses"]["decision_timing"].get("expected_depth", {})
        for term, shares in found.get("terms", {}).items():
            for kind in ("alone", "lost"):
                rows.append({"run": run.name, "term": term, "kind": kind, **shares[kind]})
    table = pd.DataFrame(rows)
    if not len(table):
        return None
    terms = list(dict.fromkeys(table["term"]))
    names = list(dict.fromkeys(table["run"]))
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.3 * len(terms) * max(1, len(names)) ** 0.5 + 1.6), sharey=True)
    width = 0.8 / len(names)
    for axis, kind, title in zip(axes, ("alone", "lost"), ("explained alone", "lost without it"), strict=True):
        for number, name in enumerate(names):
            own = table[(table["run"] == name) & (table["kind"] == kind)].set_index("term")
            places = [terms.index(term) + (number - (len(names) - 1) / 2) * width for term in own.index]
            margins = np.abs(own[["low", "high"]].to_numpy().T - own["value"].to_numpy())
            axis.barh(
                places,
                own["value"],
                width,
                xerr=margins,
                color=_COLORS[_place(runs, name)],
                label=name,
                error_kw={"lw": 0.8},
            )
        axis.set_xlabel(f"share of the variance of depth, {title}")
    axes[0].set_yticks(range(len(terms)), [term.replace("_", " ") for term in terms])
    axes[0].invert_yaxis()
    put_legend(figure, axes[0])
    return figure, table


def draw_cost(runs: Sequence[Run]) -> Drawn:
    """Accuracy against FLOPs: sweeps of each checkpoint (on fewer rows), and the controls (on all)."""
    table = _list_costs(runs)
    if not len(table):
        return None
    names = list(dict.fromkeys(table["run"]))
    lines, columns = -(-len(names) // _PANELS_A_LINE), min(len(names), _PANELS_A_LINE)
    size = (max(9.0, 4.4 * columns + 1.6), 3.9 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, sharey=True, squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        _draw_costs(axis, table[table["run"] == name], name)
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy")
    kinds = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    axes[0, -1].legend(kinds.values(), kinds.keys(), fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    return figure, table


FIGURES: dict[str, tuple[str, Callable[[Sequence[Run]], Drawn]]] = {
    "tokens": ("How deep each token went", draw_tokens),
    "alignment": ("Depth against size and difficulty", draw_alignment),
    "generalization": ("Across the limit of training", draw_generalization),
    "phases": ("Depth and accuracy during training", draw_phases),
    "decision_timing": ("What depth is decided by", draw_decision_timing),
    "cost": ("Accuracy against compute", draw_cost),
}


def _choose_example(runs: Sequence[Run]) -> int:
    """An example that all runs have, short enough to be drawn, hard, and answered correctly by as many as can be."""
    shared = set.intersection(*(set(run.main[1]["example"]) for run in runs))
    first = runs[0].main[1].set_index("example").loc[sorted(shared)]
    right = sum(run.main[1].set_index("example").loc[sorted(shared), "correct"].astype(int) for run in runs)
    fits = first[first["num_tokens"] <= _TOKENS_A_LINE * _LINES]
    candidates = fits if len(fits) else first
    best = candidates.assign(right=right).sort_values(
        ["right", "difficulty", "num_tokens"], ascending=[False, False, True]
    )
    return int(best.index[0])


def _list_costs(runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each point of a sweep, and for each control that has an accuracy."""
    rows = []
    for run in runs:
        for point in run.metrics["sweep"]:
            rows.append({"run": run.name, "kind": point["setting"], "label": point["value"], **_pick(point)})
        for point in run.metrics["controls"]:
            if point["accuracy"]["value"] is not None:
                rows.append({"run": run.name, "kind": "control", "label": name_depths(point["depths"]), **_pick(point)})
    return pd.DataFrame(rows)


def _draw_costs(axis: Axes, own: pd.DataFrame, name: str) -> None:
    """One run's sweeps as lines, its controls as single markers."""
    for kind, style, color in (("exit_quantile", "-o", _COLORS[0]), ("max_depth", "--s", _COLORS[1])):
        points = own[own["kind"] == kind].sort_values("flops_share")
        label = kind.replace("_", " ")
        if len(points):
            axis.plot(points["flops_share"], points["accuracy"], style, ms=4, lw=1, color=color, label=label)
    for marker, (_, point) in zip("*XDPv", own[own["kind"] == "control"].iterrows(), strict=False):
        axis.scatter(point["flops_share"], point["accuracy"], marker=marker, s=70, zorder=3, label=str(point["label"]))
    axis.set_title(name)
    axis.set_xlabel("FLOPs, share of full depth")
    axis.set_ylim(-0.03, 1.03)


def _draw_boxes(axis: Axes, own: pd.DataFrame, deepest: int, name: str) -> None:
    """Tokens as boxes, line by line, coloured by depth; those that predict the answer have a dark frame."""
    for number, (_, token) in enumerate(own.iterrows()):
        line, column = divmod(number, _TOKENS_A_LINE)
        share = (token["exit_depth"] - 1) / max(1, deepest - 1)
        edge, width = ("black", 1.6) if token["is_answer"] else ("white", 0.8)
        axis.add_patch(
            plt.Rectangle((column, -line - 1), 0.96, 0.92, fc=_DEPTHS(0.05 + 0.85 * share), ec=edge, lw=width)
        )
        color = "white" if share > 0.65 else "black"
        axis.text(column + 0.48, -line - 0.38, token["token"], ha="center", va="center", fontsize=7, color=color)
        axis.text(
            column + 0.48, -line - 0.78, str(token["exit_depth"]), ha="center", va="center", fontsize=7, color=color
        )
    axis.set_xlim(0, _TOKENS_A_LINE)
    axis.set_ylim(-np.ceil(len(own) / _TOKENS_A_LINE) - 0.1, 0)
    axis.set_title(
        f"{name}: the word, and below it the iterations it got of {deepest}; framed: predicts the answer",
        fontsize=9,
        loc="left",
    )
    axis.axis("off")


def _mean_by(answers: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean depth at every value, with 1.96 standard errors over examples."""
    by_example = answers.groupby([column, "example"])["exit_depth"].mean()
    found = by_example.groupby(level=0).agg(["mean", "std", "count"]).reset_index()
    found["margin"] = (1.96 * found["std"] / np.sqrt(found["count"])).fillna(0.0)
    return found[[column, "mean", "margin", "count"]]


def _pick(point: dict[str, Any]) -> dict[str, Any]:
    return {
        "accuracy": point["accuracy"]["value"],
        "flops_share": point["flops_share"],
        "depth": point["depth"]["value"],
    }


def _place(runs: Sequence[Run], name: str) -> int:
    return [run.name for run in runs].index(name) % len(_COLORS)


def put_legend(figure: Figure, axis: Axes) -> None:
    """The runs' names above the figure, in as many lines as it takes."""
    handles, labels = axis.get_legend_handles_labels()
    columns = max(1, min(len(labels), _LEGEND_CHARACTERS // (max(map(len, labels)) + 8)))
    lines = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * (lines - 1))
    figure.tight_layout(rect=(0, 0, 1, 1 - (0.1 + 0.2 * lines) / figure.get_figheight()))
    figure.legend(handles, labels, loc="upper center", ncols=columns, frameon=False, fontsize=9)
