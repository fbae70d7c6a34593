"""Flow matching against closed forms."""

import pytest
import torch

from vugen_cli.flow import at, draw_times, flow_matching_loss, interpolate, shift_time, solve

MEAN, STD = 2.0, 0.5


def gaussian_velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[data - noise | x_t = x] when data ~ N(MEAN, STD^2), noise ~ N(0, 1): a linear regression."""
    t = t.view(-1, 1).double()
    variance = (1 - t) ** 2 + (t * STD) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def exact_map(noise: torch.Tensor) -> torch.Tensor:
    """The flow of a Gaussian target carries quantiles to quantiles."""
    return MEAN + STD * noise


def error(solver: str, steps: int) -> float:
    noise = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    reached = solve(lambda x, t: gaussian_velocity(x, at(t, x)), noise, steps, solver)  # type: ignore[arg-type]
    return (reached - exact_map(noise)).abs().max().item()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
def test_solvers_converge_at_their_order(solver: str, order: int) -> None:
    ratio = error(solver, 64) / error(solver, 128)
    assert ratio > 0.9 * 2**order  # midpoint does better still: this field's leading error cancels
    assert solver != "euler" or ratio < 2.2


def test_the_loss_is_least_for_the_true_velocity() -> None:
    data = MEAN + STD * torch.randn(
        200_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    t = torch.full((len(data),), 0.3)

    def loss(scale: float) -> float:
        generator = torch.Generator().manual_seed(2)
        return flow_matching_loss(lambda x, t: scale * gaussian_velocity(x, t), data, t, generator).item()

    assert loss(1.0) < min(loss(0.97), loss(1.03))


def test_a_velocity_that_knows_the_noise_has_no_loss() -> None:
    data = torch.randn(8, 3)
    t = torch.rand(8) * 0.9
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(3))
    assert flow_matching_loss(lambda x, t: data - noise, data, t, generator).item() == 0


def test_the_path_runs_from_noise_to_data() -> None:
    noise, data = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(interpolate(noise, data, torch.zeros(2)), noise)
    assert torch.equal(interpolate(noise, data, torch.ones(2)), data)


def test_shift_matches_sd3_and_keeps_the_ends() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    sigma = 1 - t
    assert torch.allclose(1 - shift_time(t, 3.0), 3 * sigma / (1 + 2 * sigma))
    assert torch.equal(shift_time(t, 1.0), t)


@pytest.mark.parametrize("kind", ["uniform", "logit-normal"])
def test_times_are_inside_the_path_and_seeded(kind: str) -> None:
    first = draw_times(1000, kind, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(first, draw_times(1000, kind, 1.0, torch.Generator().manual_seed(0)))
    assert first.min() > 0 and first.max() < 1
    assert first.mean().item() == pytest.approx(0.5, abs=0.03)
    assert draw_times(1000, kind, 3.0, torch.Generator().manual_seed(0)).mean() < 0.4
