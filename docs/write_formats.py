"""The tables of docs/formats.md, written from the models that the files are written and read through.

`python docs/write_formats.py` writes them anew, each between `<!-- keys of NAME -->` and `<!-- end -->`;
NAME is a model's, or ANSWERS for the list of what every command answers with `--json`.
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
    RunCard,
    StateCard,
    VAECard,
    VLMCard,
)
from vugen_cli.commands.answers import Asked, Compared, Drawn, Prepared, Pushed, Served, Trained, Written
from vugen_cli.data.manifest import CaptionOrigin, Captions, Latents, Manifest, Split
from vugen_cli.doctor import Check, Diagnosis
from vugen_cli.metrics.report import PromptsRecord, Report, Score, SetRecord
from vugen_cli.metrics.samples import DrawnImage
from vugen_cli.nano.demo import Demonstrated
from vugen_cli.recipe import ResolvedRecipe
from vugen_cli.runs import Run, Runs
from vugen_cli.studies.over_training import OverTraining, Point
from vugen_cli.studies.plan import Machine, Memory, PassPlan, Plan, StagePlan
from vugen_cli.studies.reconstruct import Fidelity, Reconstruction
from vugen_cli.studies.understanding import Understanding, UnderstandingReport

CARDS = (Card, VLMCard, DataCard, LatentsCard, VAECard, Distilled, AdapterCard, BaseCard, RunCard, StateCard)
SCORES = (Report, Score, SetRecord, PromptsRecord)
STUDIES = (OverTraining, Point, UnderstandingReport, Understanding, Fidelity, Reconstruction)
DATA = (Manifest, Split, Captions, CaptionOrigin, Latents)
PLAN = (Plan, Machine, StagePlan, Memory, PassPlan)
HERE = (Diagnosis, Check, Runs, Run)
ANSWERS: dict[str, tuple[Any, ...]] = {  # what every command gives back, which --json prints
    "prepare": (Prepared,),
    "caption": (Manifest,),
    "train-reducer": (Trained,),
    "train-sampler": (Trained,),
    "sample": (Drawn,),
    "score": (Report,),
    "score prompts": (Report,),
    "study composition": (Report,),
    "study edits": (Report,),
    "study edit-benchmark": (Report,),
    "study understanding": (UnderstandingReport,),
    "study training": (OverTraining,),
    "study diversity": (Report,),
    "reconstruct": (Reconstruction,),
    "compare": (Compared,),
    "chat": (Asked,),
    "train-vlm": (Trained,),
    "train-vae": (Trained,),
    "train-judge": (Trained,),
    "serve": (Served,),
    "merge": (Written,),
    "export": (Written,),
    "push": (Pushed,),
    "inspect": (Card, AdapterCard, StateCard, Manifest),
    "config": (ResolvedRecipe,),
    "runs": (Runs,),
    "plan": (Plan,),
    "demo": (Demonstrated,),
    "doctor": (Diagnosis,),
}
OWN = dict.fromkeys(model for models in ANSWERS.values() for model in models)
MODELS = tuple(dict.fromkeys([*DATA, *CARDS, DrawnImage, *SCORES, *STUDIES, *PLAN, *HERE, *OWN]))

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
    tables = {model.__name__: _table(model) for model in MODELS} | {"ANSWERS": _answers()}

    def replaced(mark: re.Match[str]) -> str:
        return f"{mark[1]}\n{tables.pop(mark[2])}\n{mark[3]}"

    page = re.sub(r"(<!-- keys of (\w+) -->)\n.*?(<!-- end -->)", replaced, page, flags=re.DOTALL)
    if tables:
        raise KeyError(f"no mark in {PAGE} for {', '.join(tables)}")
    return page


def _answers() -> str:
    """A line for each command, with links to the tables of what it answers."""
    links = {model: f"[{model.__name__}](#{model.__name__.lower()})" for model in OWN}
    rows = [
        f"| `vugen {name}` | {' or '.join(links[m] for m in models)} |" for name, models in ANSWERS.items()
    ]
    return "\n".join(["", "| command | its object |", "|---|---|", *rows, ""])


def _table(model: type[BaseModel]) -> str:
    """A line for each key; those of a class that it builds on stand in that class's table."""
    above = {name for base in model.__mro__[1:] for name in getattr(base, "__pydantic_fields__", ())}
    rows = [
        f"| `{name}` | {_value(field.annotation)} | {(field.description or '').replace('|', chr(92) + '|')} |"
        for name, field in model.__pydantic_fields__.items()
        if name not in above
    ]
    anchor = f'<a id="{model.__name__.lower()}"></a>'
    return "\n".join(["", anchor, "", "| key | value | meaning |", "|---|---|---|", *rows, ""])


def _value(kind: Any) -> str:
    """A type in words."""
    if kind in WORDS:
        return WORDS[kind]
    parts = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return " or ".join("null" if part is type(None) else _value(part) for part in parts)
    if typing.get_origin(kind) is typing.Annotated:
        return _value(parts[0])
    if typing.get_origin(kind) is typing.Literal:
        return "text"
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
