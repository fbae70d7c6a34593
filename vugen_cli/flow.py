"""Flow matching: the path from noise to data, its training loss, and the ODE solvers.

Time runs from t = 0 (noise) to t = 1 (data) along the straight path x_t = (1 - t) noise + t data, whose
velocity is data - noise (Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003).
"""

import itertools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vugen_cli.seeds import random_rows

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x_t [B, ...], t [B]) -> velocity [B, ...]
Solver = Literal["euler", "heun", "midpoint"]


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Move times towards the noise end by `shift` > 1 (SD3, arXiv 2403.03206, eq. 23, with sigma = 1 - t)."""
    return t / (t + shift * (1 - t))  # t' = t / (t + s (1 - t))


def draw_times(count: int, kind: str, shift: float, generator: torch.Generator) -> Tensor:
    """Training times in (0, 1), float32 [count], on the generator's device.

    Args:
        kind: `uniform`, or `logit-normal` (SD3: the middle of the path is the hard part).
        shift: see `shift_time`.
    """
    if kind == "uniform":
        t = random_rows(torch.rand, (count,), generator)
    else:
        # t = sigmoid(n), n ~ N(0, 1)
        t = torch.sigmoid(random_rows(torch.randn, (count,), generator))
    return shift_time(t, shift)


def interpolate(noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
    """x_t of the straight path; t is [B], the others [B, ...]."""
    t = t.view(-1, *[1] * (data.ndim - 1))
    return (1 - t) * noise + t * data  # x_t = (1 - t) ε + t x


def flow_matching_loss(
    velocity: Velocity,
    data: Tensor,
    t: Tensor,
    generator: torch.Generator,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the velocity at random points of the path; a scalar.

    Args:
        velocity: the model.
        data: [B, ...] samples of the target distribution.
        t: [B] from `draw_times`.
        generator: draws the noise; on the data's device.
        weight: [B], of each sample's square; None: 1. With (1 - t)² it is the square of the clean prediction
            x_t + (1 - t) v.
    """
    noise = random_rows(torch.randn, data.shape, generator, data.dtype)
    predicted = velocity(interpolate(noise, data, t), t)
    square = (predicted.float() - (data - noise)).square()  # ‖v(x_t, t) - (x - ε)‖²
    return (square if weight is None else square * weight.view(-1, *[1] * (data.ndim - 1))).mean()


def solve(
    velocity: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    steps: int,
    solver: Solver = "euler",
    shift: float = 1.0,
) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 0 to 1.

    Args:
        velocity: (x, t) -> dx/dt; a network takes `at(t, x)`.
        noise: x at t = 0, [B, ...].
        steps: intervals; `euler` calls the velocity once in each, `heun` and `midpoint` twice, but `heun`
            once in the last (EDM, arXiv 2206.00364): a network that predicts the data has no velocity at 1.
        solver: order 1 (`euler`) or 2 (`heun`, `midpoint`).
        shift: spends more of the steps near the noise if > 1; see `shift_time`.

    Returns:
        x at t = 1, same shape and dtype as `noise`.
    """
    times = shift_time(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift).tolist()
    x = noise
    for t, after in itertools.pairwise(times):
        step = after - t
        slope = velocity(x, t).to(x.dtype)  # v(x_k, t_k)
        if solver == "heun" and after < 1:
            # (v(x_k, t_k) + v(x_k + h v(x_k, t_k), t_k + h)) / 2
            slope = (slope + velocity(x + step * slope, after).to(x.dtype)) / 2
        elif solver == "midpoint":
            # v(x_k + h/2 v(x_k, t_k), t_k + h/2)
            slope = velocity(x + step / 2 * slope, t + step / 2).to(x.dtype)
        x = x + step * slope  # x_{k+1} = x_k + h v
    return x


def at(t: float, x: Tensor) -> Tensor:
    """A time for each row of x, float32 [B]."""
    return torch.full((len(x),), t, device=x.device)
