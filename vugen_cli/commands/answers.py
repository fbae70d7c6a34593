"""What commands answer with `--json` that write no report of their own: the models that are printed.

The keys are in docs/formats.md, where `docs/write_formats.py` lists which command answers what.
"""

import typer
from pydantic import Field

from vugen_cli.metrics.report import Record
from vugen_cli.metrics.samples import DrawnImage


class Prepared(Record):
    """Of `vugen prepare`; `dataset.json` says more."""

    out: str = Field(description="the folder")
    split: str | None = Field(None, description="which part; not of a latent cache, which has all")
    count: int = Field(description="images")
    size: int = Field(description="pixels a side")
    shards: int = Field(description="how many tars")
    skipped_count: int = Field(0, description="pictures that could not be used")


class Trained(Record):
    """Of the `train` commands."""

    out: str = Field(description="the checkpoint, or the directory, that was written")
    run: str = Field(description="the folder of its run: metrics, curves, previews, states")
    steps: int = Field(description="optimiser steps, those of earlier starts included")
    scores: dict[str, float] = Field({}, description="what a VLM or a judge can do, by name")


def echo_scores(scores: dict[str, float]) -> None:
    """Print what a trained VLM or judge can do, a line each; numbers of scenes are whole."""
    for name, value in scores.items():
        typer.echo(f"  {name}: {value:.3f}" if isinstance(value, float) else f"  {name}: {value}")


class Written(Record):
    """Of `vugen merge` and `vugen export`."""

    out: str = Field(description="the checkpoint, or the folder")


class Pushed(Record):
    """Of `vugen push`."""

    name: str = Field(description="of the repository, user/name")
    files: dict[str, int] = Field(description="bytes of each")
    address: str | None = Field(None, description="where they are now; not of a dry run")


class Served(Record):
    """Of `vugen serve`, when it has ended."""

    address: str = Field(description="where it listened")


class Drawn(Record):
    """Of `vugen sample`."""

    out: str = Field(description="the folder")
    images: list[DrawnImage] = Field(description="the lines of its `samples.jsonl`")
    unknown_words: list[str] = Field(description="words of the prompts that the VLM never saw")


class Compared(Record):
    """Of `vugen compare`."""

    out: str = Field(description="the page")
    sources: list[str] = Field(description="names of what stands side by side")
    prompts: int = Field(description="that all of them drew")


class Asked(Record):
    """Of `vugen chat`."""

    image: str = Field(description="the picture")
    question: str = Field(description="what was asked")
    answer: str = Field(description="what the VLM said")
    vlm: str = Field(description="its name")
