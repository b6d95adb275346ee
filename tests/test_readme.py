"""Every Python block of README and CONTRIBUTING runs, in order, in one fresh process, as a reader would paste them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_code_blocks_run(name, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)
    assert blocks
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    # Blocks name folders of the clone; what they write belongs elsewhere.
    for folder in ("evaluate", "checkpoints"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "card", sorted((ROOT / "evaluate" / "metrics").glob("*/README.md")), ids=lambda path: path.parent.name
)
def test_code_of_metric_cards_runs(card, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", card.read_text(), flags=re.DOTALL)
    script = tmp_path / "card.py"
    script.write_text("\n".join(blocks))
    (tmp_path / "evaluate").symlink_to(ROOT / "evaluate")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
