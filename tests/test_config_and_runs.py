"""`vugen config` and `vugen runs`: what a recipe comes to, and what runs have come to."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import vugen_here

from vugen_cli.commands.options import training_recipe
from vugen_cli.engine.loggers import MetricsLog
from vugen_cli.errors import VugenError
from vugen_cli.files import is_locked, locked
from vugen_cli.recipe import load_recipe, resolve_recipe
from vugen_cli.runs import find_runs, in_words, read_run


def test_each_value_of_a_recipe_says_where_it_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 5\ndecoder: {preset: S, heads: 1}\ndata: {mixture: [{path: a}]}\n")
    resolved = resolve_recipe(file, ["train_sampler.lr=1e-4", "latents.how=stack", "latents.layers=last 2"])
    origins = resolved.origins
    assert origins["seed"] == origins["decoder.heads"] == origins["data.mixture"] == str(file)
    assert origins["decoder.channels"] == "decoder.preset" and origins["decoder.steps"] == "default"
    assert origins["train_sampler.lr"] == origins["latents.how"] == "--set"
    assert resolved.recipe["train_sampler"]["lr"] == 1e-4
    assert resolve_recipe("nano", ["decoder={preset: B}"]).origins["decoder.channels"] == "--set"
    assert resolve_recipe().origins["train_sampler.steps"] == "nano.yaml"


@pytest.mark.parametrize("name", ["nano", "imagenet-256", "stockmix-256"])
def test_what_config_prints_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    changes = ["train_sampler.lr=1e-5", "instruction='Draw {prompt}: now'"]
    words = [word for change in changes for word in ("--set", change)]
    result = vugen_here("config", name, *words, cwd=tmp_path)
    assert "# --set" in result.stdout and f"# {name}.yaml" in result.stdout
    (tmp_path / "again.yaml").write_text(result.stdout)
    assert load_recipe(tmp_path / "again.yaml") == load_recipe(name, changes)
    assert yaml.safe_load(result.stdout)["instruction"] == "Draw {prompt}: now"


def test_runs_are_finished_stopped_or_running(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "reducer.run", tmp_path / "deep/done.run")
    unfinished = tmp_path / "more.run"
    unfinished.mkdir()
    rows = [{"step": step, "loss": 4.0 - step, "images_per_s": 10.0} for step in range(2)]
    (unfinished / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 2, "lo')
    card = {"stage": "sampler", "steps": 100, "batch_size": 5}
    (unfinished / "run.json").write_text(json.dumps(card))
    os.utime(tmp_path / "deep/done.run/metrics.jsonl", (1, 1))

    (tmp_path / "circle").symlink_to(tmp_path)
    more, done = find_runs(tmp_path).runs
    (tmp_path / "links").mkdir()
    (tmp_path / "links/far.run").symlink_to(unfinished)
    assert [run.step for run in find_runs(tmp_path / "links").runs] == [2]
    assert (done.stage, done.state, done.step, done.steps) == ("reducer", "finished", 4, 4)
    assert done.loss is not None and done.loss > 0 and done.eta_s is None
    assert (more.stage, more.state, more.step, more.loss) == ("sampler", "stopped", 2, 3.5)
    with locked(unfinished, "busy"):
        running = read_run(unfinished)
        assert running.state == "running" and running.eta_s == 98 * 5 / 10
        with pytest.raises(VugenError, match="busy"), locked(unfinished, "busy"):
            pass
    assert not is_locked(unfinished)

    head, *lines = vugen_here("runs", cwd=tmp_path).stdout.splitlines()
    assert lines[0].startswith("more.run ") and lines[1].startswith("deep/done.run ")
    assert [line[head.index("step") :].split("  ")[0] for line in lines] == ["2 of 100", "4 of 4"]


def test_a_run_of_an_older_version_or_with_nothing_logged_is_listed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    (run,) = find_runs(tmp_path).runs
    assert (run.stage, run.state, run.step, run.loss, run.steps) == (None, "stopped", 0, None, None)
    with pytest.raises(VugenError, match="no folder at"):
        find_runs(tmp_path / "none")


def test_logs_of_other_tools_are_left_out(tmp_path: Path) -> None:
    for name, text in {
        "other": '{"epoch": 1}\n',
        "plain": "3\n[1]\nnull\n",
        "mine": '{"step": 0, "loss": null}',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
    (tmp_path / "mine" / "run.json").write_bytes(b'{"stage": "\xff"}')
    (tmp_path / "folder" / "metrics.jsonl").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").symlink_to("nowhere")
    (run,) = find_runs(tmp_path).runs
    assert (Path(run.run).name, run.stage, run.step, run.loss) == ("mine", None, 1, None)


def test_spans_of_time_are_said_by_their_two_largest_units() -> None:
    assert [in_words(s) for s in (40, 125, 7_500, 90_000)] == ["40 s", "2 min 5 s", "2 h 5 min", "1 d 1 h"]


def test_the_name_of_a_vlm_is_taken_as_it_is_typed() -> None:
    for name in ("/data/run #1/vlm", "2024", "a: b", "caf\u00e9", "\U0001f600", "caf\udce9"):
        assert training_recipe(None, "train_reducer", None, None, None, name).vlm == name
    assert load_recipe(None, ["train_sampler.lr=1e-3"]).train_sampler.lr == 1e-3


def test_small_numbers_are_logged_to_seven_digits(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, [], {})
    log.add(step=0, lr=2.5e-7, loss=0.123456789)
    log.file.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 0,
        "lr": 2.5e-7,
        "loss": 0.1234568,
    }
