"""The command reference says what the commands say."""

import runpy
from pathlib import Path

from vugen_cli.app import app

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/commands.md"
WRITER = runpy.run_path(str(ROOT / "docs/write_commands.py"))
reference = WRITER["reference"]


def test_the_command_reference_is_up_to_date() -> None:
    assert PAGE.read_text() == reference(), f"{PAGE} is stale: run `{WRITER['HOW']}`"


def test_every_command_and_its_options_are_in_the_reference() -> None:
    page = reference()
    for command in app.registered_commands:
        name = command.callback.__name__.replace("_", "-")
        assert f"## vugen {name}\n" in page
    assert "| `-n` | integer | Images for each prompt. [default: 1] |" in page
    assert "| `--solver` | `euler`, `heun`, `midpoint` |" in page
