"""Prompts with pictures: the whole VLM reads them, as it does when it is asked about a picture."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vugen_cli.errors import VugenError
from vugen_cli.vlm.chat import conversation, processed
from vugen_cli.vlm.latents import on_device_of
from vugen_cli.vlm.prompts import Prompt


def picture_inputs(
    model: Any, processor: Any, prompts: Sequence[Prompt], instruction: str = "{prompt}"
) -> dict[str, Any]:
    """What the model reads of prompts with as many pictures each, padded on the right.

    Args:
        model: an image-text-to-text model.
        processor: its processor, which sizes and tiles pictures as it does for questions.
        prompts: their pictures may differ in size if the processor allows it.
        instruction: with `{prompt}` in it; wraps the text.

    Returns:
        Keyword arguments of the model; `attention_mask` is [B, T], 0 at padding.

    Raises:
        VugenError: the processor could not be loaded whole.
    """
    if not callable(processor):
        raise VugenError(f"{type(model).__name__} cannot read pictures in a prompt: {processor.missing}")
    picture = str(getattr(processor, "image_token", "<image>"))
    texts = []
    for prompt in prompts:
        # A text that spells the token of pictures would ask for one more of them.
        parts = [part and part.replace(picture, "") for part in prompt.parts(instruction)]
        texts.append(conversation(processor, parts))
    image_processor = getattr(processor, "image_processor", None)
    nested = [on_device_of(image_processor, prompt.pictures, model.device) for prompt in prompts]
    # A model that counts places by rows and columns asks which tokens are a picture's; not all processors
    # say it unasked.
    asks = "mm_token_type_ids" in inspect.signature(model.base_model.forward).parameters
    more = {"return_mm_token_type_ids": True} if asks else {}
    inputs = processed(processor, texts, nested, padding=True, **more)
    inputs = dict(inputs.to(model.device, model.dtype))
    inputs.pop("labels", None)  # PaliGemma's, for training
    if "qformer_input_ids" in inputs:  # InstructBLIP's, of no integers where there is no text
        inputs["qformer_input_ids"] = inputs["qformer_input_ids"].long()
    ids = inputs["input_ids"]
    mask = inputs.setdefault("attention_mask", torch.ones_like(ids)).bool()
    if not mask.all():
        # Chat processors pad on the left; on the right, positions are those of each prompt alone.
        order = (~mask).long().argsort(dim=1, stable=True)
        for key, value in inputs.items():
            if isinstance(value, Tensor) and value.shape == ids.shape:
                inputs[key] = value.gather(1, order)
    return inputs


def picture_tokens(model: Any, image_processor: Any, images: Tensor) -> Tensor:
    """What a VLM puts into a prompt for some pictures, [tokens, D]; its processor cuts views and tiles.

    Args:
        model: an image-text-to-text model.
        image_processor: its own.
        images: uint8 [B, 3, H, W].
    """
    inputs = dict(image_processor(images=list(images), return_tensors="pt"))
    takes = inspect.signature(model.get_image_features).parameters
    features = model.get_image_features(**{key: value for key, value in inputs.items() if key in takes})
    found = getattr(features, "pooler_output", features)
    parts = found if isinstance(found, Sequence) else [found]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def run_vlm(model: Any, decoder: Any, inputs: dict[str, Any], **cache: Any) -> Tensor:
    """Run a VLM over a prompt with pictures, without its head over the vocabulary where that can be left out.

    Args:
        model: an image-text-to-text model.
        decoder: its stack of layers.
        inputs: from `picture_inputs`.
        cache: `past_key_values` and `use_cache`.

    Returns:
        The rotary positions of its tokens, int64 [A, B, T]: one, or with M-RoPE one an axis.
    """
    seen: dict[str, Any] = {}

    def keep(_decoder: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    whole = inputs | cache
    bare = inspect.signature(model.base_model.forward).parameters
    runs = model.base_model if inputs.keys() <= bare.keys() else model
    parameters = inspect.signature(runs.forward).parameters
    if "logits_to_keep" in parameters:
        whole["logits_to_keep"] = 1
    hook = decoder.register_forward_pre_hook(keep, with_kwargs=True)
    more = cache if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else {}  # handed on (BLIP-2)
    try:
        runs(**{key: value for key, value in whole.items() if key in parameters or key in more})
    finally:
        hook.remove()
    mask = inputs["attention_mask"].bool()
    positions = seen.get("position_ids")
    if positions is None:
        return mask.cumsum(1)[None] - 1
    return positions if positions.ndim == 3 else positions.expand(mask.shape)[None]


def first_free(positions: Tensor, mask: Tensor) -> Tensor:
    """The first free rotary position after each prompt, int64 [B], from those of its tokens.

    Args:
        positions: [A, B, T], from `run_vlm`; of M-RoPE time, row and column stand last, and before them
            perhaps the place in the text.
        mask: bool [B, T], False at padding.
    """
    return positions[-3:].amax(0).masked_fill(~mask, -1).amax(1) + 1
