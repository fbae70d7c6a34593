"""Scores over training: kept checkpoints are whole samplers, scored once, on one picture."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from test_training import changed
from typer.testing import CliRunner

from vugen_cli.app import app
from vugen_cli.checkpoint import load_checkpoint, save_checkpoint
from vugen_cli.engine.signals import StopSignals
from vugen_cli.errors import Stopped
from vugen_cli.recipe import Recipe
from vugen_cli.sampling.trained import load_sampler
from vugen_cli.stages.train_sampler import train_sampler


def test_kept_checkpoints_are_scored_once_and_the_last_is_the_sampler(
    trained: Path, scenes: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = changed(tiny_recipe, "train_sampler.keep_every=2")
    out = tmp_path / "s.safetensors"
    train_sampler(recipe, trained / "reducer.safetensors", scenes, out, torch.device("cpu"))
    kept = sorted((tmp_path / "s.run").glob("step-*.safetensors"))
    assert [path.stem for path in kept] == ["step-0000002", "step-0000004"]
    last, final = load_checkpoint(kept[-1], "sampler"), load_checkpoint(out, "sampler")
    assert last[1] == final[1] and all(torch.equal(last[0][name], final[0][name]) for name in final[0])
    assert load_sampler(kept[0]).card.step == 2

    captions = ["a bear " * 200, *(f"a bear in {place}" for place in ("a forest", "a city", "space"))] * 2
    monkeypatch.setattr("vugen_cli.studies.over_training._captions", lambda *_: captions)
    command = ["study", "training", "s.run", "--features", "vlm", "--count", "8"]  # the VLM of the run
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.exception
    (curve,) = json.loads(Path("training.json").read_text())["over_training"].values()
    assert [(row["step"], row["images"]) for row in curve] == [(2, 8), (4, 16)]
    assert Path("training.png").is_file()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a scored checkpoint was drawn again")

    monkeypatch.setattr("vugen_cli.studies.over_training.draw", never)
    assert CliRunner().invoke(app, command).exit_code == 0
    tensors, card = load_checkpoint(kept[0])
    save_checkpoint(kept[0], {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, card)
    assert isinstance(CliRunner().invoke(app, command).exception, AssertionError)  # other weights are drawn


def test_a_run_that_is_stopped_at_a_kept_step_has_that_checkpoint(
    trained: Path, scenes: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(tiny_recipe, "train_sampler.keep_every=2")
    out = tmp_path / "s.safetensors"
    monkeypatch.setattr("vugen_cli.engine.loop.StopSignals", Asked)
    for _ in range(4):  # each time one step, then a signal
        with contextlib.suppress(Stopped):
            train_sampler(recipe, trained / "reducer.safetensors", scenes, out, torch.device("cpu"))
    kept = sorted(path.stem for path in (tmp_path / "s.run").glob("step-*.safetensors"))
    assert kept == ["step-0000002", "step-0000004"]


class Asked(StopSignals):
    """A signal that has come already."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = True


def test_a_run_without_kept_checkpoints_says_how_to_keep_them(trained: Path) -> None:
    command = ["study", "training", str(trained / "sampler.run"), "--features", "vlm"]
    assert "keep_every" in str(CliRunner().invoke(app, command).exception)
