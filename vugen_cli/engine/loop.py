"""The training loop that every stage shares.

A stage brings a module, a loss and a picture; the loop brings optimisation, averaging, checkpoints, resume,
logging and signals. Every random number of a step comes from a generator seeded by (seed, step), and batch b
of the data is the same whenever it is asked for, so a run that is killed and started again ends with the same
weights as one that never stopped.
"""

import contextlib
import json
import math
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from vugen_cli.data.loader import Batch
from vugen_cli.engine.checkpoint import check_checkpoint, load_checkpoint, part, save_checkpoint, with_prefix
from vugen_cli.engine.curves import plot_curves
from vugen_cli.engine.distributed import Spread, gathered, local, put, shards_vlm, total
from vugen_cli.engine.loggers import Loggers
from vugen_cli.engine.profiling import STEPS as PROFILED
from vugen_cli.engine.profiling import Profile, lap
from vugen_cli.errors import Stopped, VugenError
from vugen_cli.files import write_json
from vugen_cli.processes import from_all, from_first, is_first, local_rank, local_world_size, rank, world_size
from vugen_cli.recipe import Recipe, Training
from vugen_cli.seeds import BatchGenerator

# What a resumed run may change: it may be made longer, and data and VLM may lie elsewhere (what they hold is
# compared).
FREE = ("steps", "checkpoint_every", "preview_every", "keep_every", "workers", "data.path", "vlm.name")


@dataclass(frozen=True)
class RunOptions:
    """What a command line says of a run beside its recipe.

    Attributes:
        profile: watch a few steps, write `trace.json.gz` and print where their time went.
        change_recipe: go on with a saved run though its recipe, data or VLM has changed.
    """

    profile: bool = False
    change_recipe: bool = False


@dataclass
class Stage:
    """What makes one stage different from another.

    Attributes:
        name: `vlm`, `reducer` or `sampler`.
        module: holds every trained weight, and only those.
        loss: (batch, generator, step) -> (scalar loss, named scalars to log). Called under autocast.
        preview: path of the PNG to write -> None; called while the module has its averaged weights.
        resolved: the recipe, data and VLM of the run as plain values; a resumed run must match them.
        layers: of the module, to be sharded one by one; none: every process keeps the whole module.
        partial: whether some steps leave some weights without a gradient.
        save: (path, step) -> None: write the stage's checkpoint; called while the module has its averaged
            weights, on every process.
    """

    name: str
    module: nn.Module
    loss: Callable[[Batch, torch.Generator, int], tuple[Tensor, dict[str, Tensor]]]
    preview: Callable[[Path], None]
    resolved: dict[str, Any]
    layers: Sequence[nn.Module] = ()
    partial: bool = False
    save: Callable[[Path, int], None] | None = None


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


def memory(device: torch.device) -> float:
    """The most memory this process has held so far, in GB: the GPU's, or its own without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


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
            [local(w) for w in self.weights.values()],
            [local(p.detach()).float() for p in self.module.parameters()],
            1 - decay,
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
    """The device asked for, else a GPU if there is one (each process of a job has its own), else the CPU.

    Raises:
        VugenError: there is no such device here.
    """
    if name and name.startswith("cuda") and not torch.cuda.is_available():
        raise VugenError(
            f"--device {name}: this machine has no usable GPU; leave --device out to run on the CPU"
        )
    if name in (None, "cuda") and torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise VugenError(
                f"{local_world_size()} processes on a machine with {torch.cuda.device_count()} GPUs: start "
                f"one a GPU (torchrun --nproc-per-node {torch.cuda.device_count()})"
            )
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name or "cpu")
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except Exception as error:  # each backend that is missing raises its own kind
        raise VugenError(f"--device {name}: {str(error).strip().splitlines()[0]}") from error
    return device


# --- state: what a killed run goes on from ---


class StateWriter:
    """Writes states in a thread, one at a time, and keeps the two newest; training goes on meanwhile.

    Leaving the context waits for the one being written, so that a run that ends has it on disk.
    """

    def __init__(self, run: Path):
        self.run = run
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def write(self, tensors: dict[str, Tensor], card: dict[str, Any]) -> None:
        """Begin to write a state of tensors that nobody will change.

        Raises:
            VugenError, OSError: the state before could not be written.
        """
        self.wait()
        self.thread = threading.Thread(target=self._write, args=(tensors, card))
        self.thread.start()

    def _write(self, tensors: dict[str, Tensor], card: dict[str, Any]) -> None:
        try:
            save_checkpoint(self.run / f"state-{card['step']:07d}.safetensors", tensors, card)
            for old in sorted(self.run.glob("state-*.safetensors"))[:-2]:
                old.unlink()
        except BaseException as error:
            self.error = error

    def wait(self) -> None:
        """Return when nothing is being written any more; then as `check`."""
        if self.thread:
            self.thread.join()
            self.thread = None
        self.check()

    def check(self) -> None:
        """Raise what went wrong in the thread, if anything has."""
        if self.error:
            raise self.error

    def __enter__(self) -> "StateWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Stopped):
            self.wait()
        elif self.thread:
            self.thread.join()


def save_state(
    writer: StateWriter, stage: Stage, average: Average, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Save weights, average and optimiser after `step` steps, whole however they are spread."""
    names = {id(p): n for n, p in stage.module.named_parameters()}
    tensors = with_prefix(dict(stage.module.named_parameters()), "module")
    tensors |= with_prefix(dict(stage.module.named_buffers()), "buffer")
    tensors |= with_prefix(average.weights, "average")
    for parameter, moments in optimizer.state.items():
        tensors |= with_prefix(moments, f"optimizer.{names[id(parameter)]}")
    tensors = gathered(tensors)
    if is_first():
        writer.write(tensors, {"stage": f"{stage.name}-state", "step": step, "resolved": stage.resolved})


def newest_state(run: Path) -> Path | None:
    """The newest state of a run that is whole, if there is one; says so where it passes over one."""
    for path in sorted(run.glob("state-*.safetensors"), reverse=True):
        try:
            check_checkpoint(path)
            return path
        except VugenError as error:
            tqdm.write(f"{error}; trying the state before it")
    return None


def resume(
    run: Path, stage: Stage, average: Average, optimizer: torch.optim.Optimizer, change_recipe: bool = False
) -> int:
    """Load the newest whole state of a run and return its step, or 0 when there is none.

    Args:
        run: its folder; with `change_recipe`, what has changed is added to `changes.jsonl` there.
        stage, average, optimizer: what is filled.
        change_recipe: take a state that was saved under another recipe, data set or VLM.

    Raises:
        VugenError: that is not allowed, or the networks have other sizes.
    """
    path = from_first(newest_state(run) if is_first() else None)
    if path is None:
        return 0
    tensors, card = load_checkpoint(path)
    changed = [c for c in differences(card["resolved"], stage.resolved) if not is_free(c.partition(":")[0])]
    if changed and not change_recipe:
        raise VugenError(
            f"{run} holds a run with other settings ({'; '.join(changed)}): give --out another name, "
            f"delete {run} to start over, or pass --change-recipe to go on with the new ones"
        )
    parts = {
        "module": dict(stage.module.named_parameters()),
        "buffer": dict(stage.module.named_buffers()),
        "average": average.weights,
    }
    for prefix, into in parts.items():
        saved = part(tensors, prefix)
        for name, tensor in into.items():
            if name not in saved or saved[name].shape != tensor.shape:
                raise VugenError(
                    f"{path} has no {name} of shape {list(tensor.shape)}: the networks have changed "
                    f"({'; '.join(changed)}); give --out another name"
                )
            put(tensor, saved[name])
    for name, parameter in stage.module.named_parameters():
        optimizer.state[parameter] = {
            # laid out in memory like the parameter: the fused optimiser walks both together
            key: tensor if key == "step" else put(torch.empty_like(parameter, requires_grad=False), tensor)
            for key, tensor in part(tensors, f"optimizer.{name}").items()
        }
    step = int(card["step"])
    if changed and is_first():
        with open(run / "changes.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "changes": changed}, ensure_ascii=False) + "\n")
        tqdm.write(f"going on at step {step} with a changed recipe: {'; '.join(changed)}")
    return step


def is_free(key: str) -> bool:
    """Whether a resumed run may have another value under a key of `Stage.resolved`."""
    return key in FREE or key.rpartition(".")[2] in FREE


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
    """`metrics.jsonl`: one line a step, and the logs that the recipe names.

    A resumed run drops the lines of steps it will do again.
    """

    def __init__(self, run: Path, first: int, names: Sequence[str], config: dict[str, Any]):
        self.others = Loggers(names, run, first, config)
        path = run / "metrics.jsonl"
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
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}
        self.file.write(json.dumps(rounded) + "\n")
        self.others.add(int(rounded.pop("step")), rounded)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.others.close()


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
