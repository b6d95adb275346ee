"""Which of several names `--only` asks for."""

import re
from collections.abc import Iterable


def choose(names: Iterable[str], only: str, error: type[ValueError]) -> list[str]:
    """Those of `names` that have the regular expression `only` in them, in their order; all for "".

    Raises `error` for what is no regular expression, and where nothing is left.
    """
    names = list(names)
    try:
        pattern = re.compile(only)
    except re.error as problem:
        raise error(f"`only` is {only!r}, but must be a regular expression: {problem}.") from problem
    chosen = [name for name in names if pattern.search(name)]
    if not chosen:
        raise error(f"`only` is {only!r}, but must be found in one of {', '.join(names)}.")
    return chosen
