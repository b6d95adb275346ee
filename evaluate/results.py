"""Writes docs/results, and the table of the README, from finished evaluations; no number in them is typed.

    python evaluate/results.py build/mini build/extrapolation

A run is a folder as release/experiments.py leaves it. OUT gets the metrics.json of every run, small figures, and the
page that is made from both.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml
from claims import ALIGNMENT, LEAST_ALIGNMENT, judge
from figures import FIGURES
from measures import EDITION
from pages import parse_folders_first, render
from report import ReportError, read_run
from shares import Share, difference, paired_difference, part_at, pool, unpack

from datasets_scripts.files import fill_block, write_whole

_HERE = Path(__file__).parent
_RELEASE = _HERE.parent / "release"
_PLAN, _EXTRAPOLATION = _RELEASE / "mini.yaml", _RELEASE / "extrapolation.yaml"

DECIDERS = ("online", "early", "fixed")
_DOTS_PER_INCH = 75

Metrics = dict[str, dict[str, Any]]  # metrics.json by the name of the run


@dataclass
class ResultsArguments:
    """Write the page of results."""

    plans: list[str] = field(metadata={"help": "Folders that release/experiments.py wrote."})
    out: str = field(default="docs/results", metadata={"help": "Folder of the page."})
    readme: str = field(default="README.md", metadata={"help": "The file whose table is written anew."})


def read_metrics(folder: Path) -> Metrics:
    """The metrics that were kept in a folder of results."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def make_page(metrics: Metrics, figures: set[str]) -> str:
    """The text of the page. `figures`: names of the images beside it."""
    planned, tried = (yaml.safe_load(plan.read_text()) for plan in (_PLAN, _EXTRAPOLATION))
    main = {name: own for name, own in metrics.items() if name not in tried}
    return render(
        _HERE / "results.md.jinja",
        chapters=[_make_chapter(config, main, figures) for config in _configs(main)],
        verdicts=_list_verdicts(main),
        rules={"alignment": ALIGNMENT[0], "least": LEAST_ALIGNMENT},
        changes=_compare_beyond({name: own for name, own in metrics.items() if name in tried}, tried),
        steps=_count_steps(tried),
        older=[name for name, own in metrics.items() if own["analyses"].get("edition", 1) < EDITION],
        missing=[name for name in (*planned, *tried) if name not in metrics],
    )


def make_table(metrics: Metrics) -> str:
    """The table of the README: one line a task and decider, seed 0, and `fixed` trained at a third of D."""
    names = [f"{config}-{kind}" for config in _configs(metrics) for kind in (*DECIDERS, "fixed-third")]
    rows = [
        (name, own, _control_accuracies(own), metrics.get(f"{own['config']}-fixed", {}).get("flops_full"))
        for name, own in ((name, metrics[name]) for name in names if name in metrics)
    ]
    return render(_HERE / "results_table.md.jinja", rows=rows)


def _control_accuracies(own: dict[str, Any]) -> dict[str, Any]:
    """Accuracy by kind of control; nothing if none was run."""
    return {row["depths"]: row["accuracy"] for row in own["controls"]}


def _configs(metrics: Metrics) -> list[str]:
    return sorted({own["config"] for own in metrics.values()})


def _make_chapter(config: str, metrics: Metrics, figures: set[str]) -> dict[str, Any]:
    """What the page says of one task. Raises a ReportError if its runs answered different rows."""
    runs = _of_task(config, metrics)
    if len({own["rows_digest"] for own in runs.values()}) > 1:
        raise ReportError(f"The runs of {config} were made on different rows; evaluate them on one dataset.")
    adaptive = {name: own for name, own in runs.items() if own["decider"] != "fixed"}
    return {
        "config": config,
        "runs": runs,
        "flops_full": runs[f"{config}-fixed"]["flops_full"] if f"{config}-fixed" in runs else None,
        "placed": {name: own for name, own in adaptive.items() if "but_end" in own["analyses"].get("places", {})},
        "aligned": {name: own for name, own in adaptive.items() if "features" in own["analyses"]["alignment"]},
        "constant": next((own["commonest_answer"] for own in runs.values() if "commonest_answer" in own), {}),
        "has_exact_distribution": all("kl" in own["given"] for own in runs.values()),
        "comparisons": _compare(config, runs),
        "claims": [claim for name, own in runs.items() for claim in judge(name, own)],
        "controls": [(name, row) for name, own in adaptive.items() for row in own["controls"]],
        "sizes": _sizes(next(iter(runs.values()))["size_limit"]),
        "by_size": {name: _by_size(own) for name, own in runs.items()},
        "by_size_known_words": {
            name: sizes for name, own in runs.items() if (sizes := _by_size(own, "by_size_known_words"))
        },
        "figures": [
            (title, f"{config}-{name}.png") for name, (title, _) in FIGURES.items() if f"{config}-{name}.png" in figures
        ],
    }


def _of_task(config: str, metrics: Metrics) -> Metrics:
    """The runs of a task, by seed and then by decider."""
    runs = {name: own for name, own in metrics.items() if own["config"] == config}

    def place(name: str) -> tuple[bool, int, str]:
        decider = runs[name]["decider"]
        return "-seed" in name, DECIDERS.index(decider) if decider in DECIDERS else len(DECIDERS), name

    return {name: runs[name] for name in sorted(runs, key=place)}


def _list_verdicts(metrics: Metrics) -> dict[str, dict[str, str]]:
    """The verdict on each finding, by analysis, of every run that speaks to one."""
    found = {}
    for config in _configs(metrics):
        for name, own in _of_task(config, metrics).items():
            claims = judge(name, own)
            if claims:
                found[name] = {claim.part: claim.holds for claim in claims}
    return found


def _by_size(own: dict[str, Any], rows: str = "by_size") -> dict[int, dict[str, Any]]:
    """{size: {"accuracy" and "depth": estimate}}; none if there are no such `rows`."""
    return {
        row["size"]: {
            kind: {"value": row[kind], "low": row[f"{kind}_low"], "high": row[f"{kind}_high"]}
            for kind in ("accuracy", "depth")
        }
        for row in own["analyses"]["generalization"].get(rows, [])
    }


def _compare(config: str, runs: Metrics) -> list[dict[str, Any]]:
    """Differences in accuracy between runs of the same seed, and the FLOPs of one as a share of the other's.

    Of the deciders and of `fixed` at a third of D from `fixed` at D; and of the deciders from that at a third.
    """
    found = []
    for seed in ("", "-seed1"):
        online, early, fixed, third = (f"{config}-{kind}{seed}" for kind in ("online", "early", "fixed", "fixed-third"))
        for run, less in ((online, fixed), (early, fixed), (third, fixed), (online, third), (early, third)):
            if {run, less} <= runs.keys():
                flops = runs[run]["flops"] / runs[less]["flops"]
                found.append({"run": run, "less": less, "flops": flops, **_subtract(runs[run], runs[less])})
    return found


def _subtract(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The first run's accuracy less the second's, on the same rows.

    `paired`: whether both say which rows they answered, as evaluations do since 2026-11-26; else the interval takes
    them for independent.
    """
    count = first["accuracy"]["n"]
    if "correct" in first and "correct" in second:
        both = (unpack(own["correct"], count) for own in (first, second))
        return {**paired_difference(*both), "paired": True}
    return {**difference(first["accuracy"], second["accuracy"]), "paired": False}


def _compare_beyond(metrics: Metrics, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """What each change does beyond the sizes of training: accuracy there, and its difference from the run without it.

    That is the one that has the most of its settings and no others, or else the plan's first.
    """
    base = next(iter(plan))
    usual = plan[base]["set"]
    pooled = {name: _pool_beyond(name, own) for name, own in metrics.items()}
    rows = []
    for name in plan.keys() & metrics.keys():
        settings = set(plan[name]["set"])
        simpler = [other for other in plan if set(plan[other]["set"]) < settings]
        less = max(simpler, key=lambda other: len(plan[other]["set"]), default=base)
        rows.append(
            {
                "run": name,
                "change": [setting for setting in plan[name]["set"] if setting not in usual],
                "accuracy": metrics[name]["accuracy"],
                "by_size": _by_size(metrics[name]),
                "sizes": _sizes(metrics[name]["size_limit"]),
                "beyond": pooled[name],
                "less": less if name != base else None,
                "difference": difference(pooled[name], pooled[less]) if name != base and less in pooled else None,
            }
        )
    return sorted(rows, key=lambda row: list(plan).index(row["run"]))


def _count_steps(plan: dict[str, Any]) -> dict[str, int]:
    """Steps of the plan's first run, and those of its recipe."""
    first = next(iter(plan.values()))
    recipe = yaml.safe_load((_RELEASE.parent / first["recipe"]).read_text())
    changed = dict(setting.split("=", 1) for setting in first["set"])
    return {"run": int(changed.get("steps", recipe["steps"])), "recipe": recipe["steps"]}


def _pool_beyond(name: str, own: dict[str, Any]) -> Share:
    """The accuracy over all rows beyond the sizes of training. Raises a ReportError if a run has none."""
    found = own["analyses"]["generalization"].get("by_size", [])
    _, rows = part_at(own["size_limit"], found)
    if not rows:
        raise ReportError(f"The run {name} has no rows beyond the sizes of its training; evaluate it on those too.")
    return pool(rows)


def _sizes(limit: int) -> tuple[int, int, int]:
    """The largest size of training, and 1.5 and 2 times of it."""
    return limit, -(-3 * limit // 2), 2 * limit


def write_results(plans: list[Path], out: Path, readme: Path) -> None:
    """Takes over metrics and draws figures of all finished runs, then writes page and table."""
    folders = {
        path.parent.parent.name: path.parent for plan in plans for path in plan.glob("*/evaluation/metrics.json")
    }
    if not folders:
        raise ReportError(f"{', '.join(map(str, plans))} has no evaluated run; let release/experiments.py finish one.")
    out.mkdir(parents=True, exist_ok=True)
    texts = {name: (folder / "metrics.json").read_text() for name, folder in folders.items()}
    for name, text in texts.items():
        write_whole(out / f"{name}.json", text)
    for config in _configs({name: json.loads(text) for name, text in texts.items()}):
        drawn = [f"{config}-{decider}" for decider in DECIDERS if (out / f"{config}-{decider}.json").exists()]
        if elsewhere := [name for name in drawn if name not in folders]:
            print(f"The figures of {config} are kept as they are: {', '.join(elsewhere)} was evaluated elsewhere.")
        else:
            _draw(config, [folders[name] for name in drawn], out)
    write_pages(out, readme)


def _draw(config: str, folders: list[Path], out: Path) -> None:
    """The figures of evaluations of one task."""
    runs = [replace(read_run(folder), name=folder.parent.name.removeprefix(f"{config}-")) for folder in folders]
    for name, (_, draw) in FIGURES.items() if runs else ():
        found, path = draw(runs), out / f"{config}-{name}.png"
        path.unlink(missing_ok=True)
        if found is not None:
            found[0].savefig(path, dpi=_DOTS_PER_INCH)
            plt.close(found[0])


def write_pages(out: Path, readme: Path) -> None:
    """Writes the page of `out`, and the table of the README, from what `out` holds."""
    metrics = read_metrics(out)
    write_whole(out / "README.md", make_page(metrics, {path.name for path in out.glob("*.png")}))
    try:
        text = fill_block(readme.read_text(), "results", make_table(metrics))
    except ValueError as error:
        raise ReportError(f"{readme} cannot take the table: {error}") from error
    write_whole(readme, text)


def main() -> None:
    """Writes the page. What the user can mend ends in one sentence."""
    parsed = parse_folders_first(ResultsArguments, "--plans")
    try:
        write_results([Path(plan) for plan in parsed.plans], Path(parsed.out), Path(parsed.readme))
    except (ReportError, OSError) as error:
        sys.exit(f"results.py: {error}")
    print(f"Wrote {parsed.out}/README.md")


if __name__ == "__main__":
    main()
