"""Runs the exactness tests under every release of transformers and datasets that is promised: a table in README.md.

    python release/matrix.py                        # all combinations
    python release/matrix.py transformers-5.5.4     # some of them; the others stand in the table as they last ran

Each combination has an environment of its own in build/matrix, which holds what differs and falls back to the packages
of the environment that runs this command. It is kept: only what is new is installed again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
import venv
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from datasets_scripts.files import fill_block, write_whole

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
OUT = ROOT / "build" / "matrix"

OLDER_TRANSFORMERS = ("5.16.1", "5.10.4", "5.5.4")
REFUSED_TRANSFORMERS = "4.57.6"
OLDEST_DATASETS = "4.0.0"

MODEL_TESTS = tuple(
    f"tests/modeling_anira/test_{name}.py"
    for name in ("versions", "bad_input", "model", "exactness", "generation", "remote_code", "training", "ecosystem")
)
REFUSAL_TESTS = ("tests/modeling_anira/test_versions.py",)
TASK_TESTS = ("tests/datasets_scripts/test_build.py", "tests/datasets_scripts/test_streaming.py")


@dataclass(frozen=True)
class Combination:
    """A release of one library, beside the pinned releases of all others, and the tests to run with it."""

    library: str
    version: str
    tests: tuple[str, ...]
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.library}-{self.version}"

    @property
    def folder(self) -> Path:
        return OUT / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def report(self) -> Path:
        return OUT / f"{self.name}.xml"


def main() -> None:
    """Runs what is asked for, and writes the table anew after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="combinations to run, as transformers-5.5.4; default: all")
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    found = {combination.name: combination for combination in combinations()}
    if unknown := set(arguments.names) - set(found):
        parser.error(f"`names` is {sorted(unknown)}, but must be among {list(found)}.")
    for name in arguments.names or found:
        install(found[name])
        run_tests(found[name])
        table = make_table(found.values(), README.read_text())
        write_whole(README, fill_block(README.read_text(), "matrix", table))
        print(table, flush=True)
    ran = [found[name] for name in arguments.names or found]
    # One that ended without a report, as a crash of Python does, has not passed.
    if any(not combination.report.exists() or count(combination.report)["failed"] for combination in ran):
        raise SystemExit(1)


def combinations() -> Iterator[Combination]:
    """All of them, the newest first; the pinned release once, also when it is the newest."""
    for version in dict.fromkeys((newest("transformers"), pinned("transformers"), *OLDER_TRANSFORMERS)):
        yield Combination("transformers", version, MODEL_TESTS, note_pinned("transformers", version))
    yield Combination("transformers", REFUSED_TRANSFORMERS, REFUSAL_TESTS, "refused at import, with what to install")
    for version in dict.fromkeys((newest("datasets"), pinned("datasets"), newest("datasets<5"), OLDEST_DATASETS)):
        yield Combination("datasets", version, TASK_TESTS, note_pinned("datasets", version))


def newest(requirement: str) -> str:
    """The newest release that the package index has."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    done = subprocess.run([*command, "--report", "-", requirement], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)["install"][0]["metadata"]["version"]


def pinned(library: str) -> str:
    """The release in constraints.txt."""
    found = re.search(rf"^{library}==([^\s;]+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert found, f"{library} is not in constraints.txt"
    return found[1]


def note_pinned(library: str, version: str) -> str:
    """Says so of the release that constraints.txt names."""
    return "pinned" if version == pinned(library) else ""


def install(combination: Combination) -> None:
    """Makes the environment, unless it is there and whole."""
    stamp = combination.folder / ".complete"
    if not stamp.exists():
        venv.create(combination.folder, clear=True, symlinks=True)
        packages = sysconfig.get_path("purelib", vars={"base": str(combination.folder)})
        # Read after the environment's own packages, so that what is installed there comes first.
        Path(packages, "fallback.pth").write_text(sysconfig.get_path("purelib") + "\n")
        command = [str(combination.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*command, f"{combination.library}=={combination.version}"], env=environment(), check=True)
        stamp.touch()
    code = f"import {combination.library} as library; print(library.__version__)"
    found = subprocess.check_output([combination.python, "-c", code], env=environment(), text=True).strip()
    if Version(found) != Version(combination.version):
        raise RuntimeError(f"{combination.name}: {found} is imported. Remove {combination.folder}, and run this again.")


def run_tests(combination: Combination) -> None:
    """Runs the tests; what came of them is in the report."""
    print(f"{combination.name}: {len(combination.tests)} files of tests", flush=True)
    start = time.perf_counter()
    combination.report.unlink(missing_ok=True)
    command = [str(combination.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    subprocess.run(
        [*command, f"--junitxml={combination.report}", *combination.tests], cwd=ROOT, env=environment(), check=False
    )
    print(f"{combination.name}: {time.perf_counter() - start:.0f} s", flush=True)


def environment() -> dict[str, str]:
    """This process's, with the clone's own packages, which the fallback does not bring."""
    settings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return os.environ | settings


def count(report: Path) -> Counter[str]:
    """Tests by what became of them, in a report of pytest; `failed` holds errors too."""
    outcomes: Counter[str] = Counter()
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcomes["failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"] += 1
    return outcomes


def skip_reasons(report: Path) -> list[str]:
    """Why tests were skipped, each reason once."""
    return list(dict.fromkeys(skipped.attrib["message"] for skipped in ET.parse(report).iter("skipped")))


def make_table(known: Iterable[Combination], kept: str) -> str:
    """A Markdown table of what has run; where no report of it is here, its line is that of `kept`, a text with one."""
    lines = ["| | passed | failed | skipped | |", "| --- | --- | --- | --- | --- |"]
    before = kept.splitlines()
    for combination in known:
        name = f"| {combination.library} {combination.version} |"
        if not combination.report.exists():
            lines += [line for line in before if line.startswith(name)]
        else:
            outcomes = count(combination.report)
            notes = "; ".join(filter(None, [combination.note, *skip_reasons(combination.report)]))
            numbers = " | ".join(str(outcomes[kind]) for kind in ("passed", "failed", "skipped"))
            lines.append(f"{name} {numbers} | {notes} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
