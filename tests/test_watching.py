"""What one sees of a run: its profile, and the logs beside `metrics.jsonl`."""

import gzip
import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_overrides, vugen_here
from test_training import changed, metrics

from vugen_cli import progress
from vugen_cli.engine import curves, profiling
from vugen_cli.engine.curves import LiveCurves
from vugen_cli.engine.profiling import PEAKS
from vugen_cli.engine.stage import RunOptions
from vugen_cli.errors import VugenError
from vugen_cli.recipe import Recipe
from vugen_cli.stages.train_reducer import train_reducer
from vugen_cli.stages.train_sampler import train_sampler

CPU = torch.device("cpu")


def test_a_profile_says_where_the_time_went_leaves_a_trace_and_hardly_touches_the_run(
    trained: Path, scenes: Path, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = changed(tiny_recipe, f"train_sampler.steps={profiling.STEPS}")
    reducer, outs = trained / "reducer.safetensors", [tmp_path / "p.safetensors", tmp_path / "q.safetensors"]
    train_sampler(recipe, reducer, scenes, outs[0], CPU, options=RunOptions(profile=True))
    table = capsys.readouterr().out
    for part in ("waiting for data", "copy to the device", "frozen VLM", "forward", "backward", "logging"):
        assert part in table
    shares = [float(line.split()[-1].rstrip("%")) for line in table.splitlines() if " ms  " in line]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert "TFLOP/s" in table and "MFU unknown" in table and "data-wait" in table
    with gzip.open(tmp_path / "p.run" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert sum("Optimizer.step" in event.get("name", "") for event in events) == profiling.TRACED
    train_sampler(recipe, reducer, scenes, outs[1], CPU)
    losses = [[row["loss"] for row in metrics(out.with_suffix(".run"))] for out in outs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)  # counting operations takes some of them apart


def test_a_run_too_short_to_profile_is_refused(
    trained: Path, scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(VugenError, match=f"watches {profiling.STEPS} steps, and the run has 4"):
        train_reducer(tiny_recipe, scenes, tmp_path / "r.safetensors", CPU, options=RunOptions(profile=True))


def test_floating_point_operations_are_those_of_the_step(tmp_path: Path) -> None:
    profile = profiling.Profile(tmp_path / "trace.json.gz", CPU, bfloat16=False, images=1)
    a, b = torch.randn(10, 20), torch.randn(20, 30)
    for _ in range(profiling.STEPS):
        profile.next_step()
        profiling.mark("other")
        a @ b
    profile.next_step()
    assert profile.flops == 2 * 10 * 20 * 30


class Recorder(ModuleType):
    """Stands for wandb or trackio, which are not installed here: remembers how it was called."""

    def __init__(self, name: str):
        super().__init__(name)
        self.begun: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.ended = 0

    def init(self, **settings: Any) -> "Recorder":
        self.begun.append(settings)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.rows.append((step, dict(values)))

    def finish(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_log_gets_what_the_file_gets_and_a_resumed_run_goes_on_in_it(
    name: str, scenes: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Recorder(name)
    monkeypatch.setitem(sys.modules, name, service)
    recipe, out = changed(tiny_recipe, f"log=[{name}]"), tmp_path / "r.safetensors"
    train_reducer(recipe, scenes, out, CPU)
    train_reducer(changed(recipe, "train_reducer.steps=6"), scenes, out, CPU)
    rows = [{"step": step, **values} for step, values in service.rows]
    assert rows == metrics(tmp_path / "r.run") and len(rows) == 6 and service.ended == 2
    assert {"loss", "grad_norm", "lr", "images_per_s", "data_wait", "memory_gb"} <= rows[0].keys()
    first, second = service.begun
    assert first["name"] == second["name"] == "r" and first.get("id") == second.get("id")
    assert second["resume"] == "allow" and first["config"]["recipe"]["seed"] == 0


def test_curves_are_there_while_a_run_goes_on_and_take_little_of_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, plotted = [0.0], []

    def plot(_run: Path) -> None:
        plotted.append(clock[0])
        clock[0] += 3  # seconds that it takes

    monkeypatch.setattr(curves, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(curves, "plot_curves", plot)
    live = LiveCurves(tmp_path)
    while clock[0] < 400:
        clock[0] += 1
        live.update()
    assert plotted == [15, 15 + 3 + 150, 15 + 2 * (3 + 150)]
    assert live.update(at_once=True)


def test_curves_of_a_run_that_has_logged_nothing_are_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    curves.plot_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()


def test_a_loss_that_begins_later_has_its_curve_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    made, subplots = [], Figure.subplots

    def watched(*shape: Any, **how: Any) -> Any:
        made.append(subplots(*shape, **how))
        return made[-1]

    monkeypatch.setattr(Figure, "subplots", watched)
    rows = [{"step": 0, "loss": 2.0}, {"step": 1, "loss": 1.0, "repa": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    curves.plot_curves(tmp_path)
    assert [axis.get_title() for axis in made[0][0]] == ["loss", "repa"]
    monkeypatch.setattr(curves, "POINTS", 1)
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "loss": 1.0}}\n' for n in range(6)))
    curves.plot_curves(tmp_path)
    assert len(made[1][0][0].lines[0].get_xdata()) == 1, "of a long log some steps are drawn"


def test_every_gpu_is_found_by_its_own_name() -> None:
    for name in ("L40", "L40S", "L4", "H100", "H100 PCIe"):
        assert next(part for part in PEAKS if part in f"NVIDIA {name}") == name


@pytest.mark.parametrize(
    ("terminal", "quiet", "seen"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_bars_are_for_terminals_and_quiet_hides_them(
    terminal: bool, quiet: bool, seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "quiet", quiet)
    assert list(progress.progress_bar(range(3), desc="count", unit="step", total=3)) == [0, 1, 2]
    assert ("count" in screen.getvalue()) == seen


def test_one_word_logs_elsewhere(
    scenes: Path, vlm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Recorder("trackio")
    monkeypatch.setitem(sys.modules, "trackio", service)
    tiny = [word for override in tiny_overrides(vlm_path) for word in ("--set", override)]
    words = ["train-reducer", "--data", scenes, "--steps", "1", "--log", "trackio", "--quiet", *tiny]
    result = vugen_here(*words, cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert [step for step, _ in service.rows] == [0]
    assert vugen_here("train-vae", "--log", "paper", cwd=tmp_path).returncode == 1


def test_tensorboard_gets_every_number(scenes: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_reducer(changed(tiny_recipe, "log=[tensorboard]"), scenes, tmp_path / "r.safetensors", CPU)
    events = EventAccumulator(str(tmp_path / "r.run" / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(r["step"], pytest.approx(r["loss"])) for r in metrics(tmp_path / "r.run")]


def test_a_missing_package_is_named_with_its_extra(
    scenes: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(VugenError, match=r'log: trackio needs .*pip install "vugen-cli\[trackio\]"'):
        train_reducer(changed(tiny_recipe, "log=[trackio]"), scenes, tmp_path / "r.safetensors", CPU)


def test_a_log_that_fails_does_not_end_the_run(
    scenes: Path,
    tiny_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    service = Recorder("wandb")
    service.log = lambda *_, **__: exec("raise RuntimeError('the line is down')")  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "wandb", service)
    train_reducer(changed(tiny_recipe, "log=[wandb]"), scenes, tmp_path / "r.safetensors", CPU)
    assert len(metrics(tmp_path / "r.run")) == 4
    assert capsys.readouterr().out.count("wandb failed and is left out from here on: the line is down") == 1
