"""What commands share that write pages: estimates as text, templates, command lines that begin with folders."""

import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from datasets_scripts.options import parse_options


def show(estimate: dict[str, Any] | None, digits: int = 2) -> str:
    """An estimate as text: value and 95 % interval, if that can be seen at so many digits, or the reason for none."""
    if not estimate or estimate.get("value") is None:
        return f"not defined: {(estimate or {}).get('reason', 'not measured')}"
    value = f"{estimate['value']:.{digits}f}"
    if estimate.get("low") is None:
        return f"{value} (no interval)" if estimate.get("reason") else value
    low, high = (f"{estimate[bound]:.{digits}f}" for bound in ("low", "high"))
    return value if low == value == high else f"{value} ({low} to {high})"


def name_depths(control: str) -> str:
    """How pages call a control; a decider is called `fixed` too."""
    return "one depth" if control == "fixed" else control


def render(template: Path, **content: Any) -> str:
    """A Markdown template filled in. Filters: `estimate` (`show`) and `depths` (`name_depths`)."""
    # A name that the template asks for and nobody gave is an error, not an empty place.
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(estimate=show, depths=name_depths)
    return environment.get_template(template.name).render(**content)


def parse_folders_first(kind: type, folders: str) -> Any:
    """The command line as `kind`; its folders may stand first, as one writes them, rather than after `folders`."""
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        arguments = [folders, *arguments]
    (parsed,) = parse_options(kind, arguments=arguments)
    return parsed
