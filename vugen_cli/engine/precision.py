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
from collections.abc import Callable
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
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if not bfloat16:  # no context of its own: a pass within one that rounds must round too
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)
