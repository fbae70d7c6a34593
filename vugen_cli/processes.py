"""The processes of one job, as torchrun starts them. Imports nothing heavy.

torchrun (or anything else that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT) runs the same
command in every process. The first process writes files, pictures, bars and messages; the others compute.
"""

import atexit
import multiprocessing
import os
import sys
import threading
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from vugen_cli.errors import VugenError, first_line

if TYPE_CHECKING:
    import torch

LOST = (
    "another process of this job is gone: look for its own message, then run the same command again, which "
    "goes on from the last saved state"
)
PATIENCE = timedelta(minutes=30)  # how long a process waits for the others within a step
_store: Any = None  # what the processes tell each other by; set by `join`
_come_to: Counter[str] = Counter()  # how often this process has come to a point of `barrier`


def _number(name: str, alone: int) -> int:
    return int(os.environ.get(name, alone)) if "MASTER_ADDR" in os.environ else alone


def world_size() -> int:
    """Processes in this job."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """The number of this process in the job, from 0."""
    return _number("RANK", 0)


def local_rank() -> int:
    """The number of this process on its host, from 0."""
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Processes of this job on this host."""
    return _number("LOCAL_WORLD_SIZE", 1)


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def meet() -> None:
    """Find the other processes of the job; from here on only the first prints. Alone there is nothing to do.

    Raises:
        VugenError: the others cannot be reached.
    """
    global _store
    if world_size() == 1 or _store is not None:
        return
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    import torch.distributed as dist

    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
        raise VugenError(
            f"process {rank()} of {world_size()} cannot reach the others at {where}: {first_line(error)}"
        ) from error
    # torchrun keeps one store over its restarts: what processes that are gone said in it must not be read.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _store = dist.PrefixStore(f"attempt {attempt}", store)


def join(device: "torch.device") -> "torch.device":
    """As `meet`, and make ready to compute together: by nccl on GPUs, by gloo on CPUs.

    Args:
        device: where this process computes; returned.
    """
    meet()
    if world_size() > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            return device
        cuda = device.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",  # small things (flags, file names) always go by gloo
            store=dist.PrefixStore("group", _store),
            rank=rank(),
            world_size=world_size(),
            timeout=PATIENCE,
            device_id=device if cuda else None,
        )
        atexit.register(dist.destroy_process_group)
    return device


def barrier(what: str) -> None:
    """Return when every process of the job has come to this point, however long that takes.

    Args:
        what: a name for the point; every process comes to it equally often.
    """
    if world_size() > 1:
        _come_to[what] += 1
        point = f"{what}/{_come_to[what]}"
        _store.set(f"{point}/{rank()}", "here")
        _store.wait([f"{point}/{r}" for r in range(world_size())], timedelta(days=30))


def broadcast(value: Any) -> Any:
    """The first process's value, on every process, however long it takes to find; small picklable things."""
    box = [value]
    if world_size() > 1:
        barrier("broadcast")  # a collective waits for PATIENCE, and the first may have hours to do
        import torch
        import torch.distributed as dist

        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def all_gather(value: Any) -> list[Any]:
    """Every process's value, in their order, on every process; small picklable things."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        import torch.distributed as dist

        dist.all_gather_object(values, value)
    return values


def in_order(numbered: list[tuple[int, Any]]) -> list[Any]:
    """What all processes have numbered, by its number, on every process; small picklable things."""
    everywhere = [pair for part in all_gather(numbered) for pair in part]
    return [thing for _, thing in sorted(everywhere, key=lambda pair: pair[0])]


def gather(value: Any) -> list[Any]:
    """Every process's value, in their order, on the first process; on another only its own.

    Values may be large: they travel once. It waits for all, however long they take.
    """
    if world_size() == 1:
        return [value]
    barrier("gather")
    import torch.distributed as dist

    values: list[Any] = [None] * world_size()
    dist.gather_object(value, values if is_first() else None)
    return values if is_first() else [value]


def end_with_parent() -> None:
    """End this process, a worker of multiprocessing, as soon as the one that asked for it is gone.

    Even a killed one: left alone, its workers would wait for their next task for ever.
    """
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error is what talking to a process that is gone looks like."""
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")
    return world_size() > 1 and isinstance(error, RuntimeError) and any(w in str(error) for w in words)


def has_the_last_word() -> bool:
    """Whether this process says why the job ends: the first of them to ask does, the others are silent."""
    if world_size() == 1:
        return True
    if _store is None:  # nothing has begun: what is wrong is wrong in every process
        return is_first()
    try:
        return _store.add("last word", 1) == 1
    except Exception:  # the process that kept the store is gone, and did not go without a word
        return False
