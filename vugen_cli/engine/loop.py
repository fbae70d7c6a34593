"""The training loop that every stage shares.

A stage brings a module, a loss and a picture; the loop brings optimisation, averaging, checkpoints, resume,
logging and signals. Every random number of a step comes from a generator seeded by (seed, step), and batch b
of the data is the same whenever it is asked for, so a run that is killed and started again ends with the same
weights as one that never stopped.
"""

import contextlib
import math
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from vugen_cli.data.loader import Batch
from vugen_cli.engine.average import Average
from vugen_cli.engine.curves import plot_curves
from vugen_cli.engine.device import memory, wants_bfloat16
from vugen_cli.engine.distributed import Spread, shards_vlm, total
from vugen_cli.engine.loggers import MetricsLog
from vugen_cli.engine.profiling import STEPS as PROFILED
from vugen_cli.engine.profiling import Profile, lap
from vugen_cli.engine.stage import RunOptions, Stage
from vugen_cli.engine.state import StateWriter, resume, save_state
from vugen_cli.errors import Stopped, VugenError
from vugen_cli.files import write_json
from vugen_cli.processes import from_all, is_first, rank, world_size
from vugen_cli.recipe import Recipe, Training
from vugen_cli.seeds import BatchGenerator


def train(
    stage: Stage,
    batches_from: Callable[[int], Iterator[Batch]],
    settings: Training,
    recipe: Recipe,
    run: Path,
    device: torch.device,
    options: RunOptions = RunOptions(),
) -> nn.Module:
    """Run a stage to its last step, from its newest saved state if there is one.

    In a job of several processes each computes its rows of every batch; only the first writes.

    Args:
        stage: what to train.
        batches_from: step -> this process's stream from there, `engine.accumulate` batches a step.
        settings: the stage's part of the recipe.
        recipe: for its seed and engine.
        run: a directory for states, `metrics.jsonl`, `curves.png` and previews.
        device: where the module lives.
        options: of the command line.

    Returns:
        The module with its averaged weights, in evaluation mode.

    Raises:
        VugenError: the loss is not finite, the saved state belongs to another run, or a log that the recipe
            names cannot be kept.
        Stopped: SIGINT or SIGTERM came to one of the processes; the state was saved first.
    """
    if is_first():
        run.mkdir(parents=True, exist_ok=True)
    module, engine = stage.module, recipe.engine
    bfloat16 = wants_bfloat16(settings.precision, device)
    spread = Spread(stage, engine, bfloat16)
    average = Average(module, settings.ema)
    optimizer = torch.optim.AdamW(
        parameter_groups(module, settings.weight_decay),
        lr=settings.lr,
        betas=settings.betas,
        fused=True,
    )
    begin = resume(run, stage, average, optimizer, options.change_recipe)
    log = MetricsLog(run, begin, recipe.log, stage.resolved) if is_first() else None
    if options.profile and settings.steps - begin < PROFILED:
        raise VugenError(
            f"--profile watches {PROFILED} steps, and the run has {settings.steps - begin} left: give it more"
        )
    watch = options.profile and is_first()
    profile = Profile(run / "trace.json.gz", device, bfloat16, settings.batch_size) if watch else None
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
    generator = BatchGenerator(device)
    generator.size = settings.batch_size
    stop = StopSignals()
    progress = tqdm(
        total=settings.steps,
        initial=begin,
        desc=f"train {stage.name}",
        unit="step",
        smoothing=0.05,
        disable=not is_first(),
    )
    stream = batches_from(begin) if begin < settings.steps else iter(())
    with stop, StateWriter(run) as writer, progress, log or contextlib.nullcontext():
        for step in range(begin, settings.steps):
            if profile:
                profile.next_step()
            started = time.perf_counter()
            waited, corrupt, keys = 0.0, 0, []
            rate = learning_rate(step, settings)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            module.train()
            sums: dict[str, Tensor] = {}
            for part in range(engine.accumulate):
                lap("other")
                asked = time.perf_counter()
                batch = next(stream)
                waited += time.perf_counter() - asked
                lap("waiting for data")
                batch.images = batch.images.to(device, non_blocking=True)
                lap("copy to the device")
                corrupt += batch.corrupt
                keys += [str(meta.get("source_key", "?")) for meta in batch.meta]
                rows = len(batch.captions)
                place = (part * world_size() + rank()) * rows
                generator.rows = slice(place, place + rows)
                generator.manual_seed(recipe.seed * 1_000_003 + step)
                loss, values = spread.backward(
                    batch, generator, step, engine.accumulate, part + 1 == engine.accumulate, autocast
                )
                for name, value in {"loss": loss, **values}.items():
                    sums[name] = sums.get(name, 0) + value.detach().float()
            norm = nn.utils.clip_grad_norm_(module.parameters(), settings.clip)
            norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(device)
            # What the processes must agree on travels together, and is waited for once.
            means = torch.stack([*sums.values(), norm * engine.accumulate]) / engine.accumulate
            flags = means.new_tensor([corrupt, stop.asked])
            *shared, corrupt, stopping = total(torch.cat([means / world_size(), flags])).tolist()
            scalars = dict(zip([*sums, "grad_norm"], shared, strict=True))
            if not math.isfinite(scalars["loss"] + scalars["grad_norm"]):
                raise VugenError(not_finite(scalars, step, from_all(keys), run))
            optimizer.step()
            average.update(step)
            lap("clip, optimiser, average")
            writer.check()
            seconds = time.perf_counter() - started
            if log:
                log.add(
                    step=step,
                    loss=scalars.pop("loss"),
                    grad_norm=scalars.pop("grad_norm"),
                    lr=rate,
                    images_per_s=settings.batch_size / seconds,
                    data_wait=waited / seconds,
                    memory_gb=memory(device),
                    corrupt=int(corrupt),
                    **scalars,
                )
                progress.set_postfix(loss=f"{shared[0]:.3f}", refresh=False)
            progress.update()
            lap("logging")
            done = step + 1
            last = done == settings.steps
            # Before the state: a run that stops here goes on after this step.
            if stage.save and settings.keep_every and done % settings.keep_every == 0:
                with average.in_place():
                    stage.save(run / f"step-{done:07d}.safetensors", done)
            if last or stopping or done % settings.checkpoint_every == 0:
                save_state(writer, stage, average, optimizer, done)
            if is_first() and (last or stopping or done % settings.preview_every == 0):
                plot_curves([run])
            if stopping and not last:
                raise Stopped(
                    f"stopped at step {done} of {settings.steps}; run the same command again to go on"
                )
            if last or done % settings.preview_every == 0:
                # Sharded layers are gathered in bfloat16 here too.
                with average.in_place(), autocast if spread.sharded else contextlib.nullcontext():
                    module.eval()
                    preview(stage, run / f"preview-{done:07d}.png", spread.sharded or shards_vlm(engine))
    if profile:
        profile.next_step()
    average.copy_into_module()
    return module.eval()


def not_finite(scalars: dict[str, float], step: int, parts: list[list[str]], run: Path) -> str:
    """What to say of a step whose loss or gradient is not a number; its samples are listed in a file."""
    keys = [key for part in parts for key in part]
    listed = run / f"not-finite-{step:07d}.json"
    if is_first():
        write_json(listed, {"step": step, **{k: str(v) for k, v in scalars.items()}, "samples": keys})
    return (
        f"the loss of step {step} is {scalars['loss']} (gradient norm {scalars['grad_norm']}): stopped, and "
        f"the last good state is kept in {run}; its batch was {', '.join(keys[:3])}, ... (all {len(keys)} in "
        f"{listed.name}); try a lower lr or float32"
    )


def preview(stage: Stage, path: Path, together: bool) -> None:
    """Write the stage's picture; sharded networks need every process to draw, and the first one's is kept."""
    if is_first():
        stage.preview(path)
    elif together:
        with tempfile.TemporaryDirectory() as folder:
            stage.preview(Path(folder) / path.name)


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


# --- state: what a killed run goes on from ---


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
