"""Puts evaluations side by side: one HTML page that opens offline, and its figures as PNG, each with its table as CSV.

    python evaluate/report.py build/evaluations/brevo-early build/evaluations/brevo-online --out build/report

Runs of one dataset's config are shown together; several configs become several chapters.
"""

import base64
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from claims import judge
from figures import FIGURES, Run
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from measures import read_evaluations
from pages import name_depths, parse_folders_first, show

from datasets_scripts.files import write_whole


@dataclass
class ReportArguments:
    """Make a report of evaluations."""

    runs: list[str] = field(metadata={"help": "Folders that evaluate/run.py wrote."})
    out: str = field(default="build/report", metadata={"help": "Folder of the report."})


_UNITS = {
    "per_example": "mean over the answer",
    "but_end": "mean over the answer without its end",
    "first": "at <ans> alone",
    "per_token": "each answer position, with its own difficulty",
}


class ReportError(ValueError):
    """Something that the user can mend."""


def read_run(folder: Path) -> Run:
    """A finished evaluation. Raises a ReportError if it is none."""
    path = folder / "metrics.json"
    if not path.is_file():
        raise ReportError(f"{folder} has no metrics.json: it is no finished evaluation. Let evaluate/run.py finish it.")
    metrics = json.loads(path.read_text())
    tables = {split: read_tables(folder, split) for split in metrics["splits"]}
    log = folder / "log.jsonl"
    return Run(str(folder), metrics, tables, read_evaluations(log) if log.is_file() else pd.DataFrame())


def read_tables(folder: Path, split: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(token table, example table) of a split of a finished evaluation. Raises a ReportError if one is missing."""
    paths = [folder / split / f"{kind}.parquet" for kind in ("tokens", "examples")]
    if not all(path.is_file() for path in paths):
        raise ReportError(f"{folder} has metrics.json, but not the tables that evaluate/run.py wrote beside it.")
    return pd.read_parquet(paths[0]), pd.read_parquet(paths[1])


def name_apart(runs: list[Run]) -> list[Run]:
    """The runs, named by as few of the last parts of their paths as tell them apart.

    The evaluation that lies in the folder of a training is named as the training.
    """
    paths = [Path(run.name).resolve() for run in runs]
    paths = [path.parent if path.name == "evaluation" else path for path in paths]
    if len(set(paths)) < len(paths):
        raise ReportError("A run is named twice.")
    count = next(n for n in range(1, 100) if len({path.parts[-n:] for path in paths}) == len(paths))
    return [replace(run, name="/".join(path.parts[-count:])) for run, path in zip(runs, paths, strict=True)]


def write_report(runs: list[Run], out: Path) -> Path:
    """Writes report.html and the figures of every chapter; the path of the page."""
    runs = name_apart(runs)
    chapters: dict[str, list[Run]] = {}
    for run in runs:
        chapters.setdefault(run.metrics["config"], []).append(run)
    for config, own in chapters.items():
        rows = {run.metrics["rows_digest"] for run in own}
        if len(rows) > 1:
            raise ReportError(f"The runs of {config} were made on different rows; report on them apart.")
    (out / "figures").mkdir(parents=True, exist_ok=True)
    content = [
        {
            "config": config,
            "claims": [claim for run in own for claim in judge(run.name, run.metrics)],
            "runs": [_summarize(run) for run in own],
            "alignment": [row for run in own for row in _list_alignment(run)],
            "controls": [row for run in own for row in _list_controls(run)],
            "figures": list(_draw_all(config, own, out / "figures")),
        }
        for config, own in chapters.items()
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html.jinja").render(chapters=content)
    write_whole(out / "report.html", page)
    return out / "report.html"


def _draw_all(config: str, runs: list[Run], folder: Path) -> list[dict[str, Any]]:
    """Draws what can be drawn, and says of the rest why not."""
    drawn = []
    for name, (title, draw) in FIGURES.items():
        found = draw(runs)
        if found is None:
            drawn.append({"title": title, "image": None, "table": None})
            continue
        figure, table = found
        stem = f"{config}-{name}"
        figure.savefig(folder / f"{stem}.png", dpi=130)
        plt.close(figure)
        table.to_csv(folder / f"{stem}.csv", index=False)
        image = base64.b64encode((folder / f"{stem}.png").read_bytes()).decode()
        drawn.append(
            {"title": title, "image": image, "table": f"figures/{stem}.csv", "note": (draw.__doc__ or "").strip()}
        )
    return drawn


def _summarize(run: Run) -> dict[str, Any]:
    metrics = run.metrics
    return {
        "name": run.name,
        "decider": metrics["decider"],
        "parameters": f"{metrics['parameters']:,}",
        "rows": metrics["rows"][metrics["splits"][0]],
        "accuracy": show(metrics["accuracy"], 3),
        "depth": show(metrics["depth"]),
        "but_end": show(metrics["analyses"]["places"].get("but_end")),
        "depth_all": show(metrics["depth_all"]),
        "max_depth": metrics["max_depth"],
        "flops": f"{metrics['flops'] / metrics['flops_full']:.0%}",
        "model": metrics["model"],
        "commit": (metrics["commit"] or "unknown")[:12],
        "versions": ", ".join(f"{name} {version}" for name, version in metrics["versions"].items()),
        "seconds": f"{metrics['wall_seconds']:.0f}",
    }


def _list_alignment(run: Run) -> list[dict[str, str]]:
    found = run.metrics["analyses"]["alignment"]
    if set(found) == {"reason"} or run.metrics["decider"] == "fixed":
        return []
    rows = []
    for unit, meaning in _UNITS.items():
        for subset in ("correct", "all"):
            own = found[unit]["exit_depth"][subset]
            rows.append(
                {
                    "run": run.name,
                    "items": f"{meaning}, {subset} items",
                    **{name.replace(" ", "_"): show(estimate) for name, estimate in own.items()},
                }
            )
    return rows


def _list_controls(run: Run) -> list[dict[str, str]]:
    return [
        {
            "run": run.name,
            "depths": name_depths(point["depths"]),
            "accuracy": show(point["accuracy"], 3),
            "depth": show(point["depth"]),
            "depth_all": show(point["depth_all"]),
            "flops": f"{point['flops_share']:.0%}",
            "given_nll": show(point["given_nll"], 3),
            "given_hit": show(point["given_hit"], 3),
        }
        for point in run.metrics["controls"]
    ]


def main() -> None:
    """Writes the report, and says where it is."""
    parsed = parse_folders_first(ReportArguments, "--runs")
    try:
        page = write_report([read_run(Path(folder)) for folder in parsed.runs], Path(parsed.out))
    except ReportError as error:
        sys.exit(f"report.py: {error}")
    print(f"Wrote {page}")


if __name__ == "__main__":
    main()
