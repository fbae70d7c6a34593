"""`vugen demo`, its training cut to two steps: a page that stands alone, no work twice."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vugen_cli.app import app
from vugen_cli.files import bundle
from vugen_cli.nano import demo
from vugen_cli.recipe import Recipe


def test_the_demo_leaves_a_page_whose_pictures_are_there_and_repeats_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not bundle("sampler.safetensors").is_file():
        pytest.skip("no bundle in this checkout")
    monkeypatch.setattr(demo, "TRAINING", {**demo.TRAINING, "steps": 2, "batch_size": 4, "preview_every": 9})
    monkeypatch.setattr(demo, "PICTURES", {"train": 6, "val": 8})
    monkeypatch.setattr(demo, "PLACES", {"train": ("forest", "snow"), "val": ("sea", "space")})
    monkeypatch.setattr(demo, "SCENES", 8)
    monkeypatch.setattr(demo, "KNOWN", ["a bear in a forest"])
    monkeypatch.setattr(demo, "PER_PROMPT", 2)
    # Two steps of the ODE instead of 25, in the preview too: nothing here looks at what is drawn.
    monkeypatch.setattr(demo, "draw", partial(demo.draw, steps=2))
    monkeypatch.setattr(demo, "recipe_of", partial(quick, demo.recipe_of))
    out = tmp_path / "demo"
    result = CliRunner().invoke(app, ["demo", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.exception
    answer = json.loads(result.stdout)
    page = (out / "report.html").read_text()
    pictures = re.findall(r"<img src='([^']+)'", page)
    assert len(pictures) == 5 and all((out / picture).is_file() for picture in pictures)
    assert not re.search(r"(src|href)=.?https?:", page) and "$" not in re.sub(r"<style>.*?</style>", "", page)
    assert "singular" in page  # four pictures say little, and the page says so
    scores = json.loads((out / "scores.json").read_text())
    assert answer == {"page": str(out / "report.html"), **scores}
    assert scores["before"]["images"]["count"] == scores["after"]["images"]["count"] == 4
    log = (out / "flamingo.run/metrics.jsonl").read_text()
    assert CliRunner().invoke(app, ["demo", "--out", str(out)]).exit_code == 0
    assert (out / "flamingo.run/metrics.jsonl").read_text() == log and len(log.splitlines()) == 2


def quick(recipe_of: Callable[..., Recipe], base: Path, mixture: list[Path]) -> Recipe:
    recipe = recipe_of(base, mixture)
    return recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"steps": 2})})
