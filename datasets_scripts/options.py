"""The command line of every command, read as transformers reads it."""

import sys
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser


def parse_options(*kinds: type, arguments: list[str] | None = None) -> tuple[Any, ...]:
    """The command line as one instance of each dataclass; what is wrong with it ends in one sentence.

    Args:
        kinds: Their fields are the options. A ValueError of `__post_init__` is such a sentence.
        arguments: In the place of those that the command was given.
    """
    try:
        *parsed, rest = HfArgumentParser(kinds).parse_args_into_dataclasses(  # type: ignore[arg-type]
            arguments, return_remaining_strings=True
        )
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    if rest:
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(rest)} is not understood; --help lists the options.")
    return tuple(parsed)
