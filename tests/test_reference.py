"""The command reference says what the commands say."""

from pathlib import Path

from vugen_cli.app import app
from vugen_cli.commands.reference import HOW, PAGE, reference

ROOT = Path(__file__).parent.parent


def test_the_command_reference_is_up_to_date() -> None:
    assert (ROOT / PAGE).read_text() == reference(), f"{PAGE} is stale: run `{HOW}`"


def test_every_command_and_its_options_are_in_the_reference() -> None:
    page = reference()
    for command in app.registered_commands:
        name = command.callback.__name__.replace("_", "-")
        assert f"## vugen {name}\n" in page
    assert "| `-n` | integer | Images for each prompt. [default: 1] |" in page
    assert "| `--solver` | `euler`, `heun`, `midpoint` |" in page
