"""A transformers that is too old is refused, in words, by the package and by remote code alike."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOWER_BOUND = re.search(r'"transformers>=(.+)"', (ROOT / "modeling_anira" / "versions.py").read_text())[1]

# An older release lies about its version too, so that the refusal can be tested in any.
OLD = """
import importlib.metadata, sys
import transformers
installed = importlib.metadata.version
importlib.metadata.version = lambda name: "4.57.0" if name == "transformers" else installed(name)
folder = sys.argv[1]
"""


@pytest.mark.parametrize(
    "code",
    [
        "import modeling_anira",
        "transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)",
        "transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
    ],
    ids=["package", "remote config", "remote model"],
)
def test_an_older_release_is_refused_with_what_to_install(code, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "modeling_anira", folder, ignore=shutil.ignore_patterns("__*__*"))
    auto_map = {
        "AutoConfig": "configuration_anira.AniraConfig",
        "AutoModelForCausalLM": "modeling_anira.AniraForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "anira", "auto_map": auto_map}))
    settings = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", OLD + code, str(folder)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "ImportError" in done.stderr
    needed = f"transformers>={LOWER_BOUND}"
    assert f"{needed} is required" in done.stderr
    assert "found transformers==4.57.0" in done.stderr
    assert f'pip install -U "{needed}"' in done.stderr


def test_the_package_asks_for_what_the_model_asks_for():
    assert f'"transformers>={LOWER_BOUND}"' in (ROOT / "pyproject.toml").read_text()
