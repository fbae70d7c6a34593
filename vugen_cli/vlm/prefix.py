"""What the generation expert reads of a prompt: keys and values of every layer, or hidden states of some."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vugen_cli.errors import VugenError


@dataclass
class Prefix:
    """What the generation expert reads of a batch of prompts.

    Attributes:
        keys: one tensor [B, kv_heads, T, head_dim] for each layer, rotary positions applied.
        values: likewise.
        mask: bool [B, T], False where a shorter prompt is padded.
        padded: False if the mask is known to be True everywhere, so that nobody need ask a GPU.
        hidden: instead of both, the hidden states that were asked for, [B, T, D] each.
        references: z̃ of the prompts' pictures, [B, R, h, w, c], for experts that read them.
        referred: bool [B, R], False where a prompt has fewer pictures.
        start: the first free rotary position of each prompt [B], where it is not the number of its tokens:
            many VLMs count a picture's places by rows and columns.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor
    padded: bool = True
    hidden: list[Tensor] = field(default_factory=list)
    start: Tensor | None = None
    references: Tensor | None = None
    referred: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Tokens of each prompt [B]."""
        return self.mask.sum(1)

    @property
    def first_free(self) -> Tensor:
        """The first free rotary position of each prompt [B]."""
        return self.lengths if self.start is None else self.start

    @staticmethod
    def join(prefixes: "list[Prefix]") -> "Prefix":
        """Several prefixes of the same padded length as one batch."""
        references, referred = _joined(prefixes)
        return Prefix(
            [torch.cat(keys) for keys in zip(*(p.keys for p in prefixes), strict=True)],
            [torch.cat(values) for values in zip(*(p.values for p in prefixes), strict=True)],
            torch.cat([p.mask for p in prefixes]),
            any(p.padded for p in prefixes),
            [torch.cat(hidden) for hidden in zip(*(p.hidden for p in prefixes), strict=True)],
            None if all(p.start is None for p in prefixes) else torch.cat([p.first_free for p in prefixes]),
            references,
            referred,
        )

    def widened(self, length: int) -> "Prefix":
        """The same prompts padded to some more tokens."""
        more = length - self.mask.shape[1]
        if not more:
            return self
        return replace(
            self,
            keys=[functional.pad(k, (0, 0, 0, more)) for k in self.keys],
            values=[functional.pad(v, (0, 0, 0, more)) for v in self.values],
            mask=functional.pad(self.mask, (0, more)),
            padded=True,
            hidden=[functional.pad(h, (0, 0, 0, more)) for h in self.hidden],
        )

    def rows(self, index: Tensor) -> "Prefix":
        """The prefixes of some rows, in that order."""
        return Prefix(
            [k[index] for k in self.keys],
            [v[index] for v in self.values],
            self.mask[index],
            self.padded,
            [h[index] for h in self.hidden],
            None if self.start is None else self.start[index],
            None if self.references is None else self.references[index],
            None if self.referred is None else self.referred[index],
        )


@contextmanager
def layer_inputs(decoder: Any, numbers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """What goes into some of a decoder's layers while it runs: number -> [B, T, D].

    Raises:
        VugenError: it has no list of layers.
    """
    count = decoder.config.num_hidden_layers
    stacks = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not stacks:
        raise VugenError(f"{type(decoder).__name__} cannot be used: it has no list of its {count} layers")
    seen: dict[int, Tensor] = {}

    def keep(number: int, _layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen[number] = one_stream(args[0] if args else kwargs["hidden_states"], decoder.config)

    # Not `output_hidden_states`, whose hooks transformers leaves on the model, and so on a copy of it.
    # An image encoder in the decoder (GIT) may have as many layers; what runs last is seen.
    hooks = [
        stack[number].register_forward_pre_hook(partial(keep, number), with_kwargs=True)
        for stack in stacks
        for number in set(numbers)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def one_stream(states: Tensor, config: Any) -> Tensor:
    """Hidden states [B, T, D] of a decoder that may carry several streams of them side by side."""
    if states.ndim == 4 and hasattr(config, "altup_active_idx"):
        return states[config.altup_active_idx]  # Gemma 3n: [streams, B, T, D], layers read one
    # Hyper-connections (GLM 5, Qwen4): [B, T, streams, D] or [B, T, streams * D], which layers mix.
    return states.reshape(*states.shape[:2], -1, config.hidden_size).mean(2)


def _joined(prefixes: list[Prefix]) -> tuple[Tensor | None, Tensor | None]:
    """References of several prefixes as one batch, filled up where some have fewer."""
    given = [p.references for p in prefixes if p.references is not None]
    if not given:
        return None, None
    most = max(references.shape[1] for references in given)
    all_references, all_referred = [], []
    for p in prefixes:
        batch = len(p.mask)
        references = given[0].new_zeros(batch, most, *given[0].shape[2:])
        referred = torch.zeros(batch, most, dtype=torch.bool, device=references.device)
        if p.references is not None and p.referred is not None:
            references[:, : p.references.shape[1]] = p.references
            referred[:, : p.referred.shape[1]] = p.referred
        all_references.append(references)
        all_referred.append(referred)
    return torch.cat(all_references), torch.cat(all_referred)
