"""The optimiser of every stage, and its learning rate."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vugen_cli.engine.distributed import blocks
from vugen_cli.errors import VugenError
from vugen_cli.recipe import Training

ADAMW, MUON = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}  # what they keep of a parameter


def make_optimizer(module: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), or Muon with it, as the settings say.

    Either skips a step, on the device, where its `found_inf` is 1.

    Raises:
        VugenError: Muon's matrices are sharded, or there are none.
    """
    if settings.optimizer == "muon":
        return MuonWithAdamW(module, settings)
    return adamw(parameter_groups(module.parameters(), settings.weight_decay), settings)


def adamw(groups: list[dict[str, Any]], settings: Training) -> torch.optim.AdamW:
    """Fused, which is the one that looks at `found_inf`."""
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the repeated layers, AdamW for embeddings, norms, biases, convolutions, and
    the layers before and after (Liu et al., arXiv 2502.16982).

    Muon's step is the nearest orthogonal matrix to its momentum, scaled to the size of AdamW's steps, so both
    take the same rates and decay.

    Attributes:
        adamw, muon: the two, which share this one's groups and state.
        found_inf: a scalar on the device; 1: the next step changes nothing.
    """

    found_inf: Tensor | None = None

    def __init__(self, module: nn.Module, settings: Training):
        matrices = block_matrices(module)
        if any(isinstance(matrix, DTensor) for matrix in matrices):
            raise VugenError(
                "optimizer=muon orthogonalises whole matrices, and engine.strategy=fsdp shares them out: "
                "set optimizer=adamw, or engine.strategy=ddp"
            )
        if not matrices:
            raise VugenError("optimizer=muon: these networks have no matrices in repeated layers; set adamw")
        taken = {id(matrix) for matrix in matrices}
        rest = [p for p in module.parameters() if id(p) not in taken]
        self.adamw = adamw(parameter_groups(rest, settings.weight_decay), settings)
        self.muon = torch.optim.Muon(
            matrices,
            lr=settings.muon_lr or settings.lr,
            weight_decay=settings.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        for group in self.muon.param_groups:
            group["times_lr"] = (settings.muon_lr or settings.lr) / settings.lr
        super().__init__([*self.adamw.param_groups, *self.muon.param_groups], {})
        self.adamw.state = self.muon.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no loop gives a closure
        """One step of both; where `found_inf` is 1, weights and moments stay as they are.

        Muon has no such switch, and to ask the device would make the host wait: what it changed is put back.
        """
        self.adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.adamw.step()
        matrices = [p for group in self.muon.param_groups for p in group["params"] if p.grad is not None]
        for p in matrices:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in matrices]
        changing: list[Tensor] = [] if self.found_inf is None else [*matrices, *momenta]
        before = [tensor.detach().clone() for tensor in changing]
        self.muon.step()
        for tensor, old in zip(changing, before, strict=True):
            tensor.copy_(torch.where(self.found_inf.bool(), old, tensor))  # type: ignore[union-attr]


def moments_of(optimizer: torch.optim.Optimizer) -> dict[int, set[str]]:
    """Names of what an optimiser keeps of each parameter, by the parameter's `id`."""
    muon = optimizer.muon.param_groups if isinstance(optimizer, MuonWithAdamW) else []
    kept = {id(p): ADAMW for group in optimizer.param_groups for p in group["params"]}
    return kept | {id(p): MUON for group in muon for p in group["params"]}


def block_matrices(module: nn.Module) -> list[Tensor]:
    """The trained weights of linear layers within a network's repeated layers, each [rows, columns]."""
    layers = [layer for block in blocks(module) for layer in block.modules()]
    weights = {id(layer.weight): layer.weight for layer in layers if isinstance(layer, nn.Linear)}
    return [weight for weight in weights.values() if weight.requires_grad]


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms and embeddings of one dimension do not."""
    trained = [p for p in parameters if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def learning_rate(step: int, settings: Training) -> float:
    """Linear warm-up, flat, then linear to zero over the last `cooldown` of the steps."""
    up = min(1.0, (step + 1) / max(1, settings.warmup))
    down = min(1.0, (settings.steps - step) / max(1.0, settings.cooldown * settings.steps))
    return settings.lr * up * down


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use a learning rate from the next step on; a group with `times_lr` takes so many times as much."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("times_lr", 1.0)
