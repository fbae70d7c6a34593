"""The generation expert: the image tokens' own copy of the language model's decoder.

A Mixture of Transformers without a fork of any model. The expert is a Hugging Face decoder fed
`inputs_embeds`; its cache returns the prompt's keys and values (computed once by the frozen VLM) followed by
its own and stores nothing. Image tokens see the whole prompt and each other both ways; the prompt was
computed before they existed.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vugen_cli.models.embeddings import TimeEmbedding, grid_positions
from vugen_cli.vlm.frozen import Prefix


class PrefixCache(DynamicCache):
    """A read-only cache: `update` returns the prefix and the new states together and keeps neither."""

    def __init__(self, prefix: Prefix):
        super().__init__()
        self.prefix = prefix

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """[B, kv_heads, N, head_dim] -> [B, kv_heads, T + N, head_dim], twice."""
        keys, values = self.prefix.keys[layer_idx], self.prefix.values[layer_idx]
        return (
            torch.cat([keys.to(key_states.dtype), key_states], 2),
            torch.cat([values.to(value_states.dtype), value_states], 2),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the prefix, padding included."""
        return self.prefix.mask.shape[1]


class GenerationExpert(nn.Module):
    """The velocity field v(z̃_t, t | prompt).

    Args:
        config: the text config of the VLM's decoder (layers, heads and head_dim must be those of the prefix).
        channels: of z̃.
        grid: (h, w) of z̃.
        decoder: start from a copy of this module's weights; None starts fresh.
    """

    def __init__(self, config: Any, channels: int, grid: tuple[int, int], decoder: nn.Module | None = None):
        super().__init__()
        from transformers import AutoModel

        config = copy.deepcopy(config)
        if decoder is None:
            self.decoder = AutoModel.from_config(config)
        else:
            self.decoder = copy.deepcopy(decoder).float().requires_grad_(True)
        self.decoder.embed_tokens = nn.Identity()  # image tokens come as embeddings; no vocabulary is kept
        width = config.hidden_size
        self.inward = nn.Linear(channels, width)
        self.time = TimeEmbedding(width)
        self.position = nn.Parameter(grid_positions(*grid, width))
        self.outward = nn.Linear(width, channels)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def forward(self, noised: Tensor, t: Tensor, prefix: Prefix) -> Tensor:
        """Velocity [B, h, w, channels].

        Args:
            noised: z̃_t [B, h, w, channels].
            t: [B] in [0, 1].
            prefix: of B prompts, from `FrozenVLM.prefix`.
        """
        batch, height, width, _ = noised.shape
        tokens = self.inward(noised.flatten(1, 2)) + self.position + self.time(t)[:, None]
        count = height * width
        positions = prefix.lengths[:, None] + torch.arange(count, device=tokens.device)
        visible = torch.cat([prefix.mask, prefix.mask.new_ones(batch, count)], 1)
        mask = torch.zeros(visible.shape, dtype=tokens.dtype, device=tokens.device)
        mask = mask.masked_fill(~visible, torch.finfo(tokens.dtype).min)[:, None, None].expand(
            -1, 1, count, -1
        )
        hidden = self.decoder(
            inputs_embeds=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=PrefixCache(prefix),
            use_cache=False,
        ).last_hidden_state
        return self.outward(hidden).unflatten(1, (height, width))
