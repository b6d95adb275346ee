"""Reads the code out of Markdown."""

import re


def find_blocks(text: str, language: str) -> list[str]:
    """The code blocks of a text that are in a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
