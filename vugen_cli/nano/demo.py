"""`vugen demo`: the bundled sampler is taught a thing that it never saw, and a page shows what came of it."""

import html
import os
import shutil
import time
from pathlib import Path
from string import Template

import torch
from pydantic import Field

from vugen_cli.checkpoint import read_card
from vugen_cli.data.manifest import read_manifest
from vugen_cli.data.sample import Sample
from vugen_cli.data.writer import write_dataset
from vugen_cli.files import bundle, whole_file, write_json
from vugen_cli.metrics.encoders import vlm_extractor
from vugen_cli.metrics.report import Record, Report
from vugen_cli.metrics.scores import score_sets
from vugen_cli.nano.painting import draw_scene
from vugen_cli.nano.scenes import DRAWING, Drawings, OpenMojiScenes
from vugen_cli.nano.vocabulary import SETTINGS, UNSEEN
from vugen_cli.recipe import ADAPTER_TRAINING, Recipe, parse_recipe
from vugen_cli.sampling.adapters import import_peft
from vugen_cli.sampling.draw import draw
from vugen_cli.sampling.sampler import Sampler
from vugen_cli.sampling.trained import load_sampler
from vugen_cli.stages.train_sampler import train_sampler

PAGE = Path(__file__).with_name("report.html")
KNOWN = [
    "a bear in a forest",
    "a rocket in space",
    "a penguin in the snow",
    "a red car in a city at night",
    "a whale in the sea",
    "a cow in a meadow",
    "an apple on a beach",
    "a snake in a desert",
]
THING = "flamingo"
PLACES = {  # where the pictures to learn from show it, and where it is asked for
    "train": ("forest", "beach", "snow", "meadow", "desert", "city"),
    "val": ("sea", "mountains", "farm", "living room", "volcano", "space"),
}
PICTURES = {"train": 30, "val": 300}
SCENES = 300  # as it knows them, mixed in: without them it would draw nothing else any more
PER_PROMPT = 10  # pictures that are scored; a grid shows 64
RANK = 16
TRAINING: dict[str, object] = {**ADAPTER_TRAINING, "steps": 450}


class Flamingos(Drawings):
    """A `Source` of one unseen thing: "train" and "val" show it in places of their own.

    Args:
        split: "train" or "val".
        size: of the pictures, in pixels a side.
    """

    name = "flamingos"
    classes = tuple(UNSEEN)

    def __init__(self, split: str, size: int = 64):
        super().__init__(PICTURES[split], split, size, seed=0)

    @property
    def fingerprint(self) -> str:
        """Tells sets apart that were drawn by other code or from other pictures."""
        return f"{self.origin}, drawing {DRAWING}"

    def __getitem__(self, index: int) -> Sample:
        """Picture `index` and its caption."""
        if not 0 <= index < self.count:
            raise IndexError(f"picture {index} of {self.count}")
        place = PLACES[self.split][index % len(PLACES[self.split])]
        scene = {
            "kind": "single",
            "relation": None,
            "setting": place,
            "subjects": [{"name": THING, "count": 1, "color": None}],
        }
        return Sample(
            key=f"flamingo-{self.split}-{index:04d}",
            image=draw_scene(scene, self.size, f"{self.split}/{index}"),
            captions=[said(place)],
            meta={"class": THING},
        )


class Demonstrated(Record):
    """What `vugen demo` leaves; beside `page`, what `scores.json` holds."""

    page: str = Field(description="the page to open")
    before: Report = Field(description="of pictures of the new thing before the adapter was trained")
    after: Report = Field(description="of such pictures after it, from the same noise")


def said(place: str) -> str:
    """The prompt of the new thing in a place."""
    return f"a {THING} {SETTINGS[place].place}"


def run_demo(out: Path, device: torch.device) -> Path:
    """Teach the bundled sampler the new thing, in a folder, and return the page about it.

    Args:
        out: made if missing; finished training is not repeated.
        device: where to train and draw.

    Raises:
        VugenError: `peft`, which trains adapters, is not installed.
    """
    import_peft()
    started = time.perf_counter()
    base, adapter = bundle("sampler.safetensors"), out / f"{THING}.safetensors"
    size = read_card(base).data.size
    sampler = load_sampler(base, device=device)
    _say(f"1/5 sample: what it draws before, and what it makes of a {THING}, which it never saw")
    draw_both(sampler, out, "before")

    _say(f"2/5 prepare: {PICTURES['train']} pictures of a {THING}, and {SCENES} scenes as it knows them")
    things, scenes = out / "data/flamingos", out / "data/scenes"
    for split, count in PICTURES.items():
        write_dataset(Flamingos(split, size), things, split, size, shard_size=count, workers=1)
    write_dataset(OpenMojiScenes(SCENES, size=size), scenes, "train", size, workers=1)

    _say(f"3/5 train-sampler --adapter {RANK}: minutes; the sampler itself stays as it is")
    recipe = recipe_of(base, [things, scenes])
    train_sampler(recipe, base, None, adapter, device, init=base, rank=RANK)

    _say("4/5 sample: the same prompts from the same noise, with the adapter")
    taught = load_sampler(base, device=device, adapters=[str(adapter)])
    draw_both(taught, out, "after")

    _say("5/5 score: Fréchet distance to drawn flamingos in the same places, on the VLM's own features")
    extractor = vlm_extractor(sampler.vlm)
    reports = {name: score_sets(out / name, things, extractor) for name in ("before", "after")}
    write_json(out / "scores.json", {name: report.written() for name, report in reports.items()})

    minutes = (time.perf_counter() - started) / 60
    page = out / "report.html"
    with whole_file(page) as temporary:
        temporary.write_text(report_page(out, recipe, reports, minutes, device), encoding="utf-8")
    distances = {name: report.scores[0].value for name, report in reports.items()}
    _say(
        f"done in {minutes:.1f} min: Fréchet distance {distances['before']:.2f} before, "
        f"{distances['after']:.2f} after; the adapter has {adapter.stat().st_size / 1000:.0f} KB"
    )
    return page


def draw_both(sampler: Sampler, out: Path, when: str) -> None:
    """Draw what it knew and the new thing, `before` or `after` the training; the noise is the same."""
    draw(sampler, KNOWN, 4, out / f"known-{when}")
    draw(sampler, list(map(said, PLACES["val"])), PER_PROMPT, out / when)


def recipe_of(base: Path, mixture: list[Path]) -> Recipe:
    """How the adapter is trained: as the base was, for minutes, on the new pictures and the old in turn."""
    stored = read_card(base).recipe
    changed = {
        "data": {"mixture": [{"path": str(path)} for path in mixture], "workers": 0},
        "train_sampler": {**stored["train_sampler"], **TRAINING},
    }
    return parse_recipe({**stored, **changed}, str(base))


def _say(line: str) -> None:
    print(line, flush=True)


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores" if device.type == "cpu" else device.type


def report_page(
    out: Path, recipe: Recipe, reports: dict[str, Report], minutes: float, device: torch.device
) -> str:
    """The demo's page; it opens from disk, and the pictures it shows lie beside it in `out`."""
    things = read_manifest(out / "data/flamingos")
    shutil.copyfile(out / f"{THING}.run" / "curves.png", out / "curves.png")
    before, after = (reports[name].scores[0] for name in ("before", "after"))
    size = (out / f"{THING}.safetensors").stat().st_size
    cards = [
        (
            f"Fréchet distance to drawn {UNSEEN[THING].plural}",
            f"{before.value:.2f} → {after.value:.2f}",
            f"before → after, on VLM features, not FID; lower is better. {after.warning or ''}",
        ),
        ("What was learnt", f"{size / 1000:.0f} KB", "an adapter; the sampler's own weights are as before"),
        ("Time", f"{minutes:.1f} min", f"all of it, on this machine ({device_name(device)})"),
    ]
    steps = recipe.train_sampler.steps
    figures = [
        (
            "Asked for a flamingo, before",
            "before/grid.png",
            "A row a prompt. The word means nothing to this model, which knows 64 other things.",
        ),
        (
            "The same prompts from the same noise, after",
            "after/grid.png",
            f"{steps} steps later. None of the {PICTURES['train']} pictures showed one in these places.",
        ),
        ("What it knew, before", "known-before/grid.png", "A row a prompt, four seeds."),
        (
            "What it knew, after",
            "known-after/grid.png",
            "The same seeds with the adapter: what it knew stays.",
        ),
        ("Training the adapter", "curves.png", f"{steps} steps."),
    ]
    tiles = [
        f"<div class=card><small>{title}</small><b>{value}</b><small>{about}</small></div>"
        for title, value, about in cards
    ]
    pictures = [
        f"<figure><h2>{title}</h2><a href='{path}'><img src='{path}' alt='{title}'></a>"
        f"<figcaption>{about}</figcaption></figure>"
        for title, path, about in figures
    ]
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        tiles="\n".join(tiles),
        pictures="\n".join(pictures),
        count=PICTURES["train"],
        scenes=SCENES,
        licence=html.escape(things.licence or ""),
        prompts=html.escape("; ".join([*map(said, PLACES["val"]), *KNOWN])),
    )
