"""The optimiser of every stage, and its learning rate."""

from typing import Any

import torch
from torch import nn

from vugen_cli.recipe import Training


def make_optimizer(module: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), fused: it skips a step on the device where its `found_inf` is 1."""
    return torch.optim.AdamW(
        parameter_groups(module, settings.weight_decay), lr=settings.lr, betas=settings.betas, fused=True
    )


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms and embeddings of one dimension do not."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def learning_rate(step: int, settings: Training) -> float:
    """Linear warm-up, flat, then linear to zero over the last `cooldown` of the steps."""
    up = min(1.0, (step + 1) / max(1, settings.warmup))
    down = min(1.0, (settings.steps - step) / max(1.0, settings.cooldown * settings.steps))
    return settings.lr * up * down


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use a learning rate from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate
