"""What the generation expert reads of a prompt: keys and values of every layer, or hidden states of some."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Prefix:
    """What the generation expert reads of a batch of prompts.

    Attributes:
        keys: one tensor [B, kv_heads, T, head_dim] for each layer, rotary positions applied.
        values: likewise.
        mask: bool [B, T], False where a shorter prompt is padded.
        padded: False if the mask is known to be True everywhere, so that nobody need ask a GPU.
        hidden: instead of both, the hidden states that were asked for, [B, T, D] each.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    padded: bool = True
    hidden: list[Tensor] = field(default_factory=list)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each prompt [B]; the first free position."""
        return self.mask.sum(1)

    @staticmethod
    def join(prefixes: "list[Prefix]") -> "Prefix":
        """Several prefixes of the same padded length as one batch."""
        return Prefix(
            [torch.cat(keys) for keys in zip(*(p.keys for p in prefixes), strict=True)],
            [torch.cat(values) for values in zip(*(p.values for p in prefixes), strict=True)],
            torch.cat([p.mask for p in prefixes]),
            any(p.padded for p in prefixes),
            [torch.cat(hidden) for hidden in zip(*(p.hidden for p in prefixes), strict=True)],
        )

    def rows(self, index: Tensor) -> "Prefix":
        """The prefixes of some rows, in that order."""
        return Prefix(
            [k[index] for k in self.keys],
            [v[index] for v in self.values],
            self.mask[index],
            self.padded,
            [h[index] for h in self.hidden],
        )
