"""One policy for the precision of every pass: training, latents, drawing, reconstruction, previews.

| `precision` | products of matrices |
|---|---|
| `float32` | in float32, nothing rounded |
| `tf32` | in float32 whose inputs NVIDIA GPUs round to TF32 (10 bits); as `float32` elsewhere |
| `bfloat16` | in bfloat16, sums in float32 (autocast); weights, optimiser and averages stay float32 |
| `auto` | as `bfloat16` where the hardware multiplies it natively, else as `float32` |

On CPUs `auto` draws in float32 even so: a picture then does not depend on which processor drew it.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vugen_cli.engine.device import cpu_flags


def wants_bfloat16(precision: str, device: torch.device, training: bool = True) -> bool:
    """Whether passes multiply in bfloat16.

    Args:
        precision: of the recipe.
        device: where they run.
        training: they belong to training, as a latent cache does; otherwise they draw.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return training and device.type == "cpu" and "avx512_bf16" in cpu_flags()


def passes(
    precision: str, device: torch.device, training: bool = False
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A maker of contexts in which passes run in the given precision; arguments as of `wants_bfloat16`."""
    bfloat16 = wants_bfloat16(precision, device, training)

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(rounding(precision, device))
            if bfloat16:  # otherwise none of its own: a pass within one in bfloat16 is in bfloat16 too
                stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            yield

    return context


@contextlib.contextmanager
def rounding(precision: str, device: torch.device | str) -> Iterator[None]:
    """While it lasts, GPUs round products in float32 to TF32, or do not, as the precision says.

    The switches are the whole process's: they are put back, so that a picture drawn between two steps of
    training, in a precision of its own, does not change the next step's.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
