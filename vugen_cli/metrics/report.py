"""What a score says: the records that are written as JSON, and their table on the terminal.

A record is written as it was made: a key that was not given is not there. Every key is a field of one of
these classes, from which the tables of docs/formats.md are written too.
"""

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path

import typer
from pydantic import BaseModel, ConfigDict, Field

from vugen_cli.files import write_json
from vugen_cli.processes import is_first
from vugen_cli.version import __version__


class Record(BaseModel):
    """A JSON object with known keys."""

    model_config = ConfigDict(extra="forbid")

    def written(self) -> dict[str, object]:
        """The object as it is written: only the keys that were given."""
        return self.model_dump(exclude_unset=True)


class SetRecord(Record):
    """One of the two sets that were compared, and what could be read of it."""

    path: str = Field(description="where it is, as it was given")
    kind: str = Field(
        "",
        description="`folder`, `samples`, `geneval`, `mjhq`, `shards`, `tar`, `zip`, `npz`, `statistics`",
    )
    count: int | None = Field(description="images that were read; null where statistics do not say")
    bad: list[str] = Field(description="name and reason of each image that could not be read")
    split: str | None = Field(None, description="of a prepared data set")
    cached: bool = Field(False, description="whether all its features were in the cache")
    statistics: int | str = Field(
        "", description="how many images its statistics are of, where those stood in for some of its features"
    )


class PromptsRecord(Record):
    """The prompts that images were scored against."""

    count: int = Field(description="different prompts")
    source: str = Field(description="where they were found")
    grid: bool = Field(description="whether each image is a 2x2 grid of four")


class Score(Record):
    """One number, and how far it can be trusted."""

    metric: str = Field(description="a name for programs, as `fid` or `frechet_vlm`")
    name: str = Field(description="a name for people")
    value: float | None = Field(description="the score; null where the set is too small for it")
    std: float | None = Field(None, description="the spread that papers quote; no error of the score")
    standard_error: float = Field(0, description="of the value, as an estimate from these images")
    interval: tuple[float, float] | None = Field(None, description="low and high, at 95%")
    interval_method: str = Field("", description="how the interval was had")
    parameters: Mapping[str, object] = Field({}, description="what the number depends on, by name")
    warning: str | None = Field(None, description="what a reader must know, or null")
    by_item: dict[str, float] = Field(
        {}, description="DPG-Bench: the score of each of its items; GenEval 2: of each prompt"
    )
    failures: list[dict[str, str]] = Field(
        [], description="GenEval: `image`, `tag` and `reason` of each that fails"
    )


class Report(Record):
    """The scores of one call, and how they were obtained."""

    scores: list[Score] = Field([], description="one object a number")
    features: str = Field("", description="what the images were compared by, in words")
    weights_sha256: str = Field("", description="SHA-256 of the Inception weights")
    vlm_fingerprint: str = Field("", description="hash of the weights, of features of a VLM")
    weights_fingerprint: str = Field("", description="hash of the weights, of features of CLIP or DINOv2")
    lpips_weights_sha256: dict[str, str] = Field({}, description="SHA-256 of each of LPIPS's files")
    resize: str = Field("", description="how an image reached the network's input size")
    images: SetRecord | None = Field(None, description="the set that was scored")
    reference: SetRecord | None = Field(None, description="the set it was compared with, or null")
    prompts: PromptsRecord | None = Field(None, description="the prompts it was compared with")
    versions: dict[str, str] = Field({}, description="of every library that had a hand in it")
    warning: str | None = Field(None, description="what a reader of all the scores must know, or null")


def joined(reports: Sequence[Report]) -> Report:
    """One report of several over the same sets: scores, features and warnings in turn, the rest as the first
    has it.
    """
    said: dict[str, object] = {}
    for report in reversed(reports):
        said |= {key: getattr(report, key) for key in report.model_fields_set}
    said["scores"] = [score for report in reports for score in report.scores]
    for key, between in (("features", "; "), ("resize", "; "), ("warning", " ")):
        if each := dict.fromkeys(text for report in reports if (text := getattr(report, key))):
            said[key] = between.join(each)
    return Report().model_copy(update=said)


def versions() -> dict[str, str]:
    """The versions of everything that had a hand in a number."""
    packages = (
        "torch",
        "torch-fidelity",
        "transformers",
        "open-clip-torch",
        "numpy",
        "scipy",
        "pillow",
        "simplejpeg",
    )
    return {"vugen-cli": __version__, **{name: importlib.metadata.version(name) for name in packages}}


def finish(report: Report, out: Path) -> Report | None:
    """Print a report, then write it: neither an unwritable file nor a closed pipe costs an hour's result.

    Returns:
        The report, on the first process of a job.
    """
    if not is_first():
        return None
    try:
        _print(report)
    finally:
        write_json(out, report.written())
    typer.echo(f"Written to {out}.")
    return report


def _print(report: Report) -> None:
    """One table of all the scores, what they were taken from, and every warning."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    columns = {
        "metric": [score.name for score in report.scores],
        "value": [_number(score.value) or "–" for score in report.scores],
        "±": [_number(score.std) for score in report.scores],
        "95% interval": [" to ".join(map(_number, score.interval or ())) for score in report.scores],
    }
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    table = Table(*columns)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    console.print(table)
    sets = {role: each for role, each in (("images", report.images), ("reference", report.reference)) if each}
    for role, each in sets.items():
        count = "statistics" if each.kind == "statistics" else f"{each.count:,}"
        console.print(Text(f"{role:9} {count} · {each.path}"))
    if report.features:
        console.print(Text(f"{'features':9} {report.features}"))
    lines = [report.warning, *(score.warning and f"{score.name}: {score.warning}" for score in report.scores)]
    for line in filter(None, lines):
        console.print(f"Warning: {line}", style="yellow", markup=False, highlight=False)
    for role, each in sets.items():
        if each.bad:
            line = f"{len(each.bad)} of the {role} could not be read, the first {each.bad[0]}"
            console.print(line, style="yellow", markup=False, highlight=False)


def _number(value: float | None) -> str:
    """Four decimals, or four digits where that would show fewer than two; a KID is often 0.0002."""
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) >= 0.01 or not value else f"{value:.3g}"
