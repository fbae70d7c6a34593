"""Names of tensors since format 2 of checkpoints, and what files of format 1 call them."""

import re
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")  # a tensor, or where to find one
# What a name begins with in format 1, and in format 2; `#` is the number of a layer. The first row that fits
# counts.
RENAMED = (
    ("autoencoder.reducer.net.inward", "autoencoder.reducer.net.proj_in"),
    ("autoencoder.reducer.net.outward", "autoencoder.reducer.net.proj_out"),
    ("autoencoder.decoder.time.net", "autoencoder.decoder.time_embed.mlp"),
    ("autoencoder.decoder.latents", "autoencoder.decoder.latent_embed"),
    ("autoencoder.decoder.beside", "autoencoder.decoder.cond_proj"),
    ("autoencoder.decoder.inward", "autoencoder.decoder.conv_in"),
    ("autoencoder.decoder.shrink", "autoencoder.decoder.downsample"),
    ("autoencoder.decoder.middle.#.table", "autoencoder.decoder.mid.#.relative_position_bias_table"),
    ("autoencoder.decoder.middle.#.out", "autoencoder.decoder.mid.#.proj"),
    ("autoencoder.decoder.middle.#.gate", "autoencoder.decoder.mid.#.ff_in"),
    ("autoencoder.decoder.middle.#.shrink", "autoencoder.decoder.mid.#.ff_out"),
    ("autoencoder.decoder.middle", "autoencoder.decoder.mid"),
    ("autoencoder.decoder.grow", "autoencoder.decoder.upsample"),
    ("autoencoder.decoder.norm", "autoencoder.decoder.norm_out"),
    ("autoencoder.decoder.outward", "autoencoder.decoder.conv_out"),
    ("autoencoder.alignment.net", "autoencoder.alignment.mlp"),
    ("autoencoder.alignment.outward", "autoencoder.alignment.proj_out"),
    ("expert.inward", "expert.proj_in"),
    ("expert.time.net", "expert.time_embed.mlp"),
    ("expert.position", "expert.pos_embed"),
    ("expert.outward", "expert.proj_out"),
)
# Where the module that a stage trains, and keeps in its run's states, is in a checkpoint.
TRAINED = {"reducer": "autoencoder.", "decoder": "autoencoder.decoder.", "sampler": "expert."}


def _rules(rows: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    return [
        (re.compile(re.escape(a).replace(r"\#", r"(\d+)") + r"(?=\.|$)"), b.replace("#", r"\1"))
        for a, b in rows
    ]


_NEW, _OLD = _rules(RENAMED), _rules((new, old) for old, new in RENAMED)


def new_name(name: str) -> str:
    """What a tensor of a format 1 checkpoint is called now: `expert.inward.bias` -> `expert.proj_in.bias`."""
    return _first(name, _NEW)


def old_name(name: str, within: str = "") -> str:
    """The inverse of `new_name`.

    Args:
        name: of the tensor, inside of
        within: `expert.` or such; left out of what comes back, as it is of `name`.
    """
    return _first(within + name, _OLD).removeprefix(within)


def _first(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        if pattern.match(name):
            return pattern.sub(replacement, name, count=1)
    return name


def from_format_1(tensors: dict[str, T], stage: str) -> dict[str, T]:
    """The tensors of a checkpoint, or of a run's state (`<stage>-state`), under the names of today."""
    if not stage.endswith("-state"):
        return {new_name(name): tensor for name, tensor in tensors.items()}
    within, renamed = TRAINED.get(stage.removesuffix("-state"), ""), {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")  # module, buffer, average or optimizer
        kind = "ema" if kind == "average" else kind
        renamed[f"{kind}.{new_name(within + rest).removeprefix(within)}"] = tensor
    return renamed
