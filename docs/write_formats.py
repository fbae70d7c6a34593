"""The tables of docs/formats.md, written from the models that the files are written and read through.

`python docs/write_formats.py` writes them anew, each between `<!-- keys of NAME -->` and `<!-- end -->`.
"""

import re
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from vugen_cli.card import (
    AdapterCard,
    BaseCard,
    Card,
    DataCard,
    Distilled,
    LatentsCard,
    StateCard,
    VAECard,
    VLMCard,
)
from vugen_cli.data.manifest import CaptionOrigin, Captions, Latents, Manifest, Split
from vugen_cli.metrics.report import PromptsRecord, Report, Score, SetRecord
from vugen_cli.metrics.samples import DrawnImage
from vugen_cli.studies.over_training import Point
from vugen_cli.studies.reconstruct import Fidelity, Reconstruction
from vugen_cli.studies.understanding import Understanding

CARDS = (Card, VLMCard, DataCard, LatentsCard, VAECard, Distilled, AdapterCard, BaseCard, StateCard)
REPORTS = (Report, Score, SetRecord, PromptsRecord, Point, Understanding, Fidelity, Reconstruction)
DATA = (Manifest, Split, Captions, CaptionOrigin, Latents)
MODELS = (*DATA, *CARDS, DrawnImage, *REPORTS)

PAGE = Path("docs/formats.md")
HOW = "python docs/write_formats.py"
WORDS = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    object: "anything",
    Any: "anything",
}


def with_tables(page: str) -> str:
    """The page, with each table between its marks as the models have it.

    Raises:
        KeyError: a mark names no model, or a model has no mark.
    """
    tables = {model.__name__: _table(model) for model in MODELS}

    def replaced(mark: re.Match[str]) -> str:
        return f"{mark[1]}\n{tables.pop(mark[2])}\n{mark[3]}"

    page = re.sub(r"(<!-- keys of (\w+) -->)\n.*?(<!-- end -->)", replaced, page, flags=re.DOTALL)
    if tables:
        raise KeyError(f"no mark in {PAGE} for {', '.join(tables)}")
    return page


def _table(model: type[BaseModel]) -> str:
    """A line for each key; those of a class that it builds on stand in that class's table."""
    above = {name for base in model.__mro__[1:] for name in getattr(base, "model_fields", ())}
    rows = [
        f"| `{name}` | {_value(field.annotation)} | {(field.description or '').replace('|', chr(92) + '|')} |"
        for name, field in model.model_fields.items()
        if name not in above
    ]
    return "\n".join(["", "| key | value | meaning |", "|---|---|---|", *rows, ""])


def _value(kind: Any) -> str:
    """A type in words."""
    if kind in WORDS:
        return WORDS[kind]
    parts = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return " or ".join("null" if part is type(None) else _value(part) for part in parts)
    if typing.get_origin(kind) is list:
        return f"list: {_value(parts[0])}"
    if typing.get_origin(kind) is tuple:
        return f"list of {len(parts)}: {_value(parts[0])}"
    if parts:  # a mapping
        return f"object: {_value(parts[1])}"
    return "object"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
    print(f"wrote {PAGE}")
