"""The page of results and the README's table are made from what `docs/results` holds, and hold nothing else."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import results
import shares
from measures import EDITION
from report import ReportError, Run
from results import make_page, make_table, read_metrics, write_pages

from datasets_scripts.files import fill_block

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "docs" / "results"


def test_page_and_readme_are_made_from_the_metrics_beside_the_page():
    metrics = read_metrics(KEPT)
    assert metrics
    figures = {path.name for path in KEPT.glob("*.png")}
    assert (KEPT / "README.md").read_text() == make_page(metrics, figures)
    readme = (ROOT / "README.md").read_text()
    assert readme == fill_block(readme, "results", make_table(metrics))


def test_a_run_becomes_lines_of_every_table(tmp_path):
    """One with the metrics of an online run stands for `fixed`, and one for a third of D."""
    metrics = json.loads((ROOT / "checkpoints" / "brevo-mini-online" / "metrics.json").read_text())
    config = metrics["config"]
    worse = {**metrics["accuracy"], "value": 0.0}
    for name, own in {
        f"{config}-online": metrics,
        f"{config}-fixed": {**metrics, "decider": "fixed", "accuracy": {**worse, "value": 1.0}},
        f"{config}-fixed-third": {**metrics, "decider": "fixed", "accuracy": worse},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(own))
    readme = tmp_path / "front.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    write_pages(tmp_path, readme)
    page = readme.read_text()
    assert "before\n<!-- results -->\n| |" in page
    assert "old" not in page
    assert f"| {config}-online | " in page


def test_differences_have_newcombes_interval():
    """Of runs that do not say which rows they answered, as those of before 2026-11-26."""
    metrics = json.loads((ROOT / "checkpoints" / "brevo-mini-online" / "metrics.json").read_text())
    del metrics["correct"]
    config = metrics["config"]
    share = {"n": 1000, "low": None, "high": None}
    runs = {
        f"{config}-fixed": {**metrics, "decider": "fixed", "accuracy": {**share, "value": 0.97}},
        f"{config}-fixed-third": {**metrics, "decider": "fixed", "accuracy": {**share, "value": 0.92}},
    }
    # Newcombe (1998), method 10: from the Wilson intervals 0.9577..0.9789 and 0.9015..0.9353.
    page = make_page(runs, set())
    assert f"| {config}-fixed-third | {config}-fixed | -0.050 (-0.071 to -0.030) |" in page
    assert 'without "paired"' in page


def test_runs_that_say_which_rows_they_answered_are_compared_row_by_row():
    """Of 1,000 rows one run has 40 wrong, the other the same and 10 more: which independent samples might not show."""
    right = np.arange(1000) >= 40
    metrics = json.loads((ROOT / "checkpoints" / "brevo-mini-fixed" / "metrics.json").read_text())
    runs = {}
    for name, own in (("fixed", right), ("fixed-third", np.arange(1000) >= 50)):
        correct = pd.Series(own)
        runs[f"brevo-mini-{name}"] = {**metrics, "accuracy": shares.share_of(correct), "correct": shares.pack(correct)}
    page = make_page(runs, set())
    # The page once went on saying so when there was no such interval any more.
    assert 'without "paired"' not in page
    (line,) = (line for line in page.splitlines() if "third | brevo-mini-fixed |" in line)
    # McNemar: ten rows against none. The binomial's own interval of 10 in 1,000 is 0.005 to 0.018.
    low, high = (float(number) for number in re.search(r"-0\.010 \((.*) to (.*)\), paired", line).groups())
    assert low == pytest.approx(-0.016, abs=0.002)
    assert high == pytest.approx(-0.004, abs=0.002)
    # Where no row differs a bootstrap knows no doubt: once "0.000" of twenty rows. Newcombe: Wilson's 0.8389 to 1.
    same = shares.paired_difference(right[-20:], right[-20:])
    assert same == {"value": 0.0, "low": pytest.approx(-0.161, abs=1e-3), "high": pytest.approx(0.161, abs=1e-3)}


def test_runs_that_older_code_analysed_are_named_wherever_they_are_on_the_page():
    """Of ten runs on extrapolation six were of earlier code, and the page named only two that were none of them."""
    metrics = json.loads((ROOT / "checkpoints" / "brevo-mini-fixed" / "metrics.json").read_text())
    older = {**metrics, "analyses": {**metrics["analyses"], "edition": EDITION - 1}}
    newer = {**metrics, "analyses": {**metrics["analyses"], "edition": EDITION}}
    page = make_page({"brevo-mini-fixed": newer, "brevo-mini-x-base": older}, set())
    assert "Analysed by earlier code, their tables being lost, and not made again yet: brevo-mini-x-base." in page


def test_a_change_is_measured_beyond_the_sizes_of_training_against_the_plans_first_run():
    """Beyond the limit 300 of 1,000 rows are right in the base, 250 in the changed run; those within do not count."""
    metrics = json.loads((ROOT / "checkpoints" / "brevo-mini-fixed" / "metrics.json").read_text())

    depth = {"depth": 6.0, "depth_low": 6.0, "depth_high": 6.0}

    def run(*right):
        rows = [
            {"size": size, "n": 500, "accuracy": own / 500, "accuracy_low": 0.1, "accuracy_high": 0.9, **depth}
            for size, own in zip((8, 12, 16), right, strict=True)
        ]
        return {**metrics, "size_limit": 8, "analyses": {"generalization": {"by_size": rows}}}

    page = make_page({"brevo-mini-x-base": run(500, 250, 50), "brevo-mini-x-theta-100": run(400, 200, 50)}, set())
    (line,) = (line for line in page.splitlines() if line.startswith("| brevo-mini-x-theta-100 |"))
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2] == "`model.rope_parameters={rope_type: default, rope_theta: 100}`"
    assert [cell.split()[0] for cell in cells[4:8]] == ["0.800", "0.400", "0.100", "0.250"]
    # Newcombe (1998), method 10: from the Wilson intervals 0.2241..0.2778 and 0.2724..0.3291.
    assert cells[8] == "-0.050 (-0.089 to -0.011)"
    assert "## brevo-mini\n" not in page
    for failed in ({"by_size": []}, {"reason": "too few"}):
        with pytest.raises(ReportError, match="brevo-mini-x-base has no rows beyond"):
            make_page({"brevo-mini-x-base": {**metrics, "analyses": {"generalization": failed}}}, set())


def test_a_readme_without_marks_is_refused(tmp_path):
    readme = tmp_path / "front.md"
    readme.write_text("no marks")
    with pytest.raises(ReportError, match=r"front\.md cannot take the table: .*<!-- results -->"):
        write_pages(tmp_path, readme)


def test_figures_stay_as_they_are_where_a_run_was_evaluated_on_another_machine(tmp_path, monkeypatch, capsys):
    """One run on a new machine would have replaced figures of three by figures of one."""
    monkeypatch.setattr(results, "read_run", lambda folder: Run(str(folder), {}, {}, pd.DataFrame()))
    drawn = []
    monkeypatch.setattr(results, "FIGURES", {"cost": ("Cost", lambda runs: drawn.append([run.name for run in runs]))})
    kept, plan, readme = tmp_path / "kept", tmp_path / "plan", tmp_path / "front.md"
    readme.write_text("<!-- results -->\n<!-- /results -->\n")
    kept.mkdir()
    shutil.copy(KEPT / "brevo-mini-online.json", kept)
    (kept / "brevo-mini-cost.png").write_bytes(b"of online")

    def evaluate(name):
        (plan / name / "evaluation").mkdir(parents=True)
        shutil.copy(KEPT / f"{name}.json", plan / name / "evaluation" / "metrics.json")
        results.write_results([plan], kept, readme)

    evaluate("brevo-mini-fixed")
    assert "kept as they are: brevo-mini-online was evaluated elsewhere" in capsys.readouterr().out
    assert (kept / "brevo-mini-cost.png").read_bytes() == b"of online"
    assert not drawn
    evaluate("brevo-mini-online")
    assert drawn == [["online", "fixed"]]
