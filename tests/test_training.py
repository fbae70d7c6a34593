"""The engine: both stages learn, resume exactly, stop clearly, and never touch the VLM."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import save_random_vlm, tiny_overrides, vugen_here
from test_prepare import alive_in_session, wait_until
from typer.testing import CliRunner

from vugen_cli.app import app
from vugen_cli.card import StateCard
from vugen_cli.checkpoint import load_checkpoint, load_tensors, read_card, read_header, save_checkpoint
from vugen_cli.data.loader import ShardedImages
from vugen_cli.engine.device import cpu_flags, pick_device
from vugen_cli.engine.ema import EMA
from vugen_cli.engine.optimizer import learning_rate
from vugen_cli.engine.precision import wants_bfloat16
from vugen_cli.engine.stage import RunOptions
from vugen_cli.engine.state import StateWriter, differences, is_free
from vugen_cli.errors import VugenError
from vugen_cli.recipe import Recipe, Training, load_recipe
from vugen_cli.sampling.trained import load_autoencoder, load_sampler
from vugen_cli.stages.train_reducer import train_reducer
from vugen_cli.stages.train_sampler import attend_eagerly, train_sampler
from vugen_cli.vlm.frozen import load_vlm

CPU = torch.device("cpu")


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def changed(recipe: Recipe, *overrides: str) -> Recipe:
    from vugen_cli.recipe import parse_recipe

    return parse_recipe(recipe.model_dump(), "test", list(overrides))


def test_a_stage_leaves_checkpoint_metrics_curves_and_pictures(
    trained: Path, vlm_path: Path, scenes: Path
) -> None:
    for stage in ("reducer", "sampler"):
        card = read_card(trained / f"{stage}.safetensors")
        assert card.stage == stage and card.step == 4
        assert card.data.path == str(scenes) and card.data.dataset == "openmoji"
        assert card.vlm.name == str(vlm_path) and card.latents.grid == (8, 8)
        run = trained / f"{stage}.run"
        assert [row["step"] for row in metrics(run)] == [0, 1, 2, 3]
        assert (run / "curves.png").stat().st_size and (run / "preview-0000004.png").stat().st_size


def test_previews_are_decoded_as_the_checkpoint_will(
    trained: Path, scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    previews = []
    for way in ("decoder.steps=3", "decoder.steps=5"):
        recipe = changed(tiny_recipe, way, "train_sampler.steps=1", "train_sampler.preview_every=1")
        out = tmp_path / f"{way}.safetensors"
        train_sampler(recipe, trained / "reducer.safetensors", scenes, out, CPU)
        previews.append((out.with_suffix(".run") / "preview-0000001.png").read_bytes())
        assert load_sampler(out).decoder.recipe.steps == recipe.decoder.steps
    assert previews[0] != previews[1]


def test_a_sampler_holds_expert_reducer_and_decoder_and_nothing_of_the_vlm(
    trained: Path, vlm_path: Path
) -> None:
    tensors, _ = load_checkpoint(trained / "sampler.safetensors", "sampler")
    assert {name.split(".")[0] for name in tensors} == {"expert", "autoencoder"}
    assert not any("embed_tokens" in name or "vision" in name for name in tensors)
    reducer, _ = load_checkpoint(trained / "reducer.safetensors", "reducer")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in reducer.items())


def test_an_automatic_shift_is_a_number_in_the_samplers_card(
    scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    wide = changed(tiny_recipe, "flow.shift=auto", "reducer.channels=100", "train_reducer.steps=1")
    wide = changed(wide, "train_sampler.steps=1")
    reducer = train_reducer(wide, scenes, tmp_path / "r.safetensors", CPU)
    path = train_sampler(wide, reducer, scenes, tmp_path / "s.safetensors", CPU)
    assert read_card(path).recipe["flow"]["shift"] == (8 * 8 * 100 / 4096) ** 0.5
    assert read_card(reducer).recipe["flow"]["shift"] == "auto"
    assert load_sampler(path).shift == 1.25


def test_training_leaves_the_vlm_bit_for_bit_as_it_was(
    scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    path = save_random_vlm(tmp_path / "vlm", seed=3)
    files = {file: file.read_bytes() for file in path.iterdir()}
    before = load_vlm(str(path)).fingerprint
    recipe = changed(tiny_recipe, f"vlm={path}")
    reducer = train_reducer(recipe, scenes, tmp_path / "r.safetensors", CPU)
    train_sampler(recipe, reducer, scenes, tmp_path / "s.safetensors", CPU)
    assert {file: file.read_bytes() for file in path.iterdir()} == files
    assert read_card(tmp_path / "s.safetensors").vlm.fingerprint == before


def test_the_same_command_gives_the_same_bytes(
    trained: Path, scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    again = train_reducer(tiny_recipe, scenes, tmp_path / "reducer.safetensors", CPU)
    assert again.read_bytes() == (trained / "reducer.safetensors").read_bytes()


def test_losses_fall(scenes: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = changed(
        tiny_recipe,
        *(
            f"{s}.{k}"
            for s in ("train_reducer", "train_sampler")
            for k in ("steps=50", "lr=5e-3", "warmup=5", "batch_size=8")
        ),
    )
    reducer = train_reducer(recipe, scenes, tmp_path / "r.safetensors", CPU)
    train_sampler(recipe, reducer, scenes, tmp_path / "s.safetensors", CPU)
    for run in ("r.run", "s.run"):
        losses = [row["loss"] for row in metrics(tmp_path / run)]
        assert sum(losses[-10:]) < 0.95 * sum(losses[:10]), run


def test_a_run_that_was_killed_ends_with_the_same_weights(
    scenes: Path, vlm_path: Path, tmp_path: Path
) -> None:
    overrides = [
        *tiny_overrides(vlm_path),
        "train_reducer.steps=8",
        "train_reducer.checkpoint_every=2",
        "data.workers=1",
    ]
    recipe = load_recipe(None, overrides)
    whole = train_reducer(recipe, scenes, tmp_path / "whole.safetensors", CPU)
    out = tmp_path / "killed.safetensors"
    command = [sys.executable, "-m", "vugen_cli", "train-reducer", "--data", str(scenes), "--out", str(out)]
    command += [part for o in overrides for part in ("--set", o)]
    states = tmp_path / "killed.run"
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(lambda: list(states.glob("state-*.safetensors")), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not alive_in_session(process.pid))
    finished = CliRunner().invoke(app, command[3:])  # in this process: it need not import everything again
    assert finished.exit_code == 0, finished.exception
    assert out.read_bytes() == whole.read_bytes()
    assert [row["step"] for row in metrics(states)] == list(range(8))


def test_sigterm_to_a_whole_job_saves_and_leaves_no_worker(
    scenes: Path, vlm_path: Path, tmp_path: Path
) -> None:
    """To its process group, as launchers and terminals send signals: the workers too, were they in it."""
    overrides = [*tiny_overrides(vlm_path), "train_reducer.steps=100000", "data.workers=1"]
    command = [
        sys.executable,
        "-m",
        "vugen_cli",
        "train-reducer",
        "--data",
        str(scenes),
        "--out",
        str(tmp_path / "r.safetensors"),
    ]
    command += [part for o in overrides for part in ("--set", o)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = tmp_path / "r.run" / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 3, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to go on" in errors.splitlines()[-1]
    (state,) = (tmp_path / "r.run").glob("state-*.safetensors")
    assert read_header(state).step == len(metrics(tmp_path / "r.run"))
    assert not (tmp_path / "r.safetensors").exists()
    wait_until(lambda: not alive_in_session(process.pid))


def wait_for(
    condition: object, process: subprocess.Popen[str] | subprocess.Popen[bytes], seconds: float = 90
) -> None:
    limit = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, "the run ended before it was interrupted"
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_a_damaged_state_falls_back_to_the_one_before(
    scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = changed(tiny_recipe, "train_reducer.checkpoint_every=2")
    out = tmp_path / "r.safetensors"
    whole = train_reducer(recipe, scenes, out, CPU).read_bytes()
    newest = sorted((tmp_path / "r.run").glob("state-*"))[-1]
    newest.write_bytes(newest.read_bytes()[:2000])
    out.unlink()
    assert train_reducer(recipe, scenes, out, CPU).read_bytes() == whole


def test_a_changed_recipe_does_not_resume(scenes: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "r.safetensors"
    train_reducer(tiny_recipe, scenes, out, CPU)
    with pytest.raises(VugenError, match=r"train_reducer\.lr: .* -> 0\.5.*delete.*--change-recipe"):
        train_reducer(changed(tiny_recipe, "train_reducer.lr=0.5"), scenes, out, CPU)
    assert not (tmp_path / "r.run" / "changes.jsonl").exists()


def test_a_reducer_taken_up_with_other_parts_of_a_batch_is_refused(
    scenes: Path, tiny_recipe: Recipe, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "reducer.run", tmp_path / "r.run")
    parts = changed(tiny_recipe, "engine.accumulate=2", "train_reducer.steps=6")
    with pytest.raises(VugenError, match="accumulate: None -> 2"):
        train_reducer(parts, scenes, tmp_path / "r.safetensors", CPU)


def test_a_sampler_goes_on_with_its_own_reducer_and_cut_of_captions_alone(
    scenes: Path, tiny_recipe: Recipe, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "sampler.run", tmp_path / "s.run")
    out, longer = tmp_path / "s.safetensors", changed(tiny_recipe, "train_sampler.steps=5")
    other = train_reducer(
        changed(tiny_recipe, "train_reducer.steps=5"), scenes, tmp_path / "r.safetensors", CPU
    )
    with pytest.raises(VugenError, match=r"other settings \(reducer: [0-9a-f]+ -> "):
        train_sampler(longer, other, scenes, out, CPU)
    with pytest.raises(VugenError, match=r"recipe\.prompt_tokens: 128 -> 3"):
        train_sampler(changed(longer, "prompt_tokens=3"), trained / "reducer.safetensors", scenes, out, CPU)
    state = sorted((tmp_path / "s.run").glob("state-*"))[-1]
    tensors, card = load_tensors(state), read_header(state)
    assert isinstance(card, StateCard)
    del card.resolved["reducer"]  # as of versions that did not note it
    save_checkpoint(state, tensors, card)
    assert read_card(train_sampler(longer, trained / "reducer.safetensors", scenes, out, CPU)).step == 5


def test_a_changed_recipe_goes_on_when_told_and_the_change_is_kept(
    scenes: Path, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, told = tmp_path / "r.safetensors", RunOptions(change_recipe=True)
    train_reducer(tiny_recipe, scenes, out, CPU, options=told)
    new = changed(tiny_recipe, "train_reducer.lr=0.002", "train_reducer.steps=6")
    train_reducer(new, scenes, out, CPU, options=told)
    rows = metrics(tmp_path / "r.run")
    assert [row["step"] for row in rows] == list(range(6))
    assert rows[5]["lr"] == pytest.approx(learning_rate(5, new.train_reducer), abs=1e-6)
    (line,) = (tmp_path / "r.run" / "changes.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 4, "changes": ["recipe.train_reducer.lr: 0.0024 -> 0.002"]}
    assert "going on at step 4 with a changed recipe" in capsys.readouterr().out
    train_reducer(changed(new, "train_reducer.steps=7"), scenes, out, CPU)  # now it is the run's own
    with pytest.raises(VugenError, match="the networks have changed .*decoder.channels"):
        train_reducer(changed(new, "decoder.channels=[16,16]"), scenes, out, CPU, options=told)


def test_a_run_of_a_version_without_a_key_goes_on_as_that_keys_default_says(
    scenes: Path, tiny_recipe: Recipe, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "reducer.run", tmp_path / "r.run")
    state, out = sorted((tmp_path / "r.run").glob("state-*"))[-1], tmp_path / "r.safetensors"
    tensors, card = load_tensors(state), read_header(state)
    assert isinstance(card, StateCard)
    del card.resolved["recipe"]["decoder"]["smoothing"]
    del card.resolved["recipe"]["decoder"]["losses"]["gradient"], card.resolved["recipe"]["instruction"]
    save_checkpoint(state, tensors, card)
    with pytest.raises(VugenError, match=r"other settings \(recipe\.decoder\.smoothing: 0\.0 -> 2\.0\)"):
        train_reducer(changed(tiny_recipe, "decoder.smoothing=2.0"), scenes, out, CPU)
    train_reducer(changed(tiny_recipe, "train_reducer.steps=5"), scenes, out, CPU)
    assert read_card(out).step == 5


def test_a_disk_that_fills_up_ends_the_run_which_goes_on_when_there_is_room(
    trained: Path, scenes: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    save, calls = safetensors.torch.save_file, []

    def fills_up(*arguments: object, **options: object) -> None:
        calls.append(arguments)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*arguments, **options)

    recipe, out = changed(tiny_recipe, "train_reducer.checkpoint_every=2"), tmp_path / "r.safetensors"
    monkeypatch.setattr(safetensors.torch, "save_file", fills_up)
    with pytest.raises(VugenError, match="cannot write .*state-0000004.*No space left on device"):
        train_reducer(recipe, scenes, out, CPU)
    assert [p.name for p in tmp_path.glob("**/*.safetensors")] == ["state-0000002.safetensors"]
    monkeypatch.undo()
    train_reducer(recipe, scenes, out, CPU)
    whole, _ = load_checkpoint(trained / "reducer.safetensors")
    after, _ = load_checkpoint(out)
    assert all(torch.equal(after[name], tensor) for name, tensor in whole.items())


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(
    scenes: Path, vlm_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    command = ["train-reducer", "--data", scenes, "--out", "locked/r.safetensors"]
    command += [part for o in tiny_overrides(vlm_path) for part in ("--set", o)]
    with permissions_obeyed():
        ended = vugen_here(*command, cwd=tmp_path)
    assert ended.returncode == 1 and "Permission denied" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr and not list((tmp_path / "locked").iterdir())


@contextmanager
def permissions_obeyed() -> Iterator[None]:
    """Within, this thread lacks root's right to write where it may not (CAP_DAC_OVERRIDE, bit 1)."""
    import ctypes

    libc = ctypes.CDLL(None)
    this_thread = (ctypes.c_uint32 * 2)(0x20080522, 0)  # the version of the call, and whom it is about
    rights = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then those from bit 32
    assert libc.capget(this_thread, rights) == 0
    had = rights[0]
    rights[0] = had & ~0b10
    assert libc.capset(this_thread, rights) == 0
    try:
        yield
    finally:
        rights[0] = had
        assert libc.capset(this_thread, rights) == 0


def test_a_run_can_be_made_longer(scenes: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "r.safetensors"
    train_reducer(tiny_recipe, scenes, out, CPU)
    train_reducer(changed(tiny_recipe, "train_reducer.steps=6"), scenes, out, CPU)
    assert read_card(out).step == 6
    assert [row["step"] for row in metrics(tmp_path / "r.run")] == list(range(6))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(
    scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = changed(
        tiny_recipe,
        "train_reducer.lr=1e30",
        "train_reducer.warmup=0",
        "train_reducer.steps=50",
        "train_reducer.checkpoint_every=1",
    )
    with pytest.raises(VugenError, match="the loss of step .* is (nan|inf).*last good state is kept"):
        train_reducer(recipe, scenes, tmp_path / "r.safetensors", CPU)
    assert not (tmp_path / "r.safetensors").exists()
    assert list((tmp_path / "r.run").glob("state-*"))
    (listed,) = (tmp_path / "r.run").glob("not-finite-*.json")
    bad = json.loads(listed.read_text())
    known = {meta["source_key"] for _, meta in ShardedImages(scenes).in_order()}
    assert bad["step"] == len(metrics(tmp_path / "r.run")) and len(bad["samples"]) == 4
    assert set(bad["samples"]) <= known


def test_states_are_written_in_the_background_whole_and_the_two_newest_are_kept(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(100)}
    with StateWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(tensors, StateCard(stage="test-state", step=step, resolved={}))
    kept = sorted(tmp_path.iterdir())
    assert [path.name for path in kept] == ["state-0000002.safetensors", "state-0000003.safetensors"]
    save_checkpoint(
        tmp_path / "direct.safetensors", tensors, StateCard(stage="test-state", step=3, resolved={})
    )
    assert kept[1].read_bytes() == (tmp_path / "direct.safetensors").read_bytes()
    (tmp_path / "state-0000009.safetensors").write_bytes(b"damaged, so the run went on from 3")
    with StateWriter(tmp_path) as writer:
        writer.write(tensors, StateCard(stage="test-state", step=4, resolved={}))
    kept = sorted(tmp_path.glob("state-*"))
    assert [path.name for path in kept] == ["state-0000003.safetensors", "state-0000004.safetensors"]


def test_a_state_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(VugenError, match="cannot write"), StateWriter(tmp_path / "run") as writer:
        writer.write({"w": torch.zeros(1)}, StateCard(stage="test-state", step=1, resolved={}))


def test_a_resumed_run_may_find_its_data_elsewhere_but_not_take_another_step_size() -> None:
    assert is_free("recipe.train_reducer.steps") and is_free("data.path") and is_free("recipe.data.workers")
    assert not is_free("recipe.nano_vlm.vision_steps") and not is_free("recipe.train_reducer.lr")


def test_stage_two_refuses_the_wrong_checkpoint_and_another_vlm(
    trained: Path, scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "s.safetensors"
    with pytest.raises(VugenError, match="is a sampler checkpoint, but a reducer is needed"):
        train_sampler(tiny_recipe, trained / "sampler.safetensors", scenes, out, CPU)
    other = save_random_vlm(tmp_path / "other", seed=9)
    with pytest.raises(VugenError, match="was trained on the VLM .*tiny.* but this is .*other"):
        train_sampler(changed(tiny_recipe, f"vlm={other}"), trained / "reducer.safetensors", scenes, out, CPU)
    assert not out.exists()


def test_a_sampler_is_trained_further_from_its_own_weights(
    trained: Path, scenes: Path, vlm_path: Path, tmp_path: Path
) -> None:
    begun, further = trained / "sampler.safetensors", tmp_path / "further.safetensors"
    slow = ["--set", "train_sampler.lr=1e-9", "--set", "train_sampler.weight_decay=0"]
    command = ["train-sampler", "--init", begun, "--data", scenes, "--out", further, "--steps", "2", *slow]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0, result.exception
    before, after = load_checkpoint(begun)[0], load_checkpoint(further, "sampler")[0]
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.allclose(tensor, after[name], atol=1e-6) and (
            name.startswith("expert.") or torch.equal(tensor, after[name])
        )


def test_a_recipe_that_does_not_fit_the_images_is_refused(
    scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(VugenError, match="needs a multiple of 8"):
        train_reducer(changed(tiny_recipe, "decoder.image_size=60"), scenes, tmp_path / "r.safetensors", CPU)


def test_a_loaded_autoencoder_is_frozen_and_the_same(trained: Path) -> None:
    module, tensors, _ = load_autoencoder(trained / "reducer.safetensors", CPU)
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert all(
        torch.equal(tensors[f"autoencoder.{name}"], value) for name, value in module.state_dict().items()
    )


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    settings = Training(steps=100, warmup=10, cooldown=0.2, lr=1.0)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert (
        rates[0] == pytest.approx(0.1) and rates[9] == 1.0 == rates[80] and rates[99] == pytest.approx(0.05)
    )


def test_the_average_is_the_closed_form() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(module, 0.9)
    expected = module.weight.detach().clone()
    for step in range(200):
        with torch.no_grad():
            module.weight.fill_(float(step))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert torch.allclose(ema.weights["weight"], expected, rtol=1e-5)
    with ema.in_place():
        assert torch.allclose(module.weight, expected, rtol=1e-5)
    assert module.weight.item() == 199


def test_differences_name_the_keys() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [
        "a.c: 2 -> 3",
        "d: None -> 4",
    ]


def test_precision_follows_the_hardware() -> None:
    assert wants_bfloat16("bfloat16", CPU) and not wants_bfloat16("float32", CPU)
    assert wants_bfloat16("auto", CPU) == ("avx512_bf16" in cpu_flags())


def test_a_missing_gpu_is_explained() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(VugenError, match="no usable GPU"):
        pick_device("cuda")
    with pytest.raises(VugenError, match="--device abacus"):
        pick_device("abacus")


def test_a_task_that_is_shown_one_gpu_takes_it_whatever_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_available", True), ("device_count", 1), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
    said = {"MASTER_ADDR": "a", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "3"}
    for name, text in said.items():
        monkeypatch.setenv(name, text)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert pick_device() == torch.device("cuda:0")
    for name, text in (("TORCHELASTIC_RUN_ID", "torchrun's"), ("CUDA_VISIBLE_DEVICES", "")):
        with monkeypatch.context() as changed:
            changed.setenv(name, text)
            with pytest.raises(VugenError, match="2 processes on a machine with 1 GPUs"):
                pick_device()


@pytest.mark.parametrize("fault", [False, True])
def test_attention_goes_step_by_step_unless_that_code_of_its_family_has_a_fault(fault: bool) -> None:
    expert: Any = SimpleNamespace(
        decoder=SimpleNamespace(config=SimpleNamespace(_attn_implementation="fused"))
    )
    expert.decoder.set_attn_implementation = partial(setattr, expert.decoder.config, "_attn_implementation")
    tried = []

    def attempt(expert: Any) -> None:
        tried.append(expert.decoder.config._attn_implementation)
        if fault and tried[-1] == "eager":
            raise VugenError("its heads are not repeated")

    attend_eagerly(expert, attempt)
    assert tried == (["eager", "fused"] if fault else ["eager"])
    assert expert.decoder.config._attn_implementation == tried[-1]
