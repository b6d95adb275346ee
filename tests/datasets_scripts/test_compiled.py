"""Machine code that is kept on disk, and is never that of another source."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "datasets_scripts"

PROGRAM = """
import sys
place, before, what = sys.argv[1:]
sys.path.insert(0, place)
import numba, numpy as np
from datasets_scripts import get_task, mano, randomness
assert mano.__file__.startswith(place), mano.__file__
exec(before)
if what == "state":
    made = np.zeros(1, np.uint64)
    randomness.open_state(made, np.uint64(1), 2, 3)
else:
    made = get_task(what).generate("train", range(20)).tokens[:60]
kept = [own for module in (mano, randomness) for own in vars(module).values() if hasattr(own, "stats")]
misses = sum(len(own.stats.cache_misses) for own in kept)
print(misses, made.tolist(), numba.config.CACHE_DIR, sep="|")
"""


def generate(place: Path, before: str = "", what: str = "state") -> tuple[int, str]:
    """How many functions a fresh process had to compile, and what they made.

    `before`: what it does first, having imported. `what`: a task, or the state of a generator, compiled in a second.
    """
    command = [sys.executable, "-c", PROGRAM, str(place), before, what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    misses, made, configured = done.stdout.strip().split("|")
    assert configured == "", "numba's own setting must be left as it was"
    return int(misses), made


@pytest.fixture
def copy(tmp_path):
    """The package in a place of its own, without what was compiled before."""
    shutil.copytree(PACKAGE, tmp_path / "datasets_scripts", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_a_second_process_compiles_nothing_and_a_change_in_another_file_is_seen(copy):
    """numba's own cache knows one file a function: after a change of `open_state`, MANO's data were those of before."""
    compiled, made = generate(copy, what="mano-mini")
    assert compiled
    assert generate(copy, what="mano-mini") == (0, made)

    randomness = copy / "datasets_scripts" / "randomness.py"
    changed = randomness.read_text().replace("+ np.uint64(attempt))", "+ np.uint64(attempt + 1))")
    assert changed != randomness.read_text()
    randomness.write_text(changed)
    compiled, other = generate(copy, what="mano-mini")
    assert compiled
    assert other != made


def test_where_nothing_can_be_kept_each_process_compiles(copy):
    (copy / "datasets_scripts" / "__pycache__").write_text("no folder")
    compiled, made = generate(copy)
    assert compiled
    assert generate(copy) == (compiled, made)


def test_what_was_cut_short_is_made_again_and_a_full_disk_costs_no_more_than_the_time(copy):
    """Both ended every call of a generator in an error from inside numba, though all can be compiled again."""
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
    compiled, made = generate(copy, before=full)
    assert compiled
    assert generate(copy)[1] == made

    kept = sorted((copy / "datasets_scripts" / "__pycache__").rglob("*.nb[ci]"))
    assert kept
    for path in kept:
        path.write_bytes(path.read_bytes()[:20])
    assert generate(copy) == (compiled, made)
    assert generate(copy) == (0, made)


def test_a_lock_file_of_an_editor_is_no_source(copy):
    """Emacs' is a link to nowhere, and the import ended in it."""
    (copy / "datasets_scripts" / ".#brevo.py").symlink_to("someone@somewhere.1:1")
    assert generate(copy)[0]
