"""The generation expert: the image tokens' own copy of the language model's decoder.

A Mixture of Transformers without a fork of any model. The expert is a Hugging Face decoder fed
`inputs_embeds`; its cache returns the prompt's keys and values (computed once by the frozen VLM) followed by
its own and stores nothing. Image tokens see the whole prompt and each other both ways; the prompt was
computed before they existed.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vugen_cli.errors import VugenError
from vugen_cli.models.embeddings import ReferenceEmbedding, TimeEmbedding, grid_positions, visible, zeroed
from vugen_cli.vlm.prefix import Prefix, layer_inputs

FUSED = "image_tokens"  # the name of `attend` among the attention functions of transformers


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """Fused attention in both directions: of every image token to all that the mask lets it see.

    transformers' own, but never causal. For an implementation by this name it makes no masks itself: layers
    get ours, and none where there is none, which is what the fastest kernels and grouped heads ask for.

    Args:
        query: [B, heads, N, head_dim].
        key, value: [B, kv_heads, T + N, head_dim].
        attention_mask: bool [B, 1, 1, T + N], False where a prompt is padded; None: nowhere.
    """
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, **how | {"is_causal": False}
    )  # [B, N, heads, head_dim]


AttentionInterface.register(FUSED, attend)


class PrefixCache(DynamicCache):  # type: ignore[misc]  # transformers is not followed
    """A read-only cache: `update` returns the prefix and the new states together and keeps neither."""

    def __init__(self, prefix: Prefix):
        super().__init__()
        self.prefix = prefix

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """[B, kv_heads, N, head_dim] -> [B, kv_heads, T + N, head_dim], twice."""
        return self.layer(layer_idx).update(key_states, value_states)

    def layer(self, number: int) -> "LayerPrefix":
        """What one layer reads of it."""
        return LayerPrefix(self.prefix.keys[number], self.prefix.values[number])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the prefix, padding included."""
        return self.prefix.mask.shape[1]


class LayerPrefix:
    """`PrefixCache` for one layer, which need not know its number.

    Args:
        keys, values: of the prefix in this layer, [B, kv_heads, T, head_dim].
    """

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As `PrefixCache.update`."""
        return (
            torch.cat([self.keys.to(key_states.dtype), key_states], 2),
            torch.cat([self.values.to(value_states.dtype), value_states], 2),
        )

    def get_seq_length(self, *_: Any) -> int:
        """Tokens of the prefix, padding included: Llama 4's layers ask."""
        return self.keys.shape[2]


class GenerationExpert(nn.Module):
    """The velocity field v(z̃_t, t | prompt).

    Args:
        decoder: of the VLM; copied, never changed.
        channels: of z̃.
        grid: (h, w) of z̃.
        fresh: start from new weights; otherwise from the decoder's.
        adaptive_norms: scale and shift what each norm gives by the time (AdaLN), by nothing at the start.
        empty: leave what is copied of the decoder on `meta`, without values.
        reference: read z̃ of a prompt's pictures too; see `Expert.reference`.

    Attributes:
        width: of its hidden states.
        alignment: hidden states [B, h, w, width] -> z [B, h, w, d]; only while training with REPA.

    Raises:
        VugenError: it is to start from a decoder whose weights are quantised.
    """

    reads = None  # no hidden states, but keys and values: what `FrozenVLM.prefix` is asked for

    def __init__(
        self,
        decoder: Any,
        channels: int,
        grid: tuple[int, int],
        fresh: bool = False,
        adaptive_norms: bool = False,
        empty: bool = False,
        reference: bool | str = False,
    ):
        super().__init__()
        self.reference = reference
        codes = any(p.element_size() == 1 or not p.is_floating_point() for p in decoder.parameters())
        if not fresh and (codes or any(name.endswith("qweight") for name, _ in decoder.named_buffers())):
            raise VugenError(
                "expert.init: the VLM's weights are quantised, and an expert cannot start from codes: take "
                "the VLM's unquantised copy, or set expert.init=fresh or expert.kind=dit"
            )
        words = decoder.get_input_embeddings()
        # Image tokens come as embeddings: no vocabulary is copied or kept.
        instead: dict[int, Any] = {id(words): nn.Identity()}
        if empty:
            instead |= {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in decoder.parameters()}
        copied = fresh_decoder(decoder) if fresh else copy.deepcopy(decoder, instead)
        config = copied.config
        if config._attn_implementation == "sdpa":
            copied.set_attn_implementation(FUSED)
        self.decoder: Any = without_dropout(copied).float().requires_grad_(True)
        self.width = width = config.hidden_size
        self.alignment: nn.Module | None = None
        # Not by the config, which may leave the sections to the rotary embedding's default.
        self.mrope = any(hasattr(module, "mrope_section") for module in copied.modules())
        self.proj_in = nn.Linear(channels, width)
        self.time_embed = TimeEmbedding(width)
        self.pos_embed = nn.Parameter(grid_positions(*grid, width))
        self.proj_out = zeroed(nn.Linear(width, channels))
        if reference:
            self.reference_embed = ReferenceEmbedding(width)
        self.norms = norms_of(self.decoder) if adaptive_norms else []
        if self.norms:
            self.modulation = zeroed(nn.Linear(width, 2 * width * len(self.norms)))
        for norm in self.norms:
            norm.register_forward_hook(_modulate)

    def forward(self, noised: Tensor, t: Tensor, prefix: Prefix) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity [B, h, w, channels]; in training with an alignment also z as half of the layers tell it.

        Args:
            noised: z̃_t [B, h, w, channels].
            t: [B] in [0, 1].
            prefix: of B prompts, from `FrozenVLM.prefix`.
        """
        _, height, width, _ = noised.shape
        count, references = height * width, prefix.references if self.reference else None
        time = self.time_embed(t)[:, None]  # [B, 1, width]
        # N = h w image tokens follow T of the prompt, padding included.
        tokens = self.proj_in(noised.flatten(1, 2)) + self.pos_embed + time  # [B, N, width]
        positions = image_positions(prefix.first_free, height, width, self.mrope)
        if references is not None:  # R N clean tokens, each where its noised one is
            clean = self.reference_embed(self.proj_in(references.flatten(2, 3)) + self.pos_embed)
            tokens = torch.cat([tokens, clean], 1)  # [B, N + R N, width]
            positions = torch.cat([positions] * (1 + references.shape[1]), -1)
        elif self.reference and torch.is_grad_enabled():
            tokens = self.reference_embed.unused(tokens)
        if self.norms:
            modulation = self.modulation(functional.silu(time)).chunk(2 * len(self.norms), -1)
            for number, norm in enumerate(self.norms):
                norm.time_scale, norm.time_bias = modulation[2 * number : 2 * number + 2]
        align = self.alignment if self.training else None
        half = self.decoder.config.num_hidden_layers // 2
        watched: AbstractContextManager[dict[int, Tensor]] = nullcontext({})
        with layer_inputs(self.decoder, [half]) if align else watched as seen:
            hidden = self.decoder(
                inputs_embeds=tokens,
                attention_mask=self._mask(prefix, tokens, count),
                position_ids=positions,
                past_key_values=PrefixCache(prefix),
                use_cache=False,
            ).last_hidden_state
        velocity = self.proj_out(hidden[:, :count]).unflatten(1, (height, width))
        return (velocity, align(seen[half][:, :count].unflatten(1, (height, width)))) if align else velocity

    def _mask(self, prefix: Prefix, tokens: Tensor, count: int) -> Tensor | None:
        """Which of T + N + R N keys the tokens see, as the decoder's attention function wants to be told."""
        fused, references = self.decoder.config._attn_implementation == FUSED, tokens.shape[1] // count - 1
        if fused and not prefix.padded and not references:
            return None
        seen = visible(prefix, count, references)[:, None, None]
        if fused:
            return seen  # [B, 1, 1, T + N + R N]
        mask = torch.zeros(seen.shape, dtype=tokens.dtype, device=tokens.device)  # to be added
        return mask.masked_fill(~seen, torch.finfo(mask.dtype).min).expand(-1, 1, tokens.shape[1], -1)


def without_dropout(module: nn.Module) -> nn.Module:
    """The network with every kind of dropout off, for good.

    A language model's configured dropout draws from the global generator: alike on every process, otherwise
    after a resume. Flow matching brings noise enough.
    """
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for holder in (part, getattr(part, "config", part)):  # layers read it from either
            for name, value in vars(holder).items():
                if name.endswith(("dropout", "layerdrop")) and isinstance(value, float):
                    setattr(holder, name, 0.0)
    return module


def image_positions(start: Tensor, height: int, width: int, sections: bool) -> Tensor:
    """Rotary positions of image tokens that follow prompts.

    Args:
        start: the first free position of each prompt, [B].
        height, width: of the grid.
        sections: the decoder has M-RoPE (arXiv 2409.12191), which takes time, row and column apart.

    Returns:
        [B, h * w], or [3, B, h * w] with sections.
    """
    order = torch.arange(height * width, device=start.device)
    if not sections:
        return start[:, None] + order
    places = torch.stack([torch.zeros_like(order), order // width, order % width])
    return start[None, :, None] + places[:, None]


def fresh_decoder(decoder: Any) -> Any:
    """A decoder of the same class and sizes with new weights and no vocabulary."""
    config = copy.deepcopy(decoder.config)
    config.vocab_size, config.pad_token_id = 1, 0
    fresh = type(decoder)(config)
    fresh.set_input_embeddings(nn.Identity())
    return fresh


def norms_of(decoder: Any) -> list[nn.Module]:
    """The norms over the decoder's width, whatever its family calls them.

    Raises:
        VugenError: there are none.
    """
    shape = (decoder.config.hidden_size,)
    named = [module for module in decoder.modules() if "norm" in type(module).__name__.lower()]
    norms = [norm for norm in named if getattr(getattr(norm, "weight", None), "shape", None) == shape]
    if not norms:
        raise VugenError(
            f"expert.adaptive_norms: {type(decoder).__name__} has no norms over its width; set it to false"
        )
    return norms


def _modulate(norm: Any, _args: Any, output: Tensor) -> Tensor:
    """Forward hook of an adaptive norm; scale and bias [B, 1, width] are those of this pass's times."""
    rows = output.to(norm.time_bias.dtype).view(len(norm.time_bias), -1, output.shape[-1])  # OPT's are flat
    return torch.addcmul(norm.time_bias, rows, 1 + norm.time_scale).view_as(output)
