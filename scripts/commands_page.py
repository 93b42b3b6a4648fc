"""Writes docs/commands.md from the commands themselves: `python scripts/commands_page.py [--check]`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import tomllib
import typer

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "commands.md"
_HEAD = """# Commands

Every option of every command. `make docs` writes this page from the commands' own help.
Exit codes: 0 done; 1 a check failed, or a picture of a folder did; 2 wrong usage or input, with one line that says why.
"""


def page() -> str:
    """The whole page as Markdown."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    parts = [_HEAD]
    for name, target in sorted(scripts.items()):
        app = import_module(target.partition(":")[0]).app
        for path, function in _commands(name, app):
            parts += [f"## `{path}`\n", f"{_words(function.__doc__ or '')}\n", *_table(function)]
    return "\n".join(parts)


def _commands(path: str, app: typer.Typer) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What a user types, and the function that it calls."""
    callback = app.registered_callback
    alone = len(app.registered_commands) == 1 and callback is None
    if callback is not None and callback.callback is not None and not alone:
        yield path, callback.callback
    found = {info.name or info.callback.__name__.replace("_", "-"): info.callback for info in app.registered_commands}
    for name, function in sorted(found.items()):
        yield (path if alone else f"{path} {name}"), function


def _table(function: Callable[..., Any]) -> list[str]:
    hints = get_type_hints(function, include_extras=True)
    rows = []
    for parameter in inspect.signature(function).parameters.values():
        kind, *extras = get_args(hints[parameter.name]) or (hints[parameter.name],)
        info = next(
            (one for one in extras if isinstance(one, (typer.models.OptionInfo, typer.models.ArgumentInfo))), None
        )
        if info is None or info.hidden or parameter.name == "version":
            continue
        option = isinstance(info, typer.models.OptionInfo)
        name = " ".join(info.param_decls or ()) or f"--{parameter.name.replace('_', '-')}"
        default = parameter.default
        unset = default is inspect.Parameter.empty or default is None or default is False
        value = "" if unset else f"`{getattr(default, 'value', default)}`"
        rows.append((f"`{name if option else parameter.name.upper()}`", _values(kind), value, _words(info.help or "")))
    if not rows:
        return []
    lines = ["| option | values | default | meaning |", "| --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [*lines, ""]


def _values(kind: Any) -> str:
    """A type in the words of a user; nothing for a switch."""
    first = next(one for one in (get_args(kind) or (kind,)) if one is not type(None))
    if get_origin(first) is list:
        return f"{_values(get_args(first)[0])}, repeatable"
    if isinstance(first, type) and issubclass(first, Enum):
        return ", ".join(str(one.value) for one in first)
    return {bool: "", Path: "path", int: "whole number", float: "number", str: "text"}.get(first, "")


def _words(text: str) -> str:
    return " ".join(inspect.cleandoc(text).replace("\\[", "[").split())


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        current = PAGE.read_text(encoding="utf-8") == page()
        sys.exit(0 if current else "docs/commands.md is not current: run `make docs`")
    PAGE.write_text(page(), encoding="utf-8")
