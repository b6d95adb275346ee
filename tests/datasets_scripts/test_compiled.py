"""Machine code that is kept on disk, and is never that of another source."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "datasets_scripts"

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import numba
from datasets_scripts import get_task, mano
assert mano.__file__.startswith(sys.argv[1]), mano.__file__
batch = get_task("mano-mini").generate("train", range(20))
kept = [value for value in vars(mano).values() if hasattr(value, "stats")]
misses = sum(len(own.stats.cache_misses) for own in kept)
print(misses, batch.tokens[:60].tolist(), numba.config.CACHE_DIR, sep="|")
"""


def generate(place: Path) -> tuple[int, str]:
    """How many functions a fresh process had to compile, and what they made."""
    command = [sys.executable, "-c", PROGRAM, str(place)]
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
    compiled, made = generate(copy)
    assert compiled
    assert generate(copy) == (0, made)

    randomness = copy / "datasets_scripts" / "randomness.py"
    changed = randomness.read_text().replace("+ np.uint64(attempt))", "+ np.uint64(attempt + 1))")
    assert changed != randomness.read_text()
    randomness.write_text(changed)
    compiled, other = generate(copy)
    assert compiled
    assert other != made


def test_where_nothing_can_be_kept_each_process_compiles(copy):
    (copy / "datasets_scripts" / "__pycache__").write_text("no folder")
    compiled, made = generate(copy)
    assert compiled
    assert generate(copy) == (compiled, made)
