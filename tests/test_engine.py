"""The engine as GPUs and clusters need it: tensors on their device, few waits, one run a folder, signals."""

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vugen_cli.data.loader import Batch
from vugen_cli.engine import loop
from vugen_cli.engine.ema import EMA
from vugen_cli.engine.optimizer import make_optimizer
from vugen_cli.engine.precision import passes, rounding
from vugen_cli.engine.signals import StopSignals
from vugen_cli.engine.stage import Stage
from vugen_cli.engine.state import StateWriter, newest_state, resume, run_lock, save_state
from vugen_cli.errors import Stopped, VugenError
from vugen_cli.metrics.features import full_float32
from vugen_cli.recipe import Recipe, Training
from vugen_cli.seeds import BatchGenerator, random_rows

CPU, META = torch.device("cpu"), torch.device("meta")
SETTINGS = Training(
    steps=4, batch_size=4, warmup=1, checkpoint_every=100, preview_every=100, precision="float32"
)


def line(device: torch.device = CPU) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 4, device=device)


def stage(module: nn.Module, bad: int | None = None) -> Stage:
    """A stage that learns the identity, and whose loss is not a number at one step."""

    def loss(batch: Batch, generator: torch.Generator, step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        noise = random_rows(torch.randn, batch.images.shape, generator) if batch.images.device == CPU else 0
        error = (module(batch.images + noise) - batch.images).square().mean()
        return error * float("nan") if step == bad else error, {}

    return Stage("reducer", module, loss, lambda path: path.touch(), {"data": {"path": "x"}})


def batches(first: int) -> Iterator[Batch]:
    for number in range(first, 1000):
        images = torch.randn(4, 4, generator=torch.Generator().manual_seed(number))
        yield Batch(images, ["a"] * 4, [{"source_key": f"{number}-{i}"} for i in range(4)], corrupt=0)


def run(folder: Path, of: Stage, settings: Training = SETTINGS, device: torch.device = CPU) -> nn.Module:
    return loop.train(of, batches, settings, Recipe(), folder, device)


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


class NoTwoDevices(TorchDispatchMode):
    """Fails where one operation, other than a copy, meets tensors of two devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        devices = {x.device.type for x in leaves if isinstance(x, torch.Tensor)}
        assert len(devices) < 2 or "copy" in str(func), f"{func} meets {devices}"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fused_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused optimiser takes parameters on `meta` as it takes a GPU's."""
    for module in ("torch.optim.optimizer", "torch.utils._foreach_utils"):
        taken = "_get_fused_kernels_supported_devices"
        monkeypatch.setattr(sys.modules[module], taken, lambda: ["cpu", "meta"])


def test_too_much_damage_ends_a_run(tmp_path: Path) -> None:
    def damaged(first: int) -> Iterator[Batch]:
        return (replace(batch, corrupt=4) for batch in batches(first))

    settings = SETTINGS.model_copy(update={"steps": 300})
    with pytest.raises(VugenError, match=r"1\d\d\d of .* samples are damaged, more than data\.max_corrupt"):
        loop.train(stage(line()), damaged, settings, Recipe(), tmp_path / "r.run", CPU)


def test_a_run_that_went_further_than_is_asked_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "r.run", stage(line()))
    with pytest.raises(VugenError, match="has taken 4 steps, and only 3 are asked for"):
        run(tmp_path / "r.run", stage(line()), SETTINGS.model_copy(update={"steps": 3}))


@pytest.mark.usefixtures("fused_everywhere")
def test_a_state_is_taken_up_where_the_parameters_are(tmp_path: Path) -> None:
    run(tmp_path / "r.run", stage(line()))
    module = line(META)
    ema, optimizer = EMA(module, 0.9), make_optimizer(module, SETTINGS)
    assert resume(tmp_path / "r.run", stage(module), ema, optimizer) == 4
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert len(moments) == 6, "two weights, each with a count of steps and two moments"
    assert {tensor.device for tensor in [*moments, *ema.weights.values()]} == {META}


def test_a_weight_that_was_not_trained_where_the_state_was_written_is_its_own_average(tmp_path: Path) -> None:
    frozen = line()
    frozen.bias.requires_grad_(False)
    run(tmp_path / "r.run", stage(frozen))
    module = line()
    ema = EMA(module, 0.9)
    ema.weights["bias"].zero_()
    assert resume(tmp_path / "r.run", stage(module), ema, make_optimizer(module, SETTINGS)) == 4
    assert torch.equal(ema.weights["bias"], frozen.bias)


@pytest.mark.usefixtures("fused_everywhere")
def test_no_tensor_of_a_resumed_step_stays_behind_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "r.run", stage(line()))
    monkeypatch.setattr(loop, "read_later", lambda agreed: lambda: [0.0] * len(agreed))
    monkeypatch.setattr(loop, "save_state", lambda *_: None)
    monkeypatch.setattr(loop, "BatchGenerator", lambda _, size: BatchGenerator("cpu", size))
    module = line(META)
    longer = SETTINGS.model_copy(update={"steps": 7})
    with NoTwoDevices():
        run(tmp_path / "r.run", stage(module), longer, META)
    assert len(rows(tmp_path / "r.run")) == 7
    assert {p.device for p in module.parameters()} == {META}


class Reads(TorchFunctionMode):
    """Counts what makes a host wait for its device: for a number of it, or to copy one there."""

    READS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__")
    READS += ("new_tensor",)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in self.READS
        return func(*args, **(kwargs or {}))


def test_a_step_reads_from_its_device_once(tmp_path: Path) -> None:
    counts = []
    for steps in (4, 14):
        with Reads() as reads:
            run(tmp_path / f"{steps}.run", stage(line()), SETTINGS.model_copy(update={"steps": steps}))
        counts.append(reads.count)
    assert counts[1] - counts[0] == 10


def test_captions_that_were_cut_are_counted_and_are_no_curve(tmp_path: Path) -> None:
    def cut(first: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches(first)):
            batch.cut = 3 if number == 0 else 0
            yield batch

    loop.train(stage(line()), cut, SETTINGS, Recipe(), tmp_path / "r.run", CPU)
    assert [row.get("captions_cut") for row in rows(tmp_path / "r.run")] == [3, None, None, None]
    assert (tmp_path / "r.run" / "curves.png").is_file()


def test_the_read_is_of_the_step_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    inner = loop.agree

    def agree(taken: Any, *rest: Any) -> torch.Tensor:
        events.append(f"launched {taken.step}")
        return inner(taken, *rest)

    def later(agreed: torch.Tensor) -> Any:
        step = len([e for e in events if e.startswith("launched")]) - 1
        return lambda: events.append(f"read {step}") or agreed.tolist()

    monkeypatch.setattr(loop, "agree", agree)
    monkeypatch.setattr(loop, "read_later", later)
    run(tmp_path / "r.run", stage(line()))
    assert events == [
        "launched 0", "launched 1", "read 0", "launched 2", "read 1", "launched 3", "read 2", "read 3"
    ]  # fmt: skip


def test_a_loss_that_is_no_number_changes_no_weight_and_ends_the_run(tmp_path: Path) -> None:
    good, spoilt = line(), line()
    run(tmp_path / "good.run", stage(good), SETTINGS.model_copy(update={"ema": 0.0, "cooldown": 0.0}))
    endless = SETTINGS.model_copy(update={"steps": 1000, "cooldown": 0.0})
    with pytest.raises(VugenError, match=r"the loss of step 4 is nan .* 4-0, 4-1, 4-2, \.\.\. \(all 4 in"):
        run(tmp_path / "spoilt.run", stage(spoilt, bad=4), endless)
    # One more step was under way when the number was read, and was taken from weights that step 4 left alone.
    assert all(p.isfinite().all() for p in spoilt.parameters())
    assert len(rows(tmp_path / "spoilt.run")) == 4
    listed = json.loads((tmp_path / "spoilt.run" / "not-finite-0000004.json").read_text())
    assert listed["samples"] == [f"4-{i}" for i in range(4)]


def test_a_bad_step_is_never_saved(tmp_path: Path) -> None:
    often = SETTINGS.model_copy(update={"steps": 1000, "checkpoint_every": 1})
    with pytest.raises(VugenError, match="the loss of step 4"):
        run(tmp_path / "r.run", stage(line(), bad=4), often)
    assert sorted(p.name for p in (tmp_path / "r.run").glob("state-*"))[-1] == "state-0000004.safetensors"


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "r.run"
    with run_lock(folder), pytest.raises(VugenError, match=r"another process is training in .*r\.run"):
        run(folder, stage(line()))
    run(folder, stage(line()))


def test_the_lock_of_a_run_is_not_held_by_its_forked_workers(tmp_path: Path) -> None:
    (begin, end), (ready, told) = os.pipe(), os.pipe()
    with run_lock(tmp_path / "r.run"):
        child = os.fork()
        if not child:  # a loader's worker that outlives its run
            os.close(end)
            os.write(told, b"x")
            os.read(begin, 1)
            os._exit(0)
        os.read(ready, 1)
    try:
        with run_lock(tmp_path / "r.run"):
            pass
    finally:
        os.write(end, b"x")
        os.waitpid(child, 0)


def test_what_cannot_be_cleared_away_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps a file that was replaced while somebody reads it, and answers that it is busy."""
    (tmp_path / ".nfs0001").write_bytes(b"read by tail -f")

    def busy(path: Path, **_: object) -> None:
        raise OSError(errno.EBUSY, "busy", str(path))

    monkeypatch.setattr(Path, "unlink", busy)
    with run_lock(tmp_path):
        assert (tmp_path / ".nfs0001").exists()


def test_what_killed_processes_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    folder = tmp_path / "r.run"
    folder.mkdir()
    (folder / ".state-0000002.safetensors.k3j2.safetensors").write_bytes(b"half")
    (folder / ".tmp8oyq45").write_bytes(b"half")  # what the safetensors library renames
    (folder / ".state-0000003.1f2e3d4c").mkdir()
    run(folder, stage(line()))
    assert not list(folder.glob(".*")) and list(folder.glob("state-*"))


def test_what_others_keep_in_the_folder_of_a_run_stays_and_is_no_state_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "r.run"
    run(folder, stage(line()))
    (folder / ".git").mkdir()
    newest = newest_state(folder)
    assert newest
    for name in ("state-best", "state-0000001-before", "state-9999999.bak"):
        shutil.copy(newest, folder / f"{name}.safetensors")
    (folder / "state-10000000.safetensors").write_bytes(b"the newest, and damaged")
    assert newest_state(folder) == newest
    run(folder, stage(line()), SETTINGS.model_copy(update={"steps": 8}))
    assert (folder / ".git").is_dir() and len(list(folder.glob("state-*.safetensors"))) == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_saves_it(tmp_path: Path, number: signal.Signals) -> None:
    of = stage(line())
    inner = of.loss

    def loss(batch: Batch, generator: torch.Generator, step: int) -> Any:
        if step == 2:
            os.kill(os.getpid(), number)
            if number != signal.SIGINT:
                os.kill(os.getpid(), number)  # told twice, by the scheduler and by the launcher
        return inner(batch, generator, step)

    of.loss = loss
    with pytest.raises(Stopped, match="stopped at step [34] of 1000; run the same command again"):
        run(tmp_path / "r.run", of, SETTINGS.model_copy(update={"steps": 1000}))
    done = len(rows(tmp_path / "r.run"))
    assert [p.name for p in (tmp_path / "r.run").glob("state-*")] == [f"state-{done:07d}.safetensors"]


def test_a_second_interrupt_ends_at_once_but_not_while_a_state_is_saved() -> None:
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with stop.saving():
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_kill_while_the_history_is_rewritten_loses_none_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "r.run"
    run(folder, stage(line()))
    before = (folder / "metrics.jsonl").read_text()

    def killed(*_: object) -> None:
        raise OSError("killed")

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(VugenError):
        run(folder, stage(line()), SETTINGS.model_copy(update={"steps": 5}))
    assert (folder / "metrics.jsonl").read_text() == before


def test_the_average_changes_places_with_the_weights_without_a_copy_of_both() -> None:
    module = line()
    ema = EMA(module, 0.0)
    with torch.no_grad():
        module.weight.fill_(3.0)
    where = module.weight.data_ptr(), ema.weights["weight"].data_ptr()
    with ema.in_place():
        assert not (module.weight == 3).any() and (ema.weights["weight"] == 3).all()
        assert (module.weight.data_ptr(), ema.weights["weight"].data_ptr()) == where
    assert (module.weight == 3).all()


def test_a_state_that_was_written_is_the_one_read(tmp_path: Path) -> None:
    module = line()
    ema, optimizer = EMA(module, 0.9), make_optimizer(module, SETTINGS)
    module(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    with StateWriter(tmp_path) as writer:
        save_state(writer, stage(module), ema, optimizer, 1)
    again = line()
    ema2, optimizer2 = EMA(again, 0.9), make_optimizer(again, SETTINGS)
    assert resume(tmp_path, stage(again), ema2, optimizer2) == 1
    for mine, theirs in zip(optimizer.state.values(), optimizer2.state.values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize(("precision", "training", "rounds"), [
    ("float32", True, False), ("tf32", True, False), ("bfloat16", True, True), ("bfloat16", False, True),
    ("auto", False, False),
])  # fmt: skip
def test_one_policy_says_what_is_rounded(precision: str, training: bool, rounds: bool) -> None:
    a = torch.randn(64, 64)
    with passes(precision, CPU, training)():
        assert ((a @ a).dtype == torch.bfloat16) == rounds


def test_what_is_drawn_or_scored_in_mid_training_leaves_tf32_as_it_was() -> None:
    def allowed() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before, gpu = allowed(), torch.device("cuda")
    with rounding("tf32", gpu):
        assert allowed() == (True, True)
        with passes("float32", gpu)():
            assert allowed() == (False, False)
        assert allowed() == (True, True)
        with full_float32():
            assert allowed() == (False, False)
        assert allowed() == (True, True)
    assert allowed() == before
