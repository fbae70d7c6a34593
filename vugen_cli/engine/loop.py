"""The training loop that every stage shares.

A stage brings a module, a loss and a picture; the loop brings optimisation, averaging, checkpoints, resume,
logging and signals. Every random number of a step comes from a generator seeded by (seed, step), and batch b
of the data is the same whenever it is asked for, so a run that is killed and started again ends with the same
weights as one that never stopped.
"""

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from vugen_cli.data.loader import Batch
from vugen_cli.engine.checkpoint import load_checkpoint, part, save_checkpoint, with_prefix
from vugen_cli.engine.curves import plot_curves
from vugen_cli.errors import Stopped, VugenError
from vugen_cli.recipe import Training

FREE = ("steps", "checkpoint_every", "preview_every")  # what a resumed run may change: it may be made longer


@dataclass
class Stage:
    """What makes one stage different from another.

    Attributes:
        name: `vlm`, `reducer` or `sampler`.
        module: holds every trained weight, and only those.
        loss: (batch, generator, step) -> (scalar loss, named scalars to log). Called under autocast.
        preview: path of the PNG to write -> None; called while the module has its averaged weights.
        resolved: the recipe, data and VLM of the run as plain values; a resumed run must match them.
    """

    name: str
    module: nn.Module
    loss: Callable[[Batch, torch.Generator, int], tuple[Tensor, dict[str, Tensor]]]
    preview: Callable[[Path], None]
    resolved: dict[str, Any]


def train(
    stage: Stage,
    batches_from: Callable[[int], Iterator[Batch]],
    settings: Training,
    seed: int,
    run: Path,
    device: torch.device,
) -> nn.Module:
    """Run a stage to its last step, from its newest saved state if there is one.

    Args:
        stage: what to train.
        batches_from: batch number -> the stream of batches from there.
        settings: the stage's part of the recipe.
        seed: of the run.
        run: a directory for states, `metrics.jsonl`, `curves.png` and previews.
        device: where the module lives.

    Returns:
        The module with its averaged weights, in evaluation mode.

    Raises:
        VugenError: the loss is not finite, or the saved state belongs to another run.
        Stopped: SIGINT or SIGTERM came; the state was saved first.
    """
    run.mkdir(parents=True, exist_ok=True)
    module = stage.module
    average = Average(module, settings.ema)
    optimizer = torch.optim.AdamW(
        parameter_groups(module, settings.weight_decay),
        lr=settings.lr,
        betas=settings.betas,
        fused=True,
    )
    first = resume(run, stage, average, optimizer)
    log = MetricsLog(run / "metrics.jsonl", first)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=wants_bfloat16(settings.precision, device))
    generator = torch.Generator(device)
    stop = StopSignals()
    progress = tqdm(
        total=settings.steps, initial=first, desc=f"train {stage.name}", unit="step", smoothing=0.05
    )
    stream = batches_from(first) if first < settings.steps else iter(())
    with stop, progress:
        for step in range(first, settings.steps):
            started = time.perf_counter()
            batch = next(stream)
            waited = time.perf_counter() - started
            batch.images = batch.images.to(device, non_blocking=True)
            rate = learning_rate(step, settings)
            for group in optimizer.param_groups:
                group["lr"] = rate
            generator.manual_seed(seed * 1_000_003 + step)
            module.train()
            with autocast:
                loss, values = stage.loss(batch, generator, step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), settings.clip)
            if not math.isfinite(loss.item() + norm.item()):
                raise VugenError(
                    f"the loss of step {step} is {loss.item()} (gradient norm {norm.item()}): stopped, "
                    f"and the last good state is kept in {run}; try a lower lr or float32"
                )
            optimizer.step()
            average.update(step)
            seconds = time.perf_counter() - started
            log.add(
                step=step,
                loss=loss.item(),
                grad_norm=norm.item(),
                lr=rate,
                images_per_s=len(batch.captions) / seconds,
                data_wait=waited / seconds,
                corrupt=batch.corrupt,
                **{name: value.item() for name, value in values.items()},
            )
            progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            done = step + 1
            last = done == settings.steps
            if last or stop.asked or done % settings.checkpoint_every == 0:
                save_state(run, stage, average, optimizer, done)
                plot_curves([run])
            if stop.asked and not last:
                raise Stopped(
                    f"stopped at step {done} of {settings.steps}; run the same command again to go on"
                )
            if last or done % settings.preview_every == 0:
                with average.in_place():
                    module.eval()
                    stage.preview(run / f"preview-{done:07d}.png")
    average.copy_into_module()
    return module.eval()


class Average:
    """An exponential moving average of a module's trained weights, in float32."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.module = module
        self.weights = {n: p.detach().clone().float() for n, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the module's weights; early steps count more, so the average forgets the start."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.weights.values()), [p.detach().float() for p in self.module.parameters()], 1 - decay
        )

    @torch.no_grad()
    def copy_into_module(self) -> None:
        """Replace the module's weights by the average."""
        for name, parameter in self.module.named_parameters():
            parameter.copy_(self.weights[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the module has the averaged weights."""
        kept = [p.detach().clone() for p in self.module.parameters()]
        self.copy_into_module()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, weights in zip(self.module.parameters(), kept, strict=True):
                    parameter.copy_(weights)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms and embeddings of one dimension do not."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def learning_rate(step: int, settings: Training) -> float:
    """Linear warm-up, flat, then linear to zero over the last `cooldown` of the steps."""
    up = min(1.0, (step + 1) / max(1, settings.warmup))
    down = min(1.0, (settings.steps - step) / max(1.0, settings.cooldown * settings.steps))
    return settings.lr * up * down


def wants_bfloat16(precision: str, device: torch.device) -> bool:
    """`auto` means bfloat16 wherever the hardware multiplies it natively."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and "avx512_bf16" in cpu_flags()


def cpu_flags() -> set[str]:
    """Instruction sets of this processor, as Linux names them; empty elsewhere."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()


def pick_device(name: str | None = None) -> torch.device:
    """The device asked for, else the GPU if there is one, else the CPU.

    Raises:
        VugenError: there is no such device here.
    """
    if name and name.startswith("cuda") and not torch.cuda.is_available():
        raise VugenError(
            f"--device {name}: this machine has no usable GPU; leave --device out to run on the CPU"
        )
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except Exception as error:  # each backend that is missing raises its own kind
        raise VugenError(f"--device {name}: {str(error).strip().splitlines()[0]}") from error
    return device


# --- state: what a killed run goes on from ---


def save_state(
    run: Path, stage: Stage, average: Average, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Save weights, average and optimiser after `step` steps; the two newest states are kept."""
    names = {id(p): n for n, p in stage.module.named_parameters()}
    tensors = with_prefix(dict(stage.module.named_parameters()), "module")
    tensors |= with_prefix(dict(stage.module.named_buffers()), "buffer")
    tensors |= with_prefix(average.weights, "average")
    for parameter, moments in optimizer.state.items():
        tensors |= with_prefix(moments, f"optimizer.{names[id(parameter)]}")
    card = {"stage": f"{stage.name}-state", "step": step, "resolved": stage.resolved}
    save_checkpoint(run / f"state-{step:07d}.safetensors", tensors, card)
    for old in sorted(run.glob("state-*.safetensors"))[:-2]:
        old.unlink()


def resume(run: Path, stage: Stage, average: Average, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest whole state of a run and return its step, or 0 when there is none.

    Raises:
        VugenError: the state was saved under another recipe, data set or VLM.
    """
    for path in sorted(run.glob("state-*.safetensors"), reverse=True):
        try:
            tensors, card = load_checkpoint(path)
        except VugenError as error:
            tqdm.write(f"{error}; trying the state before it")
            continue
        changed = [
            c for c in differences(card["resolved"], stage.resolved) if not c.partition(":")[0].endswith(FREE)
        ]
        if changed:
            raise VugenError(
                f"{run} holds a run with other settings ({'; '.join(changed[:4])}): give --out another name, "
                f"or delete {run} to start over"
            )
        for prefix, into in (
            ("module", dict(stage.module.named_parameters())),
            ("buffer", dict(stage.module.named_buffers())),
            ("average", average.weights),
        ):
            saved = part(tensors, prefix)
            with torch.no_grad():
                for name, tensor in into.items():
                    tensor.copy_(saved[name])
        for name, parameter in stage.module.named_parameters():
            optimizer.state[parameter] = {
                # laid out in memory like the parameter: the fused optimiser walks both together
                key: tensor
                if key == "step"
                else torch.empty_like(parameter, requires_grad=False).copy_(tensor)
                for key, tensor in part(tensors, f"optimizer.{name}").items()
            }
        return int(card["step"])
    return 0


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys whose values differ, as `key: old -> new`."""
    changed = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed += differences(a, b, f"{prefix}{key}.")
        elif json.dumps(a) != json.dumps(b):
            changed.append(f"{prefix}{key}: {a} -> {b}")
    return changed


class MetricsLog:
    """`metrics.jsonl`: one line a step. A resumed run drops the lines of steps it will do again."""

    def __init__(self, path: Path, first: int):
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] < first:
                        kept.append(line)
                except ValueError:
                    continue  # the line being written when the run was killed
        path.write_text("".join(line + "\n" for line in kept))
        self.file = open(path, "a", buffering=1)  # noqa: SIM115 - lives as long as the run

    def add(self, **values: float) -> None:
        """Append one step."""
        self.file.write(
            json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}) + "\n"
        )


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a wish to stop after the step; a second one acts at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopSignals":
        self.before: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread: a notebook or a test
                self.before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, _frame: object) -> None:
        self.asked = True
        signal.signal(number, self.before[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
