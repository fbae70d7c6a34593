"""The pages that are written from the code say what the code says."""

import runpy
from pathlib import Path

from vugen_cli.app import COMMANDS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/commands.md"
WRITER = runpy.run_path(str(ROOT / "docs/write_commands.py"))
reference = WRITER["reference"]


def test_the_command_reference_is_up_to_date() -> None:
    assert PAGE.read_text() == reference(), f"{PAGE} is stale: run `{WRITER['HOW']}`"


def test_the_tables_of_formats_are_up_to_date() -> None:
    page = ROOT / "docs/formats.md"
    writer = runpy.run_path(str(ROOT / "docs/write_formats.py"))
    assert page.read_text() == writer["with_tables"](page.read_text()), (
        f"{page} is stale: run `{writer['HOW']}`"
    )


def test_every_key_of_a_record_has_its_meaning_in_formats() -> None:
    writer = runpy.run_path(str(ROOT / "docs/write_formats.py"))
    page = (ROOT / "docs/formats.md").read_text()
    for model in writer["MODELS"]:
        for name, field in model.__pydantic_fields__.items():
            assert field.description and f"| `{name}` |" in page


def test_every_command_and_its_options_are_in_the_reference() -> None:
    page = reference()
    for command in (*COMMANDS, "score prompts", "study composition", "study training"):
        assert f"## vugen {command}\n" in page
    assert "| `--vqa-score` |" in page
    assert "| `-n` | integer | Images for each prompt. [default: 1] |" in page
    assert "| `--solver` | `euler`, `heun`, `midpoint` |" in page
