"""A report of scores on the terminal and as JSON."""

from pathlib import Path
from typing import Any

import typer

from vugen_cli.processes import is_first


def finish(reports: list[dict[str, Any]], out: Path) -> None:
    """Print reports, then write them: an unwritable file should not cost an hour's result."""
    if not is_first():
        return
    from vugen_cli.files import write_json

    _print(reports)
    how = {key: value for report in reversed(reports) for key, value in report.items()}
    write_json(out, {**how, "scores": [score for report in reports for score in report["scores"]]})
    typer.echo(f"Written to {out}.")


def _print(reports: list[dict[str, Any]]) -> None:
    """One table of all the scores, what they were taken from, and every warning."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    entries = [entry for report in reports for entry in report["scores"]]
    columns = {
        "metric": [entry["name"] for entry in entries],
        "value": [_number(entry["value"]) or "–" for entry in entries],
        "±": [_number(entry.get("std")) for entry in entries],
        "95% interval": [" to ".join(map(_number, entry.get("interval") or [])) for entry in entries],
    }
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    table = Table(*columns)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    console.print(table)
    first = reports[0]
    for role in ("images", "reference"):
        if first[role]:
            count = "statistics" if first[role]["kind"] == "statistics" else f"{first[role]['count']:,}"
            console.print(Text(f"{role:9} {count} · {first[role]['path']}"))
    if "features" in first:
        console.print(Text(f"{'features':9} {first['features']}"))
    lines = [first.get("warning")]
    for report in reports:
        lines += [f"{entry['name']}: {entry['warning']}" for entry in report["scores"] if entry["warning"]]
    for line in filter(None, lines):
        console.print(f"Warning: {line}", style="yellow", markup=False, highlight=False)
    for role in ("images", "reference"):
        if first[role] and (bad := first[role]["bad"]):
            console.print(
                f"{len(bad)} of the {role} could not be read, the first {bad[0]}",
                style="yellow",
                markup=False,
                highlight=False,
            )


def _number(value: float | None) -> str:
    """Four decimals, or four digits where that would show fewer than two; a KID is often 0.0002."""
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) >= 0.01 or not value else f"{value:.3g}"
