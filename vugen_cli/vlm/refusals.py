"""Why a model cannot be used, read from how it is built and said in one line."""

import inspect
from collections.abc import Iterator
from typing import Any

from vugen_cli.errors import VugenError

CROSS_ATTENTION = ("crossattention", "cross_attn", "cross_attention", "EncDecAttention")


def refuse(model: Any, name: str) -> None:
    """Stop at a model whose design leaves nothing for the method to hold on to.

    The method needs a vision encoder whose tokens lie on a grid, and a language model that reads the prompt
    once, causally, so that image tokens can follow it.

    Raises:
        VugenError: it has no vision encoder, is an encoder-decoder, or sees images by cross-attention only.
    """
    if reason := refusal(model):
        raise VugenError(f"{name} ({model.config.model_type}) cannot be used: {reason}")


def refusal(model: Any) -> str | None:
    """The reason against a model's design, or None."""
    sections = dict(_sections("", model.config))
    decoder = model.get_decoder()
    reads = inspect.signature(decoder.forward).parameters if decoder is not None else {}
    if any(getattr(section, "is_encoder_decoder", False) for section in sections.values()) or (
        "decoder_input_ids" in reads
    ):
        return (
            "its language model is an encoder-decoder, which keeps no prompt that image tokens could follow; "
            "take a VLM whose language model is a decoder"
        )
    if not any("vision" in name for name in sections):
        return (
            "it has no vision encoder: pixels or codes of them go straight into its language model, so there "
            "is no z; take a VLM with a vision tower"
        )
    if any(part in CROSS_ATTENTION for name, _ in decoder.named_modules() for part in name.split(".")):
        return (
            "its language model sees images by cross-attention only, and never as tokens beside the prompt; "
            "take a VLM that puts image tokens into the prompt"
        )
    return None


def _sections(name: str, config: Any) -> Iterator[tuple[str, Any]]:
    """A config and every config in it, each with the names that lead there."""
    yield name, config
    for part in getattr(config, "sub_configs", {}):
        if (section := getattr(config, part, None)) is not None:
            yield from _sections(f"{name}.{part}", section)
