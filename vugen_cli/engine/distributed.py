"""A stage over several processes: gradients averaged (DDP), weights sharded (FSDP2), sums, and gathering.

With one process nothing here does anything, and a step computes what it always did.
"""

import contextlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from vugen_cli.engine.profiling import mark
from vugen_cli.processes import is_first, world_size
from vugen_cli.recipe import Engine

if TYPE_CHECKING:
    from vugen_cli.data.loader import Batch
    from vugen_cli.engine.stage import Stage


class Loss(nn.Module):
    """A stage's loss as the forward pass of a module, which is what DDP wraps."""

    def __init__(self, stage: "Stage"):
        super().__init__()
        self.module, self.loss = stage.module, stage.loss

    def forward(
        self, batch: "Batch", generator: torch.Generator, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of this process's part of the batch and the scalars to log."""
        return self.loss(batch, generator, step)


class DataParallel:
    """The loss of a stage whose gradients come out averaged over the processes of the job.

    Args:
        stage: its module is changed in place where it is to be sharded, so make optimisers afterwards.
        engine: the strategy.
        bfloat16: whether the forward pass may have the sharded weights in that.

    Attributes:
        sharded: whether each process holds only a part of the weights.
    """

    def __init__(self, stage: "Stage", engine: Engine, bfloat16: bool):
        self.module: Any = stage.module  # sharded, it has FSDP's methods
        self.network: Any = Loss(stage)
        self.sharded = world_size() > 1 and engine.strategy == "fsdp" and bool(stage.layers)
        self.replicated = world_size() > 1 and not self.sharded
        if self.sharded:
            shard(stage.module, stage.layers, torch.bfloat16 if bfloat16 else None, engine.offload)
        if self.replicated:
            self.network = nn.parallel.DistributedDataParallel(
                self.network,
                find_unused_parameters=stage.partial,
                gradient_as_bucket_view=True,
            )

    def backward(
        self, batch: "Batch", generator: torch.Generator, step: int, parts: int, last: bool, autocast: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of one of a step's `parts`; they travel between processes with the last one."""
        if self.sharded:
            self.module.set_requires_gradient_sync(last)
        quiet = self.replicated and not last
        with self.network.no_sync() if quiet else contextlib.nullcontext():
            with autocast:
                loss, values = self.network(batch, generator, step)
            mark("forward")
            (loss / parts).backward()
            mark("backward")
        return loss, values


def shards_vlm(engine: Engine) -> bool:
    """Whether this job is to share out the frozen VLM's weights."""
    return world_size() > 1 and engine.strategy == "fsdp" and engine.shard_vlm


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated layers of a network: the members of its outermost `nn.ModuleList`s."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [block for child in module.children() for block in blocks(child)]


def shard(
    module: nn.Module,
    layers: Iterable[nn.Module],
    forward_dtype: torch.dtype | None = None,
    offload: bool = False,
) -> None:
    """Shard a network's weights over all processes, each layer gathered just before it is used (FSDP2).

    Args:
        module: what is left outside the layers is gathered together.
        layers: of the module.
        forward_dtype: gather the layers in this type; gradients are always averaged in float32.
        offload: keep this process's share, its gradients and so its optimiser in CPU memory.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    mesh = init_device_mesh(next(module.parameters()).device.type, (world_size(),))
    # Inputs stay as they are: times and positions would not survive bfloat16; autocast converts what may be.
    mixed = MixedPrecisionPolicy(forward_dtype, torch.float32, cast_forward_inputs=False)
    whole = MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False)
    place = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed, offload_policy=place)
    # Not left gathered after a forward pass: the average is swapped in and out between passes.
    fully_shard(module, mesh=mesh, mp_policy=whole, reshard_after_forward=True, offload_policy=place)


def shard_frozen(model: nn.Module) -> None:
    """Shard the layers of a network that is not trained; what is around them stays whole on every process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
    for layer in blocks(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def recompute(layers: Iterable[nn.Module]) -> None:
    """Keep only the inputs of these layers in a forward pass; the rest is computed again going back."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies in CPU memory on the first process, nothing on the others; every process must call it."""
    copies = {}
    for name, tensor in tensors.items():
        whole = tensor.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        if is_first():
            copies[name] = whole.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return copies


@torch.no_grad()
def copy_whole(tensor: Tensor, value: Tensor) -> Tensor:
    """Fill a tensor, sharded or not, from a whole one; returns it."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(
            value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None
        )
        tensor.to_local().copy_(value.to_local())
    else:
        tensor.copy_(value)
    return tensor


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum over all processes; no gradient."""
    if world_size() > 1:
        tensor = tensor.detach().clone()
        dist.all_reduce(tensor)
    return tensor


class _AllReduce(torch.autograd.Function):
    """A sum over all processes. Each one's loss depends on every part, so gradients are summed too."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return all_reduce(x)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce(gradient)


_all_reduce: Callable[[Tensor], Tensor] = _AllReduce.apply


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over the batch of all processes; differentiable.

    Args:
        x: this process's part [B, h, w, channels]; parts must be of one size.
    """
    if world_size() == 1:
        return x.mean((0, 1, 2)), x.std((0, 1, 2))
    count = x.numel() // x.shape[-1] * world_size()
    mean = _all_reduce(x.sum((0, 1, 2))) / count
    return mean, (_all_reduce((x - mean).square().sum((0, 1, 2))) / (count - 1)).sqrt()


def weight_of(count: int, device: torch.device) -> float:
    """What a mean over `count` things of this process weighs in the mean over those of all processes.

    Gradients and losses are averaged over processes as if each had as many.
    """
    if world_size() == 1:
        return 1.0
    everywhere = all_reduce(torch.tensor(float(count), device=device)).item()
    return count * world_size() / everywhere if everywhere else 1.0
