"""The command reference, docs/commands.md, written from the commands themselves.

`python docs/write_commands.py` writes it anew.
"""

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path("docs/commands.md")
HOW = "python docs/write_commands.py"


def reference() -> str:
    """The page: every command's help, arguments and options, in the order of `vugen --help`.

    A group's own options come before those of its commands.
    """
    from typer.main import get_command

    from vugen_cli.app import app

    head = f"# Commands\n\nWritten from the commands by `{HOW}`; do not edit.\n"
    return "\n".join([head, *_sections("vugen", get_command(app))])


def _sections(title: str, command: Any) -> Iterator[str]:
    yield _options(title, command)
    if commands := getattr(command, "commands", None):
        for name in command.list_commands(None):
            yield from _sections(f"{title} {name}", commands[name])


def _options(title: str, command: Any) -> str:
    """One command: its help, where a paragraph marked \\b is kept as it is, and a table of its options."""
    text = [f"## {title}\n"]
    for paragraph in command.help.split("\n\n"):
        lines = paragraph.strip().splitlines()
        if lines[0] == "\b":
            text.append("\n".join(["```text", *lines[1:], "```\n"]))
        else:
            text.append(" ".join(line.strip() for line in lines) + "\n")
    kinds = typing.get_type_hints(command.callback) if command.callback else {}
    shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
    rows = [_row(parameter, kinds.get(parameter.name)) for parameter in shown if parameter.name != "help"]
    if rows:
        text.append("\n".join(["| Option | Value | Meaning |", "|---|---|---|", *rows]) + "\n")
    return "\n".join(text)


def _row(parameter: Any, kind: Any) -> str:
    """An option's names, what it takes (from its annotation), and its help with its default."""
    if parameter.param_type_name == "argument":
        names = f"`{parameter.name.upper()}`"
    else:
        names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    meaning = " ".join((parameter.help or "").split()).replace("|", "\\|")
    default = parameter.default
    if isinstance(default, (int, float, str, Path)) and not isinstance(default, bool):
        meaning += f" [default: {default}]"
    elif isinstance(shown := getattr(parameter, "show_default", None), str):
        meaning += f" [default: {shown}]"
    return f"| {names} | {_value(kind)} | {meaning} |"


def _value(kind: Any) -> str:
    """What an option of this type takes; nothing for a switch."""
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    inner = [k for k in typing.get_args(kind) if k is not type(None)]
    if inner:  # Optional or list
        return _value(inner[0])
    return {int: "integer", float: "number", str: "text", Path: "path"}.get(kind, "")


if __name__ == "__main__":
    PAGE.write_text(reference())
    print(f"wrote {PAGE}")
