"""States of a run: saved in the background, found again, and loaded wherever the parameters are."""

import contextlib
import copy
import json
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from vugen_cli.card import StateCard
from vugen_cli.checkpoint import save_checkpoint, with_prefix
from vugen_cli.engine.distributed import gathered
from vugen_cli.engine.ema import EMA
from vugen_cli.engine.optimizer import moments_of
from vugen_cli.engine.sharded_state import Part, Stored, discard, publish
from vugen_cli.engine.stage import Stage
from vugen_cli.errors import Stopped, VugenError
from vugen_cli.files import locked
from vugen_cli.processes import broadcast, is_first, is_lost_peer
from vugen_cli.recipe import Recipe

# What a resumed run may change: it may be made longer, and data, VLM and VAE may lie elsewhere (what they
# hold is compared).
FREE = (
    "steps",
    "checkpoint_every",
    "preview_every",
    "keep_every",
    "workers",
    "max_corrupt",
    "data.path",
    "vlm.name",
    "recipe.decoder.vae",
)

# What is being written in a run's folder: by `whole_file`, by states, by the safetensors library.
UNFINISHED = tuple(
    f".{of}*"
    for of in ("state-", "step-", "preview-", "not-finite-", "metrics.", "run.", "curves.", "trace.", "tmp")
)


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Make the run's folder, hold it against others, and clear away what killed processes left half-written.

    Raises:
        VugenError: another process trains there, or the folder cannot be written.
    """
    with locked(
        run, f"another process is training in {run}: wait for it, stop it, or give --out another name"
    ):
        # A state may weigh more than all the rest. What is hidden there by others stays.
        for leftover in (path for kind in UNFINISHED for path in run.glob(kind)):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    leftover.unlink()
        yield


class StateWriter:
    """Writes states in a thread, one at a time, and keeps the two newest; training goes on meanwhile.

    Leaving the context waits for the one being written, so that a run that ends has it on disk. Every process
    of a job makes one.
    """

    def __init__(self, run: Path):
        self.run = run
        self.mark = broadcast(secrets.token_hex(4))  # of this start's half-written folders
        self.given_up = threading.Event()
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def write(self, tensors: dict[str, Tensor], card: StateCard) -> None:
        """Begin to write a state, as one file, of tensors that nobody will change; on the first process.

        Raises:
            VugenError, OSError: the state before could not be written.
        """
        path = self.run / f"state-{card.step:07d}.safetensors"
        self._begin(path, lambda: save_checkpoint(path, tensors, card))

    def write_part(self, part: Part, card: StateCard) -> None:
        """Begin to write this process's part of a state, a folder; raises as `write`."""
        path = self.run / f"state-{card.step:07d}"
        hidden = self.run / f".{path.name}.{self.mark}"

        def work() -> None:
            part.write(hidden)
            if is_first():
                publish(hidden, path, part.of, card, self.given_up)

        self._begin(path, work)

    def _begin(self, path: Path, work: Callable[[], None]) -> None:
        self.wait()
        self.thread = threading.Thread(target=self._run, args=(path, work))
        self.thread.start()

    def _run(self, path: Path, work: Callable[[], None]) -> None:
        try:
            work()
            if is_first():
                states = states_of(self.run)
                kept = [s for s in states if step_of(s) <= step_of(path)][-2:]  # a later one is damaged
                for other in states:
                    if other not in kept:
                        discard(other)
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

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: object
    ) -> None:
        if error is None or isinstance(error, Stopped):
            self.wait()
        elif self.thread:
            if is_lost_peer(error):
                self.given_up.set()
            self.thread.join()


def save_state(
    writer: StateWriter, stage: Stage, ema: EMA, optimizer: torch.optim.Optimizer, step: int
) -> None:
    """Save weights, average and optimiser after `step` steps: each process its part, if they are sharded."""
    writer.wait()  # two states in memory at once would be too much
    tensors = of_state(stage, ema, optimizer)
    card = StateCard(stage=f"{stage.name}-state", step=step, resolved=stage.resolved)
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        writer.write_part(Part(tensors), card)
    elif is_first():
        writer.write(gathered(tensors), card)


def of_state(stage: Stage, ema: EMA, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a state holds: `module.*`, `buffer.*`, `ema.*` and `optimizer.*`, as they are spread."""
    names = {id(p): n for n, p in stage.module.named_parameters()}
    tensors = with_prefix(stage.own(), "module")
    tensors |= with_prefix(dict(stage.module.named_buffers()), "buffer")
    tensors |= with_prefix(ema.weights, "ema")
    for parameter, moments in optimizer.state.items():
        tensors |= with_prefix(moments, f"optimizer.{names[id(parameter)]}")
    return tensors


def states_of(run: Path) -> list[Path]:
    """The states of a run, oldest first. A copy by another name is somebody's own."""
    named = [
        path
        for path in run.glob("state-*")
        if re.fullmatch(r"\d{7,}(\.safetensors)?", path.name.removeprefix("state-"))
    ]
    return sorted(named, key=step_of)


def step_of(state: Path) -> int:
    """The step after which a state was saved, from its name."""
    return int(state.name.removeprefix("state-").partition(".")[0])


def newest_state(run: Path) -> Path | None:
    """The newest state of a run that is whole, if there is one; says so where it passes over one."""
    for path in reversed(states_of(run)):
        try:
            return Stored(path).path
        except VugenError as error:
            tqdm.write(f"{error}; trying the state before it")
    return None


def resume(
    run: Path, stage: Stage, ema: EMA, optimizer: torch.optim.Optimizer, change_recipe: bool = False
) -> int:
    """Load the newest whole state of a run and return its step, or 0 when there is none.

    Args:
        run: its folder; with `change_recipe`, what has changed is added to `changes.jsonl` there.
        stage, ema, optimizer: what is filled.
        change_recipe: take a state that was saved under another recipe, data set or VLM.

    Raises:
        VugenError: that is not allowed, or the networks have other sizes.
    """
    path = broadcast(newest_state(run) if is_first() else None)
    if path is None:
        return 0
    stored = Stored(path)
    old = dict(stored.card.resolved)
    if stage.resolved.get("recipe"):
        # Of an earlier version, which did not have all keys: it did what their defaults say.
        defaults = Recipe().model_dump(mode="json", include=set(stage.resolved["recipe"]))
        old["recipe"] = filled(old.get("recipe", {}), defaults)
    old, new = placeless(old), placeless(stage.resolved)
    changed = [c for c in differences(old, new) if not is_free(c.partition(":")[0])]
    # States of earlier versions do not say what their data set, VAE, stage 2's reducer and what a judge began
    # with held; in stage 1 a reducer that is not noted was not there. Another split may have come since.
    unsaid = ("data.sha256", "data.train_sha256", "teacher.calls", "vae", "weights")
    passed = [f"{key}: None " for key in unsaid]
    passed += ["reducer: None "] if stage.name == "sampler" else []
    if (known := train_hash(old)) and known == train_hash(new):
        passed += ["data.sha256: ", "data.counts."]
    changed = [c for c in changed if not c.startswith(tuple(passed))]
    if changed and not change_recipe:
        began = any(c.startswith("expert: ") for c in changed)
        init = "give --init the sampler that it began with, " if began else ""
        raise VugenError(
            f"{run} holds a run with other settings ({'; '.join(changed)}): {init}give --out another name, "
            f"delete {run} to start over, or pass --change-recipe to go on with the new ones"
        )
    parts: dict[str, Mapping[str, Tensor]] = {
        "module": stage.own(),
        "buffer": dict(stage.module.named_buffers()),
        "ema": ema.weights,
    }
    for prefix, into in parts.items():
        for name, tensor in into.items():
            key = f"{prefix}.{name}"
            if prefix == "ema" and key not in stored.shapes:  # not trained, where the state was written
                key = f"module.{name}"
            if stored.shapes.get(key) != tensor.shape:
                raise VugenError(
                    f"{path} has no {name} of shape {list(tensor.shape)}: the networks have changed "
                    f"({'; '.join(changed)}); give --out another name"
                )
            stored.fill(tensor, key)
    moments: dict[str, list[str]] = {}
    for name in stored.shapes:
        moments.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    kept = moments_of(optimizer)
    for name, parameter in stage.own().items():
        # Of another optimiser, whose place this one took (`change_recipe`), it begins with none.
        found = moments.get(f"optimizer.{name}", [])
        optimizer.state[parameter] = {
            # Where the parameter is, the count of steps too, and laid out in memory like it: the fused
            # optimiser walks all of them together.
            key: stored.read(f"optimizer.{name}.{key}").to(parameter.device)
            if key == "step"
            else stored.fill(torch.empty_like(parameter, requires_grad=False), f"optimizer.{name}.{key}")
            for key in (found if set(found) == kept.get(id(parameter)) else [])
        }
    step = stored.card.step
    if changed and is_first():
        with open(run / "changes.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "changes": changed}, ensure_ascii=False) + "\n")
        tqdm.write(f"going on at step {step} with a changed recipe: {'; '.join(changed)}")
    return step


def is_free(key: str) -> bool:
    """Whether a resumed run may have another value under a key of `Stage.resolved`."""
    return key in FREE or key.rpartition(".")[2] in FREE


def filled(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The values, and the defaults of the keys that they lack, in sections within sections too."""
    both = {**defaults, **values}
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(both[key], dict):
            both[key] = filled(both[key], default)
    return both


def placeless(resolved: dict[str, Any]) -> dict[str, Any]:
    """The same without the paths of mixed data sets, which may lie elsewhere as one alone may."""
    resolved = copy.deepcopy(resolved)
    for data in (resolved.get("data"), resolved.get("recipe", {}).get("data")):
        for source in (data or {}).get("mixture") or []:
            source.pop("path", None)
    return resolved


def train_hash(resolved: dict[str, Any]) -> str | None:
    """The hash of the split that is trained on, if it is known: that of all where it is the only one."""
    data = resolved.get("data") or {}
    alone = list(data.get("counts") or {}) == ["train"]
    found: str | None = data.get("train_sha256") or (data.get("sha256") if alone else None)
    return found


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
