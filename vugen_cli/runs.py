"""The training runs under a folder, from what they leave there: `run.json`, `metrics.jsonl`, their lock."""

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from vugen_cli.card import RunCard
from vugen_cli.errors import VugenError
from vugen_cli.files import is_locked
from vugen_cli.metrics.report import Record

RECENT = 50  # steps over which loss and speed are averaged
TAIL = 64_000  # bytes at the end of a log that hold them


class Run(Record):
    """One run."""

    run: str = Field(description="its folder")
    stage: str | None = Field(
        description="`vlm`, `vae`, `judge`, `reducer`, `decoder` or `sampler`; null if unknown"
    )
    state: Literal["running", "finished", "stopped"] = Field(description="whether it goes on")
    step: int = Field(description="optimiser steps logged")
    steps: int | None = Field(description="of the whole run; null if unknown")
    loss: float | None = Field(description="mean of its last 50 steps")
    images_per_s: float | None = Field(description="the same of its speed")
    eta_s: float | None = Field(description="seconds until it has all its steps, where it is running")
    updated: str = Field(description="when it last logged something, in UTC")


class Runs(Record):
    """What `vugen runs` found."""

    folder: str = Field(description="where it looked")
    runs: list[Run] = Field(description="one object a run, the last to be updated first")


def find_runs(folder: Path) -> Runs:
    """The runs in a folder and in those within it; other tools' `metrics.jsonl` are left out.

    Raises:
        VugenError: there is no such folder.
    """
    if not folder.is_dir():
        raise VugenError(f"no folder at {folder}: give one that runs were written to")
    logs, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # by a link, maybe in a circle
            folders.clear()
            continue
        seen.add(real)
        log = Path(place, "metrics.jsonl")
        logs += [log] if log.name in files and log.is_file() else []
    logs.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    rows = {path: last_rows(path) for path in logs}
    runs = [read_run(path.parent, rows[path]) for path in logs if rows[path] or not path.stat().st_size]
    return Runs(folder=str(folder), runs=runs)


def read_run(run: Path, rows: list[dict[str, Any]] | None = None) -> Run:
    """A run from its folder, whose log may be written to meanwhile.

    Args:
        run: the folder.
        rows: the last of its log, where they were read already.
    """
    log = run / "metrics.jsonl"
    rows = last_rows(log) if rows is None else rows
    try:
        card = RunCard.model_validate_json((run / "run.json").read_bytes())
    except (OSError, ValidationError):
        card = None  # of an older version
    step = rows[-1]["step"] + 1 if rows else 0
    speed = mean(rows, "images_per_s")
    running = is_locked(run)
    finished = card is not None and step >= card.steps
    left = (card.steps - step) * card.batch_size if card and running else None
    return Run(
        run=str(run),
        stage=card.stage if card else None,
        state="running" if running else "finished" if finished else "stopped",
        step=step,
        steps=card.steps if card else None,
        loss=mean(rows, "loss"),
        images_per_s=speed,
        eta_s=round(left / speed) if left is not None and speed else None,
        updated=datetime.fromtimestamp(log.stat().st_mtime, UTC).isoformat(timespec="seconds"),
    )


def last_rows(log: Path) -> list[dict[str, Any]]:
    """The last lines of a log, as many as `RECENT`; the last may be half-written, and others not a run's."""
    with open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        lines = file.read().splitlines()
    rows = []
    for line in lines[-RECENT:]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def mean(rows: list[dict[str, Any]], key: str) -> float | None:
    """Of one number over all lines that have it."""
    values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
    return sum(values) / len(values) if values else None


def as_lines(found: Runs) -> list[str]:
    """The runs as a table, in plain lines."""
    now = time.time()
    rows = [("run", "stage", "state", "step", "loss", "images/s", "left", "updated")]
    for run in found.runs:
        rows.append(
            (
                os.path.relpath(run.run, found.folder),
                run.stage or "?",
                run.state,
                f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else ""),
                "" if run.loss is None else f"{run.loss:.4g}",
                "" if run.images_per_s is None else f"{run.images_per_s:.4g}",
                "" if run.eta_s is None else in_words(run.eta_s),
                f"{in_words(max(0, now - datetime.fromisoformat(run.updated).timestamp()))} ago",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def in_words(seconds: float) -> str:
    """A span of time by its two largest units: `3 d 4 h`, `2 h 5 min`, `40 s`."""
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
