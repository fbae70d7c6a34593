"""Every kind of reducer: shapes, statistics, the closed form of PCA, penalties, and the latent report."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import changed

from vugen_cli.errors import VugenError
from vugen_cli.models.reducer import Reducer, merge
from vugen_cli.recipe import Recipe, load_recipe
from vugen_cli.recipe import Reducer as ReducerRecipe
from vugen_cli.sampling.trained import load_autoencoder
from vugen_cli.stages.latent_report import describe_latents, effective_rank
from vugen_cli.stages.train_reducer import train_reducer

CPU = torch.device("cpu")
KINDS = ("linear", "mlp", "attention", "pca", "identity")


def recipe(**values: object) -> ReducerRecipe:
    return ReducerRecipe.model_validate({"channels": 4, "hidden": 32, "heads": 2, **values})


def correlated(count: int = 40) -> torch.Tensor:
    """z [count, 4, 4, 8] whose variance lies mostly in a few directions."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(count, 4, 4, 8, generator=generator) * torch.tensor([9, 5, 3, 2, 1, 0.5, 0.2, 0.1])
    turn, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator))
    return z @ turn + 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1, 2])
def test_latents_have_the_promised_shape_and_unit_statistics(kind: str, factor: int) -> None:
    torch.manual_seed(0)
    reducer = Reducer(recipe(kind=kind, merge=factor), 8)
    z = correlated()
    if kind == "pca":
        reducer.fit_pca(z.split(7))
    reducer.fit_statistics(z.split(7))
    latents = reducer.eval()(z)
    assert latents.shape == (40, 4 // factor, 4 // factor, 8 * factor**2 if kind == "identity" else 4)
    assert latents.shape[-1] == reducer.channels
    assert torch.allclose(latents.mean((0, 1, 2)), torch.zeros(reducer.channels), atol=1e-4)
    assert torch.allclose(latents.square().mean((0, 1, 2)), torch.ones(reducer.channels), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_trained_weight_and_no_fitted_one(kind: str) -> None:
    torch.manual_seed(0)
    reducer = Reducer(recipe(kind=kind), 8)
    latents, _ = reducer.noisy(correlated(6), 0.1, torch.Generator().manual_seed(0))
    parameters = dict(reducer.named_parameters())
    assert (
        latents.requires_grad == reducer.recipe.trained == any(p.requires_grad for p in parameters.values())
    )
    if reducer.recipe.trained:
        (latents * torch.randn(latents.shape)).sum().backward()
        for name, parameter in parameters.items():
            # attention does not change with its keys' bias (softmax), nor normalised latents with a last bias
            if name.endswith("in_proj_bias") or name in ("net.bias", "net.3.bias", "net.proj_out.1.bias"):
                continue
            assert parameter.grad is not None and parameter.grad.any(), name


def test_pca_is_that_of_a_float64_decomposition_whatever_the_batches() -> None:
    z = correlated()
    rows = z.double().flatten(0, 2).numpy()
    _, _, directions = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    found = []
    for size in (1, 13, 40):
        reducer = Reducer(recipe(kind="pca"), 8)
        reducer.fit_pca(z.split(size))
        found.append(reducer.net.weight.clone())
        overlap = np.abs(reducer.net.weight.double().numpy() @ directions[:4].T)
        assert np.allclose(overlap, np.eye(4), atol=1e-5)
    assert torch.allclose(found[0], found[1], atol=1e-6) and torch.allclose(found[0], found[2], atol=1e-6)


def test_pca_keeps_more_of_z_than_any_other_linear_map_tried() -> None:
    z = correlated()
    reducer = Reducer(recipe(kind="pca"), 8)
    reducer.fit_pca([z])
    rows = (z - z.mean((0, 1, 2))).flatten(0, 2)

    def kept(weight: torch.Tensor) -> float:
        basis, _ = torch.linalg.qr(weight.T)
        return ((rows @ basis).square().sum() / rows.square().sum()).item()

    torch.manual_seed(0)
    assert kept(reducer.net.weight) > max(kept(torch.randn(4, 8)) for _ in range(50))
    assert kept(reducer.net.weight) > 0.98


def test_pca_has_no_more_channels_than_z() -> None:
    with pytest.raises(VugenError, match="PCA of 8 values has no more"):
        Reducer(recipe(kind="pca", channels=9), 8)


def test_identity_loses_nothing() -> None:
    reducer = Reducer(recipe(kind="identity"), 8)
    z = correlated()
    reducer.fit_statistics([z])
    assert torch.allclose(reducer(z) * reducer.std + reducer.mean, z, atol=1e-5)


def test_merging_keeps_every_value_beside_its_neighbours() -> None:
    z = torch.arange(2 * 4 * 4 * 3.0).reshape(2, 4, 4, 3)
    merged = merge(z, 2)
    assert merged.shape == (2, 2, 2, 12)
    assert set(merged[0, 1, 0].tolist()) == set(z[0, 2:4, 0:2].flatten().tolist())
    with pytest.raises(VugenError, match="a grid of 3 x 4 cannot be divided"):
        merge(z[:, :3], 2)


def test_attention_looks_across_the_grid_and_the_others_do_not() -> None:
    z = correlated(1)
    moved = z.clone()
    moved[0, 0, 0] += 1
    for kind in ("linear", "mlp", "attention"):
        torch.manual_seed(0)
        reducer = Reducer(recipe(kind=kind), 8).eval()
        far = (reducer(moved) - reducer(z))[0, 3, 3].abs().max()
        assert (far > 1e-6) == (kind == "attention")


def test_the_penalty_is_its_closed_form() -> None:
    torch.manual_seed(0)
    z = correlated()
    reducer = Reducer(recipe(normalise="kl"), 8)
    _, penalty = reducer.noisy(z, 0.0, torch.Generator())
    mean, log_variance = reducer.net(z).chunk(2, -1)
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    exact = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    assert penalty.item() == pytest.approx(exact.item(), rel=1e-4)


def test_shrinking_the_latents_costs_signal_under_the_penalty() -> None:
    """Else the penalty would shrink them for nothing, and would mean nothing."""
    torch.manual_seed(0)
    z = correlated()
    heard = []
    for scale in (1.0, 0.1):
        reducer = Reducer(recipe(normalise="kl"), 8)
        with torch.no_grad():
            reducer.net.weight[:4].mul_(scale)
            reducer.net.bias[:4].mul_(scale)
            reducer.net.weight[4:].zero_()
        reducer.fit_statistics([z])
        noisy, _ = reducer.noisy(z, 0.5, torch.Generator().manual_seed(0))
        reducer.eval()
        heard.append((noisy - reducer(z)).std().item())
    assert heard[1] > 5 * heard[0]


def test_fitted_reducers_take_channel_statistics_only() -> None:
    with pytest.raises(VugenError, match=r"reducer.normalise must be channel where reducer.kind is pca"):
        load_recipe(None, ["reducer.kind=pca", "reducer.normalise=kl"])
    with pytest.raises(VugenError, match="multiple of 4 and of reducer.heads"):
        load_recipe(None, ["reducer.kind=attention", "reducer.heads=7"])


# --- the latent report ---


def test_the_report_is_that_of_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(200, 10, 10, 1, generator=generator)
    uniform = (torch.rand(200, 10, 10, 1, generator=generator) - 0.5) * math.sqrt(12)
    exponential = -torch.rand(200, 10, 10, 1, generator=generator).log() - 1
    report = describe_latents(torch.cat([gaussian, uniform, exponential], -1).split(17))
    assert report["tokens"] == 20_000
    # closed forms: negentropies 0, ln sqrt(2 pi e / 12), ln sqrt(2 pi e) - 1
    assert report["negentropy"] == pytest.approx([0, 0.1765, 0.4189], abs=0.02)
    assert report["excess_kurtosis"] == pytest.approx([0, -1.2, 6], abs=0.6)
    assert report["skewness"] == pytest.approx([0, 0, 2], abs=0.1)
    assert report["std"] == pytest.approx([1, 1, 1], abs=0.02)
    assert report["effective_rank"] == pytest.approx(3, abs=0.01)


def test_channels_that_repeat_each_other_lower_the_rank() -> None:
    assert effective_rank(np.array([2.0, 2.0, 0.0])) == pytest.approx(2)
    assert effective_rank(np.array([5.0, 0.0, -1e-12])) == pytest.approx(1)
    x = torch.randn(50, 4, 4, 1)
    dead = describe_latents([torch.cat([x, torch.zeros_like(x)], -1)])
    assert dead["std"][1] == dead["skewness"][1] == dead["excess_kurtosis"][1] == dead["negentropy"][1] == 0
    assert describe_latents([torch.cat([x, x, x], -1)])["effective_rank"] == pytest.approx(1, abs=1e-6)


# --- through the stage ---


@pytest.mark.parametrize(
    "overrides",
    [
        ["reducer.kind=pca"],
        ["reducer.kind=identity", "reducer.merge=2"],
        ["reducer.kind=attention", "reducer.normalise=kl", "reducer.hidden=16", "reducer.heads=2"],
    ],
)
def test_a_reducer_of_any_kind_trains_its_decoder_and_comes_back_whole(
    overrides: list[str], scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    path = train_reducer(changed(tiny_recipe, *overrides), scenes, tmp_path / "r.safetensors", CPU)
    module, tensors, card = load_autoencoder(path, CPU)
    assert card.latents.channels == module.reducer.channels
    assert card.latents.grid == ((4, 4) if "reducer.merge=2" in overrides else (8, 8))
    assert all(torch.equal(tensors[f"autoencoder.{k}"], v) for k, v in module.state_dict().items())
    report = json.loads((tmp_path / "r.latents.json").read_text())
    assert report["std"] == pytest.approx([1] * module.reducer.channels, abs=0.02)
    assert 1 <= report["effective_rank"] <= module.reducer.channels
    assert (tmp_path / "r.latents.png").stat().st_size


def test_a_reducer_that_cannot_be_made_is_refused_before_anything_is_written(
    scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(VugenError, match="PCA of 32 values has no more"):
        train_reducer(
            changed(tiny_recipe, "reducer.kind=pca", "reducer.channels=99"),
            scenes,
            tmp_path / "r.safetensors",
            CPU,
        )
    assert not list(tmp_path.iterdir())
