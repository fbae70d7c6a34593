"""`vugen demo`, its training cut to two steps: every stage, a page that stands alone, no work twice."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vugen_cli.app import app
from vugen_cli.files import bundle
from vugen_cli.nano import demo


def test_the_demo_leaves_a_page_whose_pictures_are_there_and_repeats_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not bundle("sampler.safetensors").is_file():
        pytest.skip("no bundle in this checkout")
    short = ("steps=2", "batch_size=4", "preview_every=2")
    settings = [f"train_{stage}.{each}" for stage in ("reducer", "sampler") for each in short]
    monkeypatch.setattr(demo, "SETTINGS", [*settings, "sampling.steps=2"])
    monkeypatch.setattr(demo, "SCENES", {"train": 40, "val": 8})
    monkeypatch.setattr(demo, "PROMPTS", ["a bear in a forest", "a cat on a beach"])
    monkeypatch.setattr(demo, "GALLERY", 1)
    monkeypatch.setattr(demo, "PER_PROMPT", 2)
    out = tmp_path / "demo"
    result = CliRunner().invoke(app, ["demo", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.exception
    answer = json.loads(result.stdout)
    page = (out / "report.html").read_text()
    pictures = re.findall(r"<img src='([^']+)'", page)
    assert len(pictures) >= 6 and all((out / picture).is_file() for picture in pictures)
    assert not re.search(r"(src|href)=.?https?:", page) and "$" not in re.sub(r"<style>.*?</style>", "", page)
    assert "singular" in page  # four pictures say little, and the page says so
    scores = json.loads((out / "scores.json").read_text())
    assert answer == {"page": str(out / "report.html"), **scores}
    assert scores["samples"]["images"]["count"] == 4 and scores["reconstruction"]["psnr"] > 0
    log = (out / "sampler.run/metrics.jsonl").read_text()
    assert CliRunner().invoke(app, ["demo", "--out", str(out)]).exit_code == 0
    assert (out / "sampler.run/metrics.jsonl").read_text() == log and len(log.splitlines()) == 2
