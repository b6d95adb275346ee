"""Runs the analyses of finished evaluations again, from the tables that they kept, after a change of an analysis.

    python evaluate/analyse.py build/mini/*/evaluation

Answers and controls stay as they are: `commit` in metrics.json goes on naming the code that they were made with, and
`analyses_commit` names the one of the analyses.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from measures import measure
from pages import parse_folders_first
from report import ReportError, read_run, read_tables
from run import KNOWN_WORDS, read_commit, without_nan
from tqdm import tqdm

from datasets_scripts.files import write_whole


@dataclass
class AnalysisArguments:
    """Analyse finished evaluations again."""

    folders: list[str] = field(metadata={"help": "Folders that evaluate/run.py wrote."})


def analyse(folder: Path) -> dict[str, Any]:
    """What metrics.json of a finished evaluation holds with its analyses made anew.

    Raises a ReportError if it is none.
    """
    run, log = read_run(folder), folder / "log.jsonl"
    metrics, main_split = run.metrics, run.metrics["splits"][0]
    given = read_tables(folder, f"{main_split}-given") if "kl" in metrics["given"] else None
    known = {
        split: read_tables(folder, f"{split}{KNOWN_WORDS}")
        for split in run.tables
        if (folder / f"{split}{KNOWN_WORDS}").is_dir()
    }
    arguments = SimpleNamespace(seed=metrics["seed"], resamples=metrics["options"]["resamples"])
    log_or_none = log if log.is_file() else None
    analyses = measure(run.tables, given, main_split, metrics["size_limit"], log_or_none, arguments, known)
    return metrics | {"analyses": without_nan(analyses), "analyses_commit": read_commit()}


def main() -> None:
    """Writes each metrics.json anew. What the user can mend ends in one sentence."""
    parsed = parse_folders_first(AnalysisArguments, "--folders")
    try:
        for folder in tqdm([Path(folder) for folder in parsed.folders], unit="evaluation"):
            write_whole(folder / "metrics.json", json.dumps(analyse(folder), indent=1))
    except (ReportError, OSError) as error:
        sys.exit(f"analyse.py: {error}")


if __name__ == "__main__":
    main()
