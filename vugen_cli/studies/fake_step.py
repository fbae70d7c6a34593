"""A training step on tensors that have shapes but no memory: its FLOPs and the memory it would hold.

Networks are built on the `meta` device and run as torch's fake tensors, through the very code that trains.
What the step allocates is followed storage by storage, so temporaries, copies that autocast makes and what
autograd saves are all counted. Inputs, noise and indices are real: they are small, and some vision towers
read them.
"""

import contextlib
import copy
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from vugen_cli.errors import VugenError, first_line

logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # what fails is raised too
# Networks are asked one by one: only what touches a fake tensor becomes one.
MODE = FakeTensorMode(allow_non_fake_inputs=True)
BATCHES = (2, 3)  # measured; a single image would be special: its tensors are contiguous in more ways


def faked(module: nn.Module, within: object = None) -> Any:
    """A copy of a network on `meta` whose weights and buffers are fake tensors on the CPU; ties are kept.

    What is faked already `within` it is not copied.
    """
    module, made = copy.deepcopy(module, {id(within): within}), dict[int, Tensor]()

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with MODE:
                new = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
                weight = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if weight else new
        return made[id(tensor)]

    kept = [*module.parameters(), *module.buffers()]  # or another could take the id of one that is freed
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]
    assert all(tensor.is_meta for tensor in kept), "only networks on `meta` cost nothing"
    return module


@dataclass
class Cost:
    """What a step costs by its number of images.

    Attributes:
        flops: of an image, in products, convolutions and attention, as torch's counter has them.
        fixed, each: bytes that are held at every moment of the step, fixed + each * images, without the
            trained weights, their gradients, and what was there before.
        gradients: bytes of gradients of weights by then.
        casts: bytes of the fixed ones that are weights in autocast's precision.
    """

    flops: float
    fixed: np.ndarray
    each: np.ndarray
    gradients: np.ndarray
    casts: np.ndarray

    def peak(self, images: int, gradients: bool, casts: bool = True) -> float:
        """Most bytes held at a moment.

        Args:
            images: in the step.
            gradients: count those that are there by then, as in one process; else none.
            casts: count the weights that autocast converts; fsdp gathers them as they are to be.
        """
        return float((self._fixed(gradients, casts) + self.each * images).max(initial=0.0))

    def most_images(self, room: float, gradients: bool, casts: bool = True) -> int:
        """The largest number of images whose `peak` is within `room` bytes; 0 if not one fits."""
        free = room - self._fixed(gradients, casts)
        grows = self.each > 0
        if (free < 0).any() or not grows.any():
            return 0
        return int((free[grows] / self.each[grows]).min())

    def _fixed(self, gradients: bool, casts: bool) -> np.ndarray:
        return self.fixed + gradients * self.gradients - (not casts) * self.casts


def cost(
    step: Callable[[int], Any],
    trained: nn.Module | None = None,
    bfloat16: bool = False,
    gpu: bool = True,
) -> Cost:
    """Run a step of fake networks and say what it costs.

    Args:
        step: number of images -> loss, whose backward pass belongs to the step if something is trained.
        trained: the network whose weights get gradients.
        bfloat16: run it under autocast.
        gpu: attention kernels and autocast's rules are CUDA's; else the CPU's.

    Raises:
        VugenError: a network's work depends on the values it computes, which are not there.
    """
    small, large = (_watch(partial(step, images), trained, bfloat16, gpu) for images in BATCHES)
    a, b = (np.array(watch.moments, dtype=np.float64).T for watch in (small, large))
    if a.shape != b.shape:  # a loop over images somewhere: only the worst moments can be compared
        a, b = (x[:, [x[0].argmax(), (x[0] + x[1]).argmax()]] for x in (a, b))
    more = BATCHES[1] - BATCHES[0]
    each = (b[0] - a[0]) / more
    return Cost((large.flops - small.flops) / more, a[0] - BATCHES[0] * each, each, a[1], a[2])


def flops_of(step: Callable[[int], object]) -> float:
    """FLOPs of an image in a step that trains nothing; as `cost`, in half the time."""
    return _watch(partial(step, BATCHES[0]), None, False, gpu=True).flops / BATCHES[0]


def _watch(step: Callable[[], Any], trained: nn.Module | None, bfloat16: bool, gpu: bool) -> "_Watch":
    weights = [p for p in trained.parameters() if p.requires_grad] if trained else []
    watch = _Watch(weights)
    hooks = [weight.register_post_accumulate_grad_hook(watch.take_gradient) for weight in weights]
    try:
        with torch.set_grad_enabled(bool(weights)), watch, _CudaRules() if gpu else contextlib.nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = step()
            if loss is not None and weights:
                loss.backward()
            del loss
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise VugenError(
            "this cannot be planned: a network's work depends on values that only a real run has "
            f"({first_line(error)})"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return watch


class _Watch(TorchDispatchMode):
    """Follows every storage that an operation returns until it is freed, and counts FLOPs.

    Args:
        weights: those that get gradients.

    Attributes:
        flops: so far.
        moments: (bytes, bytes of gradients apart, bytes of weights cast) after each operation.
    """

    def __init__(self, weights: list[nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.bytes = self.gradients = self.casts = 0
        self.known: dict[int, Any] = {}
        self.weights = {id(weight.untyped_storage()) for weight in weights}
        self.moments: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # half of all calls; the long way is slow
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := flop_registry.get(func.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        outputs = (out,) if isinstance(out, Tensor) else tree_leaves(out)
        tensors = [output for output in outputs if isinstance(output, Tensor)]
        cast = func is torch.ops.aten._to_copy.default and id(args[0].untyped_storage()) in self.weights
        for tensor in tensors:
            self._follow(tensor.untyped_storage(), cast)
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):  # not what prepares images one by one
            self.moments.append((self.bytes, self.gradients, self.casts))
        return out

    def _follow(self, storage: torch.UntypedStorage, cast: bool) -> None:
        number = id(storage)
        if number not in self.known and number not in self.weights:
            size = storage.nbytes()
            self.known[number] = weakref.ref(storage, lambda _: self._forget(number, size, cast))
            self.bytes += size
            self.casts += cast * size

    def _forget(self, number: int, size: int, cast: bool) -> None:
        del self.known[number]
        self.bytes -= size
        self.casts -= cast * size

    def take_gradient(self, weight: Tensor) -> None:
        """Count a weight's gradient apart from all else."""
        assert weight.grad is not None
        self.gradients += weight.grad.nbytes
        weight.grad = None


# What CUDA's autocast computes in float32 and the CPU's does not, of what our networks use (torch.amp).
FLOAT32 = {
    torch.layer_norm,
    functional.layer_norm,
    torch.group_norm,
    functional.group_norm,
    torch.softmax,
    Tensor.softmax,
    functional.softmax,
    torch.cosine_similarity,
    functional.cosine_similarity,
    torch.pow,
    Tensor.pow,
    torch.exp,
    Tensor.exp,
    torch.rsqrt,
    Tensor.rsqrt,
}


class _CudaRules(TorchFunctionMode):
    """Fused attention as on a GPU, and its autocast's float32 operations, for tensors that are not on one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mixed = torch.is_autocast_enabled("cpu")
        if func is functional.scaled_dot_product_attention:
            return fused_attention(*args, **{**kwargs, "dtype": torch.bfloat16 if mixed else None})
        if func in FLOAT32 and mixed:
            args, kwargs = tree_map(_widened, (args, kwargs))
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`scaled_dot_product_attention` by CUDA's kernels: flash without a mask, else the efficient one.

    Args:
        dtype: of the products, under autocast.
    """
    query, key, value = (x.to(dtype or x.dtype) for x in (query, key, value))
    if attn_mask is None:
        attend = torch.ops.aten._scaled_dot_product_flash_attention
        return attend(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    shape = (*query.shape[:-1], key.shape[-2])
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    bias = attn_mask.to(query.dtype).expand(shape)
    return attend(query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale)[0]
