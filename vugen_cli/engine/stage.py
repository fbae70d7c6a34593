"""What a stage brings to the training loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vugen_cli.data.loader import Batch


@dataclass(frozen=True)
class RunOptions:
    """What a command line says of a run beside its recipe.

    Attributes:
        profile: watch a few steps, write `trace.json.gz` and print where their time went.
        change_recipe: go on with a saved run though its recipe, data or VLM has changed.
    """

    profile: bool = False
    change_recipe: bool = False


@dataclass
class Stage:
    """What makes one stage different from another.

    Attributes:
        name: `vlm`, `vae`, `judge`, `reducer`, `decoder` or `sampler`.
        module: holds every trained weight.
        loss: (batch, generator, step) -> (scalar loss, named scalars to log). Called under autocast.
        preview: path of the PNG to write -> None; called while the module has its averaged weights.
        resolved: the recipe, data and VLM of the run as plain values; a resumed run must match them.
        layers: of the module, to be sharded one by one; none: every process keeps the whole module.
        partial: whether some steps leave some weights without a gradient.
        fill: give weights to a module that was built on `meta`; called once it is sharded.
        adapter: whether the module's other weights are those of a checkpoint, which a state need not hold.
        save: (path, step) -> None: write the stage's checkpoint; called while the module has its averaged
            weights, on every process.
    """

    name: str
    module: nn.Module
    loss: Callable[[Batch, torch.Generator, int], tuple[Tensor, dict[str, Tensor]]]
    preview: Callable[[Path], None]
    resolved: dict[str, Any]
    layers: Sequence[nn.Module] = ()
    partial: bool = False
    fill: Callable[[], None] | None = None
    save: Callable[[Path, int], None] | None = None
    adapter: bool = False

    def own(self) -> dict[str, Tensor]:
        """The module's parameters that a state holds."""
        named = self.module.named_parameters()
        return {name: weight for name, weight in named if weight.requires_grad or not self.adapter}
