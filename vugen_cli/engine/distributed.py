"""A stage over several processes: gradients averaged (DDP), weights sharded (FSDP2), sums, and gathering.

With one process nothing here does anything, and a step computes what it always did.
"""

import contextlib
import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from vugen_cli.engine.profiling import mark
from vugen_cli.errors import VugenError
from vugen_cli.processes import is_first, world_size
from vugen_cli.recipe import Engine

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

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
        device: where this process computes.
        bfloat16: whether the forward pass may have the sharded weights in that.

    Attributes:
        sharded: whether each process holds only a part of the weights.

    Raises:
        VugenError: the mesh is for another number of processes.
    """

    def __init__(self, stage: "Stage", engine: Engine, device: torch.device, bfloat16: bool):
        self.module: Any = stage.module  # sharded, it has FSDP's methods
        self.network: Any = Loss(stage)
        self.sharded = shards(engine) and bool(stage.layers)
        self.replicated = world_size() > 1 and not self.sharded
        if self.sharded:
            shard(stage.module, stage.layers, engine, device, torch.bfloat16 if bfloat16 else None)
            if stage.fill:
                stage.fill()
        if self.replicated:
            self.network = nn.parallel.DistributedDataParallel(
                self.network,
                find_unused_parameters=stage.partial,
                gradient_as_bucket_view=True,
            )

    def backward(
        self, batch: "Batch", generator: torch.Generator, step: int, parts: int, last: bool, autocast: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of one of a step's `parts`; replicas average theirs with the last one.

        Sharded gradients are scattered in each part: kept until the last, they would be whole ones.
        """
        if self.sharded:
            self.module.set_requires_all_reduce(last)
        quiet = self.replicated and not last
        with self.network.no_sync() if quiet else contextlib.nullcontext():
            with autocast:
                loss, values = self.network(batch, generator, step)
            mark("forward")
            (loss / parts).backward()
            mark("backward")
        return loss, values


def shards(engine: Engine) -> bool:
    """Whether this job is to share out weights.

    Raises:
        VugenError: the mesh is for another number of processes.
    """
    if engine.mesh and math.prod(engine.mesh) != world_size():
        raise VugenError(
            f"engine.mesh {list(engine.mesh)} is for {math.prod(engine.mesh)} processes, and this job has "
            f"{world_size()}: start as many as replicas x shards, or set engine.mesh=null"
        )
    return world_size() > 1 and engine.strategy == "fsdp"


def shards_vlm(engine: Engine) -> bool:
    """Whether this job is to share out the frozen VLM's weights; raises as `shards`."""
    return shards(engine) and engine.shard_vlm


def device_mesh(engine: Engine, device: torch.device) -> "DeviceMesh":
    """The processes as weights are shared out: all of them, or [replicas, shards] (HSDP)."""
    return _mesh(engine.mesh or (world_size(),), device.type, dist.group.WORLD)


@cache  # VLM and expert share the processes' connections
def _mesh(shape: tuple[int, ...], kind: str, _job: Any) -> "DeviceMesh":
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(kind, shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated layers of a network: the members of its outermost `nn.ModuleList`s."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [block for child in module.children() for block in blocks(child)]


def shard(
    module: nn.Module,
    layers: Iterable[nn.Module],
    engine: Engine,
    device: torch.device,
    forward_dtype: torch.dtype | None = None,
) -> None:
    """Shard a network's weights over processes, each layer gathered just before it is used (FSDP2).

    Args:
        module: what is left outside the layers is gathered together. Weights may lie on the CPU, from where
            they go to the device layer by layer, or on `meta`: then this process's share waits to be filled.
        layers: of the module.
        engine: its mesh; `offload` keeps this process's share, its gradients and so its optimiser in CPU
            memory.
        device: where this process computes.
        forward_dtype: gather the layers in this type; gradients are always averaged in float32.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    mesh = device_mesh(engine, device)
    # Inputs stay as they are: times and positions would not survive bfloat16; autocast converts what may be.
    mixed = MixedPrecisionPolicy(forward_dtype, torch.float32, cast_forward_inputs=False)
    whole = MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False)
    place = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if engine.offload else OffloadPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed, offload_policy=place)
    # Not left gathered after a forward pass: the average is swapped in and out between passes.
    fully_shard(module, mesh=mesh, mp_policy=whole, reshard_after_forward=True, offload_policy=place)
    home = torch.device("cpu") if engine.offload else device
    module._apply(lambda t: torch.empty_like(t, device=home) if t.is_meta else t)


def shard_frozen(model: nn.Module, engine: Engine, device: torch.device) -> None:
    """Shard the layers of a network that is not trained, and move it to the device, layer by layer.

    What is around the layers stays whole on every process, since it may be used by itself. What runs a stack
    of layers is the root of their gathering: a layer is then gathered while the one before computes.
    """
    from torch.distributed.fsdp import fully_shard

    mesh, layers = device_mesh(engine, device), blocks(model)
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    around = set(model.parameters()) - inside
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    stacks = {id(layer) for layer in layers}
    for module in reversed(list(model.modules())):
        lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
        if any(id(layer) in stacks for child in lists for layer in child):
            fully_shard(module, mesh=mesh, ignored_params=around)
    model.to(device)


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


def extent(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where in the whole tensor this process's part begins, and that part's shape."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, begin = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(begin), tuple(shape)


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> Tensor:
    """Fill a tensor, sharded or not, from one that is whole or sharded alike; returns it."""
    if isinstance(value, DTensor):
        value = value.to_local()
    else:
        value = value[tuple(slice(b, b + n) for b, n in zip(*extent(tensor), strict=True))]
    local(tensor).copy_(value)
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
