"""The exponential moving average of the trained weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from vugen_cli.engine.distributed import local


class EMA:
    """An exponential moving average of a module's trained weights, in float32."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.weights = {n: p.detach().clone().float() for n, p in self.trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the module's weights; early steps count more, so the average forgets the start."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            [local(w) for w in self.weights.values()],
            [local(p.detach()).float() for p in self.trained.values()],
            1 - decay,
        )

    @torch.no_grad()
    def copy_into_module(self) -> None:
        """Replace the module's weights by the average."""
        for name, parameter in self.trained.items():
            parameter.copy_(self.weights[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the module has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange the module's weights and the average, one by one: both stay where they are in memory."""
        for name, parameter in self.trained.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(kept)
