"""Text files that are written whole or not at all, logs whose last line may be cut, and made parts of a text."""

import json
import os
import re
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Writes a text file; a process that is killed meanwhile leaves what was there before."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a kill cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def fill_block(text: str, name: str, content: str) -> str:
    """`text` with `content` between its lines `<!-- name -->` and `<!-- /name -->`. A ValueError if it lacks them."""
    block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not block.search(text):
        raise ValueError(f"There is no <!-- {name} --> ... <!-- /{name} -->.")
    return block.sub(lambda found: f"{found[1]}{content}{found[2]}", text)
