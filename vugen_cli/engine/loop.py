"""The training loop that every stage shares.

A stage brings a module, a loss and a picture; the loop brings optimisation, averaging, checkpoints, resume,
logging and signals. Every random number of a step comes from a generator seeded by (seed, step), and batch b
of the data is the same whenever it is asked for, so a run that is killed and started again ends with the same
weights as one that never stopped.
"""

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vugen_cli.card import RunCard
from vugen_cli.data.loader import Batch, DamageLimit
from vugen_cli.engine.curves import LiveCurves
from vugen_cli.engine.device import memory, read_later
from vugen_cli.engine.distributed import DataParallel, all_reduce, shards_vlm
from vugen_cli.engine.ema import EMA
from vugen_cli.engine.loggers import MetricsLog
from vugen_cli.engine.optimizer import learning_rate, make_optimizer, set_rate
from vugen_cli.engine.precision import passes, rounding, wants_bfloat16
from vugen_cli.engine.profiling import STEPS as PROFILED
from vugen_cli.engine.profiling import Profile, mark
from vugen_cli.engine.signals import StopSignals
from vugen_cli.engine.stage import RunOptions, Stage
from vugen_cli.engine.state import StateWriter, resume, run_lock, save_state
from vugen_cli.errors import Stopped, VugenError
from vugen_cli.files import write_json
from vugen_cli.processes import all_gather, is_first, rank, world_size
from vugen_cli.progress import progress_bar
from vugen_cli.recipe import Recipe, Training
from vugen_cli.seeds import BatchGenerator
from vugen_cli.version import __version__


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

    In a job of several processes each computes its rows of every batch; only the first writes. What a step
    measured is read from the device one step late, so that a GPU never waits for its host.

    Args:
        stage: what to train.
        batches_from: step -> this process's stream from there, `engine.accumulate` batches a step.
        settings: the stage's part of the recipe.
        recipe: for its seed and engine.
        run: a directory for states, `metrics.jsonl`, `run.json`, `curves.png` and previews.
        device: where the module lives.
        options: of the command line.

    Returns:
        The module with its averaged weights, in evaluation mode.

    Raises:
        VugenError: the loss is not finite, the saved state belongs to another run, another process trains
            there, or a log that the recipe names cannot be kept.
        Stopped: a signal came to one of the processes; the state was saved first.
    """
    with contextlib.ExitStack() as closing:
        # The run: held against others, its weights spread over processes, and taken up where it was left.
        if is_first():
            closing.enter_context(run_lock(run))
        module, engine = stage.module, recipe.engine
        closing.enter_context(rounding(settings.precision, device))  # of backward passes too
        autocast = passes(settings.precision, device, training=True)
        parallel = DataParallel(stage, engine, device, wants_bfloat16(settings.precision, device))
        ema, optimizer = EMA(module, settings.ema), make_optimizer(module, settings)
        begin = resume(run, stage, ema, optimizer, options.change_recipe)
        if begin > settings.steps:
            raise VugenError(
                f"{run} holds a run that has taken {begin} steps, and only {settings.steps} are asked for: "
                f"give it {begin} or more, or --out another name"
            )

        # Who watches it: logs, a progress bar, a profile, signals, and the thread that writes states.
        log = open_log(run, begin, settings, recipe, stage, closing)
        curves = LiveCurves(run)
        profile = watched(options, settings, begin, run, device)
        progress = closing.enter_context(
            progress_bar(
                desc=f"train {stage.name}", unit="step", total=settings.steps, initial=begin, smoothing=0.05
            )
        )
        stop = closing.enter_context(StopSignals())
        writer = closing.enter_context(StateWriter(run))

        generator = BatchGenerator(device, settings.batch_size)
        started = time.perf_counter()
        stream = batches_from(begin) if begin < settings.steps else iter(())
        damage = DamageLimit(recipe.data.max_corrupt)
        unread, stopping = list[Taken](), False
        for step in range(begin, settings.steps):
            if profile:
                profile.next_step()
            taken = Taken(step, learning_rate(step, settings))

            # Forward and backward, part by part; then what the processes must agree on, in one message.
            module.train()
            optimizer.zero_grad(set_to_none=True)
            sums = gradients(taken, parallel, stream, generator, recipe, device, autocast)
            norm = nn.utils.clip_grad_norm_(module.parameters(), settings.clip)
            agreed = agree(taken, sums, norm, stop.asked, engine.accumulate, device)

            # The update, which a loss or gradient that is not finite turns into none, on the device.
            set_rate(optimizer, taken.rate)
            found_inf = (~agreed[: len(taken.names)].isfinite().all()).float()
            if parallel.sharded and engine.offload:
                found_inf = found_inf.cpu()  # the optimiser would not wait for a copy of its own to arrive
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # what AMP's scaler sets
            optimizer.step()
            ema.update(step)
            taken.read, now = read_later(agreed), time.perf_counter()
            taken.seconds, started = now - started, now
            mark("clip, optimiser, average")

            # What the step before measured; this one's too where it is saved or shown.
            writer.check()
            done, due = step + 1, due_after(step + 1, stage, settings)
            unread.append(taken)
            while len(unread) > (0 if due or stopping else 1):
                stopping |= note(unread.pop(0), damage, log, progress, settings, run, device)
            mark("logging")

            # A checkpoint to keep comes before the state: a run that stops here goes on after this step.
            if "keep" in due and stage.save:
                writer.wait()  # a state and a checkpoint in memory at once would be too much
                with ema.in_place():
                    stage.save(run / f"step-{done:07d}.safetensors", done)
            if "state" in due or stopping:
                with stop.saving():
                    save_state(writer, stage, ema, optimizer, done)
            drawn = is_first() and curves.update("preview" in due or stopping)
            if stopping and done < settings.steps:
                with stop.saving():
                    writer.wait()
                raise Stopped(
                    f"stopped at step {done} of {settings.steps}; run the same command again to go on"
                )
            if "preview" in due:
                # Sharded layers are gathered in bfloat16 here too.
                with ema.in_place(), autocast() if parallel.sharded else contextlib.nullcontext():
                    module.eval()
                    preview(stage, run / f"preview-{done:07d}.png", parallel.sharded or shards_vlm(engine))
            if due or drawn:
                started = time.perf_counter()  # saving and drawing are no part of the next step
        if profile:
            profile.next_step()
    ema.copy_into_module()
    return module.eval()


@dataclass
class Taken:
    """A step as its process took it.

    Attributes:
        step, rate: its number and its learning rate.
        waited, seconds: how long it waited for data, and took in all.
        corrupt, cut: samples that were damaged and replaced; captions that were too long.
        keys: of its samples.
        names: of the numbers that `read` gives first: losses and gradient norm, means over the whole batch.
        read: gives those numbers, then what `agree` appends.
    """

    step: int
    rate: float
    waited: float = 0.0
    seconds: float = 0.0
    corrupt: int = 0
    cut: int = 0
    keys: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    read: Callable[[], list[float]] = list


def gradients(
    taken: Taken,
    parallel: DataParallel,
    stream: Iterator[Batch],
    generator: BatchGenerator,
    recipe: Recipe,
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
) -> dict[str, Tensor]:
    """Add up the gradients of a step's parts, `engine.accumulate` batches of the stream.

    Returns:
        The sums of the parts' losses, the total as `loss`; each a scalar on the device.
    """
    sums: dict[str, Tensor] = {}
    parts = recipe.engine.accumulate
    for part in range(parts):
        mark("other")
        asked = time.perf_counter()
        batch = next(stream)
        taken.waited += time.perf_counter() - asked
        mark("waiting for data")
        batch.images = batch.images.to(device, non_blocking=True)
        mark("copy to the device")
        taken.corrupt += batch.corrupt
        taken.keys += [str(meta.get("source_key", "?")) for meta in batch.meta]
        rows = len(batch.captions)
        generator.begin(recipe.seed * 1_000_003 + taken.step, (rank() * parts + part) * rows, rows)
        loss, values = parallel.backward(batch, generator, taken.step, parts, part + 1 == parts, autocast())
        taken.cut += batch.cut
        for name, value in {"loss": loss, **values}.items():
            sums[name] = sums.get(name, 0) + value.detach().float()
    return sums


def agree(
    taken: Taken, sums: dict[str, Tensor], norm: Tensor, asked: bool, parts: int, device: torch.device
) -> Tensor:
    """Means of losses and gradient norm over processes and parts, then counts: corrupt, cut, told to stop."""
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).to(device)
    taken.names = [*sums, "grad_norm"]
    means = torch.stack([*sums.values(), norm * parts]) / parts
    # Filled in on the device: to copy them there would make the host wait for it.
    counts = [torch.full((1,), float(n), device=device) for n in (taken.corrupt, taken.cut, asked)]
    return all_reduce(torch.cat([means / world_size(), *counts]))


def note(
    taken: Taken,
    damage: DamageLimit,
    log: MetricsLog | None,
    progress: Any,
    settings: Training,
    run: Path,
    device: torch.device,
) -> bool:
    """Log a step; whether one of the processes was asked to stop.

    Raises:
        VugenError: its loss or gradient is not finite, or too many samples are damaged; in every process.
    """
    *shared, corrupt, cut, stopping = taken.read()
    scalars = dict(zip(taken.names, shared, strict=True))
    if not math.isfinite(sum(shared)):
        raise VugenError(not_finite(scalars, taken.step, all_gather(taken.keys), run))
    damage.add(int(corrupt), settings.batch_size)
    if log:
        log.add(
            step=taken.step,
            loss=scalars.pop("loss"),
            grad_norm=scalars.pop("grad_norm"),
            lr=taken.rate,
            images_per_s=settings.batch_size / taken.seconds,
            data_wait=taken.waited / taken.seconds,
            memory_gb=memory(device),
            corrupt=int(corrupt),
            **({"captions_cut": int(cut)} if cut else {}),
            **scalars,
        )
        progress.set_postfix(loss=f"{shared[0]:.3f}", refresh=False)
    progress.update()
    return bool(stopping)


def due_after(done: int, stage: Stage, settings: Training) -> set[str]:
    """What is written after `done` steps: a checkpoint to `keep`, a `state` to go on from, a `preview`."""
    every = {
        "keep": settings.keep_every if stage.save else 0,
        "state": settings.checkpoint_every,
        "preview": settings.preview_every,
    }
    due = {what for what, steps in every.items() if steps and done % steps == 0}
    return due | {"state", "preview"} if done == settings.steps else due


def watched(
    options: RunOptions, settings: Training, begin: int, run: Path, device: torch.device
) -> Profile | None:
    """The profile that was asked for, on the first process.

    Raises:
        VugenError: the run is too short for it.
    """
    if not options.profile:
        return None
    if settings.steps - begin < PROFILED:
        raise VugenError(
            f"--profile watches {PROFILED} steps, and the run has {settings.steps - begin} left: give it more"
        )
    bfloat16 = wants_bfloat16(settings.precision, device)
    return Profile(run / "trace.json.gz", device, bfloat16, settings.batch_size) if is_first() else None


def open_log(
    run: Path, begin: int, settings: Training, recipe: Recipe, stage: Stage, closing: contextlib.ExitStack
) -> MetricsLog | None:
    """The run's log, and its card beside it, on the first process."""
    if not is_first():
        return None
    card = RunCard(
        stage=stage.name, steps=settings.steps, batch_size=settings.batch_size, version=__version__
    )
    write_json(run / "run.json", card.model_dump())
    return closing.enter_context(MetricsLog(run, begin, recipe.log, stage.resolved))


def not_finite(scalars: dict[str, float], step: int, parts: list[list[str]], run: Path) -> str:
    """What to say of a step whose loss or gradient is not a number; its samples are listed in a file."""
    keys = [key for part in parts for key in part]
    listed = run / f"not-finite-{step:07d}.json"
    if is_first():
        write_json(listed, {"step": step, **{k: str(v) for k, v in scalars.items()}, "samples": keys})
    return (
        f"the loss of step {step} is {scalars['loss']} (gradient norm {scalars['grad_norm']}): stopped, and "
        f"the last good state is kept in {run}; its batch was {', '.join(keys[:3])}, ... (all {len(keys)} in "
        f"{listed.name}); try a lower lr (and muon_lr), or float32"
    )


def preview(stage: Stage, path: Path, together: bool) -> None:
    """Write the stage's picture; sharded networks need every process to draw, and the first one's is kept."""
    if is_first():
        stage.preview(path)
    elif together:
        with tempfile.TemporaryDirectory() as folder:
            stage.preview(Path(folder) / path.name)
