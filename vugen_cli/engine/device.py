"""Devices: which one to use, its memory, and reading from it without waiting."""

import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vugen_cli.errors import VugenError, first_line
from vugen_cli.processes import local_rank, local_world_size


def memory(device: torch.device) -> float:
    """The most memory this process has held so far, in GB: the GPU's, or its own without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def cpu_flags() -> set[str]:
    """Instruction sets of this processor, as Linux names them; empty elsewhere."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
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
        number = 0 if has_own_gpu() else local_rank()
        if number >= torch.cuda.device_count():
            raise VugenError(
                f"{local_world_size()} processes on a machine with {torch.cuda.device_count()} GPUs: start "
                f"one a GPU (torchrun --nproc-per-node {torch.cuda.device_count()})"
            )
        name = f"cuda:{number}"
    try:
        device = torch.device(name or "cpu")
        torch.zeros(1, device=device).item()  # which `meta` has not
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except Exception as error:  # each backend that is missing raises its own kind
        reason = first_line(error).partition(". ")[0]
        raise VugenError(
            f"--device {name} is not to be had here ({reason}): give cpu, cuda or cuda:N"
        ) from error
    return device


def has_own_gpu() -> bool:
    """Whether a launcher shows this process one GPU and no other (`srun --gpus-per-task=1`).

    torchrun's processes all see the same ones.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    alone = torch.cuda.device_count() == 1 and bool(shown) and "," not in shown
    return alone and not torch.distributed.is_torchelastic_launched()


def read_later(tensor: Tensor) -> Callable[[], list[float]]:
    """Start copying a vector to the host; the function returned gives its numbers, and waits if it must."""
    if tensor.device.type != "cuda":
        return tensor.tolist
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        numbers: list[float] = host.tolist()
        return numbers

    return read
