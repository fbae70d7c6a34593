"""From images to z: what a VLM's own projector reads, as a grid, whatever the family.

Images go through the model's own image processor and vision tower; a hook on the projector collects what it
is given (or gives). What differs between families is only how the tokens lie: some lead with class or
register tokens, some have merged neighbours, and the Qwen line lists patches block by block and window by
window. `to_grid` undoes all of it.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vugen_cli.errors import VugenError

# What the library's model classes call it, the one closest to the language model first.
PROJECTORS = (
    "multi_modal_projector",
    "mm_projector",
    "connector",
    "aligner",
    "projector",
    "vision_projection",
    "merger",
)
# One image, one view, one grid: how each image processor's tiling is switched off.
ONE_VIEW = {
    "do_image_splitting": False,
    "crop_to_patches": False,
    "do_pan_and_scan": False,
    "vision_input_type": "vanilla",
}
MOST_EXTRA_TOKENS = 16  # class and register tokens before the patches


def find_projector(model: Any) -> nn.Module:
    """The module between the vision tower and the language model.

    Raises:
        VugenError: the model has none of the known names.
    """
    for wanted in PROJECTORS:
        for name, module in model.named_modules():
            if name.rpartition(".")[2] == wanted:
                return module
    raise VugenError(
        f"{type(model).__name__} cannot be used: it has no vision projector that reads image tokens (looked "
        f"for {', '.join(PROJECTORS)})"
    )


@contextmanager
def projector_states(projector: nn.Module, latents: str = "encoder") -> Iterator[list[Tensor]]:
    """Collects what a projector is given (`encoder`) or gives (`projector`) while the context lasts."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        state = args[0] if latents == "encoder" else output
        seen.append(state[0] if isinstance(state, tuple) else state)

    handle = projector.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def vision_inputs(image_processor: Any, images: Tensor, size: int | None = None) -> dict[str, Tensor]:
    """What the vision side is given for a batch of images: one view of each.

    Args:
        image_processor: the model's own; decides size and normalisation.
        images: uint8 [B, 3, H, W].
        size: pixels a side at which the model shall see them instead.
    """
    options: dict[str, Any] = {k: v for k, v in ONE_VIEW.items() if hasattr(image_processor, k)}
    if size is not None:
        scaled = nn.functional.interpolate(
            images.float(), (size, size), mode="bicubic", antialias=True, align_corners=False
        )
        images = scaled.round().clamp(0, 255).to(torch.uint8)
        options |= {
            key: False for key in ("do_resize", "do_center_crop", "do_pad") if hasattr(image_processor, key)
        }
    inputs = dict(image_processor(images=list(images), return_tensors="pt", **options))
    pixels = inputs["pixel_values"]
    if pixels.ndim == 5:  # [samples, views, 3, H, W]: the first view of each image is the whole image
        views = pixels.flatten(0, 1)
        inputs["pixel_values"] = views[:: len(views) // len(images)][:, None]
    return inputs


def read_latents(
    model: Any, projector: nn.Module, inputs: dict[str, Tensor], latents: str, any_size: bool
) -> Tensor:
    """Run the vision side and return the tokens at the projector, in the model's own layout.

    Args:
        model: any image-text-to-text model with `get_image_features`.
        projector: from `find_projector`.
        inputs: from `vision_inputs`.
        latents: `encoder` (before the projector) or `projector` (after it).
        any_size: interpolate position embeddings, for towers that can.
    """
    read = getattr(model.base_model, "get_image_features", None) or getattr(model, "get_image_features", None)
    if read is None:
        raise VugenError(
            f"{type(model).__name__} cannot be used: it does not give image features by themselves"
        )
    accepted = inspect.signature(read).parameters
    arguments: dict[str, Any] = {key: value for key, value in inputs.items() if key in accepted}
    if any_size and _interpolates(model):
        arguments["interpolate_pos_encoding"] = True
    with projector_states(projector, latents) as seen:
        try:
            read(**arguments)
        except Exception:
            # What a family does with several views after the projector is not our concern.
            if not seen:
                raise
    if len(seen) == len(inputs["pixel_values"]):  # projected one image after the other
        return torch.cat([state.reshape(-1, state.shape[-1]) for state in seen])
    return seen[0]


def _interpolates(model: Any) -> bool:
    return any("interpolate_pos_encoding" in inspect.signature(m.forward).parameters for m in model.modules())


def to_grid(tokens: Tensor, inputs: dict[str, Tensor], batch: int, model: Any) -> Tensor:
    """Tokens at the projector -> [B, h, w, d], rows from the top, without class and register tokens.

    Args:
        tokens: [B, N, d], or [B * N, d] or [1, B * N, d] from models that join the images of a batch.
        inputs: what the vision side was given.
        batch: B.
        model: for the patch size and the order of its patches.

    Raises:
        VugenError: the number of tokens fits no grid.
    """
    tokens = tokens.reshape(batch, -1, tokens.shape[-1])
    vision = getattr(model.config, "vision_config", None)
    if "image_grid_thw" in inputs:
        height, width = map(int, inputs["image_grid_thw"][0, 1:])
    elif "spatial_shapes" in inputs:
        height, width = map(int, inputs["spatial_shapes"][0])
    else:
        patch = _patch_size(model, vision)
        size = inputs["image_sizes"][0].tolist() if "image_sizes" in inputs else None
        pixel_height, pixel_width = size or inputs["pixel_values"].shape[-2:]
        if size and inputs["pixel_values"].ndim == 5:  # the size of the original, not of what is seen
            pixel_height, pixel_width = inputs["pixel_values"].shape[-2:]
        height, width = pixel_height // patch, pixel_width // patch
    extra = tokens.shape[1] - height * width
    merged = 1
    if 0 <= extra <= MOST_EXTRA_TOKENS:
        tokens = tokens[:, extra:]
    else:
        merged = math.isqrt(height * width // tokens.shape[1])
        if merged == 0 or (height // merged) * (width // merged) != tokens.shape[1]:
            raise VugenError(
                f"{type(model).__name__} cannot be used: its projector sees {tokens.shape[1]} tokens, which "
                f"are no grid of {height}x{width} patches"
            )
    if "image_grid_thw" in inputs:
        block = getattr(vision, "spatial_merge_size", 1)
        patch = getattr(vision, "patch_size", 1)
        windowed = hasattr(vision, "fullatt_block_indexes")  # Qwen2.5-VL
        window = getattr(vision, "window_size", 0) // block // patch if windowed else None
        index = raster_index(height // merged, width // merged, max(1, block // merged), window)
        tokens = tokens[:, index.to(tokens.device)]
    return tokens.unflatten(1, (height // merged, width // merged))


def raster_index(height: int, width: int, block: int, window: int | None) -> Tensor:
    """Which token comes next, row by row, when tokens are listed by blocks of block x block, [h * w].

    Args:
        height, width: of the grid of tokens.
        block: side of a block, whose tokens are listed together, row by row.
        window: blocks a side of a window, whose blocks are listed together; None if there are no windows.
    """
    places = torch.arange(height * width).view(height // block, block, width // block, block)
    blocks = places.transpose(1, 2).flatten(2).flatten(0, 1)
    if window is not None:
        rows, columns = torch.arange(height // block) // window, torch.arange(width // block) // window
        number = rows[:, None] * (columns.max() + 1) + columns
        blocks = blocks[torch.argsort(number.flatten(), stable=True)]
    return torch.argsort(blocks.flatten())


def _patch_size(model: Any, vision: Any) -> int:
    size = getattr(vision, "patch_size", None)
    if size is None:
        convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        if convolution is None:
            raise VugenError(
                f"{type(model).__name__} cannot be used: its vision side does not say its patch size"
            )
        size = convolution.stride
    return int(size if isinstance(size, int) else size[0])
