"""The Python blocks of README and CONTRIBUTING run, in order, in one fresh process, as a reader would paste them.

Of shell commands the options are parsed.
"""

import argparse
import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from code_blocks import find_blocks

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_code_blocks_run(name, tmp_path):
    blocks = find_blocks((ROOT / name).read_text(), "python")
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
    blocks = find_blocks(card.read_text(), "python")
    script = tmp_path / "card.py"
    script.write_text("\n".join(blocks))
    (tmp_path / "evaluate").symlink_to(ROOT / "evaluate")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


class Parsed(Exception):
    """A command line was understood."""


def list_commands(text):
    """The commands of a text's shell blocks, as lists of words."""
    for block in find_blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "checkpoints" / "mano-mini-early" / "README.md"]
COMMANDS = {" ".join(words): words for page in PAGES for words in list_commands(page.read_text())}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_shell_commands_are_understood(words, monkeypatch):
    """They are too long to run here; `.ci/run` does a short `make demo`, which is most of them."""
    scripts = [word for word in words if word.endswith(".py")]
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return
    if not scripts:
        assert words[0] in ("hf", "source") or "pytest" in words
        return
    script, arguments = ROOT / scripts[0], words[words.index(scripts[0]) + 1 :]
    for word in arguments:
        if word.startswith(("train/", "checkpoints/")):
            assert (ROOT / word).exists()

    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(self, args=None, namespace=None):
        raise Parsed(parse(self, args, namespace)[1])

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    spec = importlib.util.spec_from_file_location("command", script)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up the module that they are in.
    monkeypatch.setitem(sys.modules, "command", module)
    spec.loader.exec_module(module)
    with pytest.raises(Parsed) as found:
        module.main()
    assert found.value.args == ([],), "options that nobody knows"
