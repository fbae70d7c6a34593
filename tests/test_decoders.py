"""Decoders: presets, losses beside flow matching, solvers."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_card
from test_networks import SMALL, wake
from test_training import changed, metrics

from vugen_cli.checkpoint import load_checkpoint
from vugen_cli.errors import VugenError
from vugen_cli.metrics.lpips import unit_length
from vugen_cli.models.autoencoder import Autoencoder
from vugen_cli.models.pixel_decoder import PixelDecoder, enlarged, fit_last_layer, smoothed, to_uint8
from vugen_cli.recipe import PRESETS, Decoder, DecoderLosses, Recipe, load_recipe
from vugen_cli.sampling.trained import load_autoencoder
from vugen_cli.stages.losses import (
    Alignment,
    VisionFeatures,
    cosine_distance,
    misalignment,
    picture_losses,
    reducer_loss,
)
from vugen_cli.stages.train_reducer import train_reducer
from vugen_cli.vlm.frozen import FrozenVLM, load_vlm

CPU = torch.device("cpu")
MILLIONS = {"S": 13.4, "B": 20, "M": 48, "L": 85}  # SSDD, arXiv 2510.04961
COUNTS = {"nano": 4_649_324, "S": 13_570_900, "B": 20_589_160, "M": 49_444_572, "L": 87_778_252}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_documented_sizes(name: str) -> None:
    with torch.device("meta"):
        decoder = PixelDecoder(Decoder(preset=name), 16)  # type: ignore[arg-type]
    count = sum(p.numel() for p in decoder.parameters())
    assert count == COUNTS[name] and decoder.multiple == 8
    assert name == "nano" or count / 1e6 == pytest.approx(MILLIONS[name], rel=0.05)
    page = (Path(__file__).parent.parent / "docs/decoders.md").read_text()
    assert f"| {name} | {count:,} |" in page


def test_a_preset_fills_in_what_is_not_given_and_replaces_a_files_sizes() -> None:
    assert Decoder(preset="S").heads == 3 and Decoder(preset="S", heads=2).heads == 2
    stored = Decoder(preset="S").model_dump()
    assert Decoder.model_validate(stored) == Decoder(preset="S")
    assert load_recipe("nano", ["decoder.preset=L"]).decoder.channels[-1] == 512
    recipe = load_recipe("nano", ["decoder.preset=L", "decoder.channels=[8, 16]", "decoder.heads=2"])
    assert recipe.decoder.channels == [8, 16] and recipe.decoder.middle_layers == 8


def test_the_shipped_recipes_have_the_sizes_they_had() -> None:
    assert load_recipe("nano").decoder.channels == [96, 160]
    assert load_recipe("imagenet-256").decoder.channels == [96, 192, 384]


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 4, 20, 25, 50])
def test_every_solver_ends_on_the_clean_picture_of_a_perfect_decoder(solver: str, steps: int) -> None:
    """A network that always predicts the same picture has a straight path: any solver must land on it."""
    decoder = PixelDecoder(SMALL, 4).eval()  # its last convolution starts at zero: it predicts its bias
    with torch.no_grad():
        decoder.conv_out.bias.fill_(0.5)
        noise, latents = torch.randn(2, 3, 16, 16), torch.randn(2, 2, 2, 4)
        reached = decoder.integrate(latents, noise, steps, solver)  # type: ignore[arg-type]
    assert torch.allclose(reached, torch.full_like(reached, 0.5), atol=1e-5)


def test_the_last_step_ends_on_what_the_decoder_last_predicted() -> None:
    torch.manual_seed(0)
    decoder = wake(PixelDecoder(SMALL, 4)).eval()
    noise, latents, predicted = torch.randn(1, 3, 16, 16), torch.randn(1, 2, 2, 4), []

    def keep(_: object, given: tuple[torch.Tensor, ...], velocity: torch.Tensor) -> None:
        predicted.append(given[0] + (1 - given[1]) * velocity)

    with decoder.register_forward_hook(keep), torch.no_grad():
        reached = decoder.integrate(latents, noise, 50, "euler")  # type: ignore[operator]
    assert (predicted[-1] - predicted[-2]).abs().max() > 1e-3
    assert torch.allclose(reached, predicted[-1], atol=1e-5)


def test_decoding_takes_its_steps_where_training_drew_its_times() -> None:
    decoder = PixelDecoder(SMALL.model_copy(update={"shift": 3.0}), 4).eval()
    noise, latents, times = torch.randn(1, 3, 16, 16), torch.randn(1, 2, 2, 4), []
    with decoder.register_forward_pre_hook(lambda _, given: times.append(given[1].item())):
        decoder.decode(latents, noise, 4)  # type: ignore[operator]
    assert times == pytest.approx([0, 1 / 10, 1 / 4, 1 / 2])  # t / (t + 3 (1 - t)) of 0, 1/4, 1/2, 3/4


def test_midpoint_is_refused_for_pixels_and_an_old_card_that_says_it_takes_heun() -> None:
    with pytest.raises(VugenError, match=r"decoder\.solver=midpoint.* past which .* take heun"):
        load_recipe("nano", ["decoder.solver=midpoint"])
    noise, latents = torch.randn(1, 3, 16, 16), torch.randn(1, 2, 2, 4)
    with pytest.raises(VugenError, match=r"decoder\.solver=midpoint"):
        PixelDecoder(SMALL, 4).decode(latents, noise, 3, "midpoint")
    assert make_card(recipe={"decoder": {"solver": "midpoint"}}).recipe == {"decoder": {"solver": "heun"}}
    latent = {"decoder": {"kind": "ldm", "solver": "midpoint"}}
    assert make_card(recipe=latent).recipe == latent


def test_the_recipes_solver_is_the_default() -> None:
    torch.manual_seed(0)
    decoder = wake(PixelDecoder(SMALL.model_copy(update={"solver": "heun"}), 4))
    noise, latents = torch.randn(1, 3, 16, 16), torch.randn(1, 2, 2, 4)
    default = decoder.decode(latents, noise, 3)  # type: ignore[operator]
    assert torch.equal(default, decoder.decode(latents, noise, 3, "heun"))  # type: ignore[operator]
    assert not torch.equal(default, decoder.decode(latents, noise, 3, "euler"))  # type: ignore[operator]


def test_smoothing_evens_out_parts_of_a_level_and_keeps_edges_and_means() -> None:
    torch.manual_seed(0)
    true = torch.zeros(2, 3, 32, 32)
    true[..., 16:] = 40 / 127.5
    noisy = true + 0.3 / 127.5 * torch.randn(true.shape)
    even = smoothed(noisy, 3.0)
    assert (even - true).std() < 0.5 * (noisy - true).std()
    assert torch.allclose(even.mean((2, 3)), noisy.mean((2, 3)), atol=1e-6)
    assert (even - true)[..., 14:18].abs().max() < 1.2 / 127.5  # no step of the 40 levels has flowed off
    whole = torch.full_like(true, 0.3)
    assert torch.equal(smoothed(whole, 3.0), whole)


def test_smoothing_follows_perona_and_malik() -> None:
    """One row of three pixels, of which two differ by as much as `levels`, in float64 by hand."""
    step = 3.0 / 127.5
    row = torch.tensor([0.0, 0.0, step], dtype=torch.float64)
    x = row.tolist()
    for _ in range(4):
        flow = [(b - a) * math.exp(-(((b - a) / step) ** 2)) for a, b in pairwise(x)]
        x = [x[0] + flow[0] / 5, x[1] + (flow[1] - flow[0]) / 5, x[2] - flow[1] / 5]
    assert smoothed(row.expand(1, 3, 1, 3), 3.0)[0, 0, 0].tolist() == pytest.approx(x, rel=1e-12)


def test_a_decoder_smooths_its_pictures_where_its_recipe_says_so() -> None:
    decoder = wake(PixelDecoder(SMALL, 4))
    noise, latents = torch.randn(2, 3, 32, 32), torch.randn(2, 4, 4, 4)
    plain = decoder.decode(latents, noise, steps=2)
    with torch.no_grad():
        end = decoder.integrate(latents, noise, 2, "euler")
    decoder.recipe = SMALL.model_copy(update={"smoothing": 40.0})
    assert torch.equal(decoder.decode(latents, noise, steps=2), to_uint8(smoothed(end, 40.0)))
    assert torch.equal(plain, to_uint8(end)) and not torch.equal(plain, to_uint8(smoothed(end, 40.0)))


# --- losses beside flow matching ---


def test_the_gradient_loss_forgives_another_brightness_and_counts_each_step_that_is_not_there() -> None:
    (weight, of_gradient) = picture_losses(DecoderLosses(gradient=0.5), None, 8, CPU)["gradient"]
    true = torch.rand(2, 3, 8, 8)
    assert weight == 0.5 and float(of_gradient(true + 0.25, true, true)) < 1e-6
    stepped = true.clone()
    stepped[..., 4:] += 1.0  # one of seven steps a row is wrong by 1, and none of a column
    assert float(of_gradient(stepped, true, true)) == pytest.approx(1 / 7 / 2, rel=1e-5)


@pytest.mark.parametrize("size", [64, 96])
def test_differentiable_features_are_those_of_the_vlm(vlm: FrozenVLM, size: int) -> None:
    see = VisionFeatures(vlm)
    see.check(size)
    images = see._example(size)
    assert cosine_distance(see(images.float() / 127.5 - 1), vlm.encode(images)) < (
        1e-6 if size == 64 else 1e-3
    )
    pixels = torch.zeros(1, 3, size, size, requires_grad=True)
    see(pixels).square().mean().backward()
    assert pixels.grad is not None and pixels.grad.any()
    assert all(p.grad is None for p in vlm.model.parameters())


def test_differentiable_features_are_those_of_the_size_that_the_recipe_shows_the_vlm(vlm_path: Path) -> None:
    VisionFeatures(load_vlm(str(vlm_path), recipe=Recipe(vlm_size=128))).check(64)


def test_a_processor_that_does_something_else_is_refused(
    vlm: FrozenVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(vlm, "read", lambda *_: None.device)  # type: ignore[attr-defined]
        with pytest.raises(VugenError, match="does more than resize"):
            VisionFeatures(vlm).check(64)
    monkeypatch.setattr(vlm, "encode", lambda images: torch.randn(1, 8, 8, 32))
    with pytest.raises(VugenError, match=r"does more than resize and normalise.*perceptual=0"):
        VisionFeatures(vlm).check(64)


def test_missing_lpips_weights_are_one_line(
    vlm: FrozenVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(VugenError, match=r"LPIPS needs .*vgg16-397923af.pth"):
        picture_losses(DecoderLosses(lpips=1.0), vlm, 64, CPU)


def test_lpips_is_zero_for_equal_pictures_and_has_a_gradient(
    vlm: FrozenVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights in the two files; their values are torch-fidelity's business."""
    from torchvision.models import vgg16

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub/checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in vgg16().state_dict().items()}
    # the classifier is 90% of the file and not used: one stored row stands for all of it
    weights = {
        name: torch.randn(1, *shape[1:]).expand(shape) if "classifier" in name else 0.05 * torch.randn(shape)
        for name, shape in shapes.items()
    }
    torch.save(weights, folder / "vgg16-397923af.pth")
    lins = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(lins, folder / "weights-vgg16-lpips.pth")
    (_, lpips) = picture_losses(DecoderLosses(lpips=1.0), vlm, 64, CPU)["lpips"]
    a, b = torch.rand(2, 3, 32, 32) - 0.5, (torch.rand(2, 3, 32, 32) - 0.5).requires_grad_()
    assert lpips(a, a, a) == 0
    distance = lpips(b, a, a)
    distance.backward()
    assert distance > 0 and b.grad is not None and b.grad.any()


def test_lpips_has_a_gradient_where_all_channels_are_dead() -> None:
    x = torch.randn(2, 3, 4, 4)
    x[:, :, 1, 2] = 0
    x.requires_grad_()
    scaled = unit_length(x)
    assert torch.allclose(scaled.norm(dim=1)[:, 0], torch.ones(2, 4)) and not scaled[:, :, 1, 2].any()
    scaled.square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_alignment_is_zero_where_the_head_tells_z() -> None:
    torch.manual_seed(0)
    told = Alignment(6, 5)(torch.randn(2, 4, 4, 6))
    assert misalignment(told, told).item() == pytest.approx(0, abs=1e-6)
    assert misalignment(told, -told).item() == pytest.approx(2, abs=1e-6)
    assert misalignment(told, torch.randn(2, 8, 8, 5)).item() > 0.2
    # Where z is finer, as under a reducer that merges places, the mean of a place's four is asked for.
    coarse, spread = torch.randn(2, 2, 2, 5), torch.tensor([[1.0, -1.0], [-2.0, 2.0]])
    fine = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2) + spread.repeat(2, 2)[..., None]
    assert misalignment(coarse, fine).item() == pytest.approx(0, abs=1e-6)


def test_every_term_reaches_reducer_and_decoder_and_none_the_vlm(vlm: FrozenVLM, tiny_recipe: Recipe) -> None:
    recipe = changed(
        tiny_recipe, "decoder.losses.perceptual=0.3", "decoder.losses.repa=0.7", "reducer.normalise=kl"
    )
    torch.manual_seed(0)
    module = Autoencoder(recipe, 32)
    module.alignment = Alignment(recipe.decoder.channels[-1], 32)
    wake(module).train()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    pictures = picture_losses(recipe.decoder.losses, vlm, 64, CPU)

    def loss() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return reducer_loss(
            module, vlm.encode(images), images, recipe, torch.Generator().manual_seed(0), pictures
        )

    total, values = loss()
    assert list(values) == ["flow", "perceptual", "repa", "kl"]
    expected = values["flow"] + 0.3 * values["perceptual"] + 0.7 * values["repa"] + 1e-3 * values["kl"]
    assert torch.allclose(total, expected)
    for name in values:
        module.zero_grad()
        loss()[1][name].backward()
        reached = {
            n.split(".")[0] for n, p in module.named_parameters() if p.grad is not None and p.grad.any()
        }
        assert reached >= ({"reducer"} if name == "kl" else {"reducer", "decoder"}), name
    assert all(p.grad is None for p in vlm.model.parameters())


def test_a_run_with_every_term_leaves_a_checkpoint_without_the_head(
    scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = changed(tiny_recipe, "decoder.losses.perceptual=1", "decoder.losses.repa=0.5")
    path = train_reducer(recipe, scenes, tmp_path / "r.safetensors", CPU)
    assert {"flow", "perceptual", "repa"} <= set(metrics(tmp_path / "r.run")[0])
    assert not any("alignment" in name for name in load_checkpoint(path)[0])
    load_autoencoder(path, CPU)


# --- larger pictures ---


@pytest.mark.parametrize("factor", [2, 3])
def test_an_enlarged_decoder_paints_each_pixel_of_the_smaller_one_several_times(factor: int) -> None:
    torch.manual_seed(0)
    recipe = Decoder(patch=2, channels=[8, 16], blocks=1, middle_layers=1, heads=2)
    small = wake(PixelDecoder(recipe, 4)).eval()
    large = PixelDecoder(recipe.model_copy(update={"patch": 2 * factor}), 4).eval()
    large.load_state_dict(enlarged(small.state_dict(), 2, factor))

    def larger(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)

    noised, t, latents = torch.randn(2, 3, 16, 16), torch.rand(2), torch.randn(2, 4, 4, 4)
    expected = small(noised, t, latents)
    assert expected.abs().max() > 0.1
    assert torch.allclose(large(larger(noised), t, latents), larger(expected), atol=1e-4)


def test_the_last_layer_is_fitted_to_the_pixels_that_one_such_layer_paints() -> None:
    torch.manual_seed(0)
    recipe = Decoder(patch=2, channels=[8, 16], blocks=1, middle_layers=1, heads=2)
    painter = wake(PixelDecoder(recipe, 4)).eval()
    with torch.no_grad():  # for it to ignore its noise, and to stay within the range of pixels
        painter.conv_in.weight[:, :12] = 0
        painter.conv_out.weight *= 0.1
    latents = torch.randn(32, 4, 4, 4)
    images = painter.decode(latents, torch.zeros(32, 3, 16, 16), steps=1)
    learner = PixelDecoder(recipe, 4).eval()
    learner.load_state_dict(painter.state_dict())
    with torch.no_grad():
        learner.conv_out.weight.normal_()
    fit_last_layer(learner, [(latents[:16], images[:16]), (latents[16:], images[16:])], seed=0)
    again = learner.decode(latents, torch.randn(32, 3, 16, 16), steps=1)
    assert images.float().std() > 5 and (again.int() - images.int()).abs().max() <= 2


def test_outer_layers_alone_are_trained_for_larger_pictures_and_the_others_stay_to_the_bit(
    trained: Path, scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    kept = trained / "reducer.safetensors"
    patch, outer = tiny_recipe.decoder.patch, ("decoder.trained=outer", "train_reducer.optimizer=adamw")
    smaller = changed(tiny_recipe, f"decoder.patch={patch // 2}", *outer)
    larger = changed(tiny_recipe, f"decoder.patch={2 * patch}", "decoder.image_size=128", *outer)
    before, _ = load_checkpoint(kept)
    after, _ = load_checkpoint(train_reducer(larger, scenes, tmp_path / "l.safetensors", CPU, kept))
    differ = {name.split(".")[2] for name in before if not before[name].equal(after[name])}
    assert differ == {"conv_in", "up", "norm_out", "conv_out"}
    with pytest.raises(VugenError, match="give that too"):
        train_reducer(larger, scenes, tmp_path / "x.safetensors", CPU)
    with pytest.raises(VugenError, match=r"draws 128 px with decoder\.patch=\d+, and the images have 64"):
        train_reducer(
            changed(larger, "decoder.image_size=null"), scenes, tmp_path / "x.safetensors", CPU, kept
        )
    for other in (smaller, changed(larger, "decoder.channels=[8,24]")):
        with pytest.raises(VugenError, match=r"reducer\.safetensors is no pdd, or differs in more"):
            train_reducer(other, scenes, tmp_path / "x.safetensors", CPU, kept)


# --- the weight of flow matching over time ---


def flow_loss(
    recipe: Recipe, error: float, t: float, monkeypatch: pytest.MonkeyPatch, draw: Any = None
) -> float:
    """Stage 1's loss at one time, for a decoder whose clean prediction is off by `error` everywhere."""
    images = torch.full((1, 3, 16, 16), 127, dtype=torch.uint8)
    module = Autoencoder(recipe, 8)
    with torch.no_grad():
        module.decoder.conv_out.bias.fill_(error + 127 / 127.5 - 1)  # type: ignore[operator,union-attr]
    monkeypatch.setattr("vugen_cli.stages.losses.draw_times", draw or (lambda *_: torch.tensor([t])))
    z, generator = torch.randn(1, 2, 2, 8), torch.Generator().manual_seed(0)
    return reducer_loss(module.eval(), z, images, recipe, generator, {})[0].item()


@pytest.mark.parametrize(("weighting", "power"), [("velocity", 2), ("balanced", 1), ("clean", 0)])
def test_the_weighting_is_that_of_the_clean_predictions_square(
    weighting: str, power: int, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(tiny_recipe, f"decoder.weighting={weighting}")
    for t in (0.0, 0.5, 0.9, 0.99):
        loss = flow_loss(recipe, 0.2, t, monkeypatch)
        far = max(1 - t, 0.05) if power == 2 else 1 - t  # the velocity's weight is held below 400
        assert loss == pytest.approx(0.04 / far**power, rel=1e-3)


@pytest.mark.parametrize("weighting", ["velocity", "balanced", "clean"])
@pytest.mark.parametrize("t", [0.5, 0.99, 1.0])
def test_the_loss_is_least_for_the_true_picture_even_at_the_end(
    weighting: str, t: float, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(tiny_recipe, f"decoder.weighting={weighting}")
    assert flow_loss(recipe, 0.0, t, monkeypatch) == pytest.approx(0, abs=1e-4)


def test_a_card_without_a_weighting_was_trained_on_the_velocity() -> None:
    assert Decoder.model_validate({"kind": "pdd"}).weighting == "velocity"


def test_the_decoder_has_its_own_times_and_the_samplers_where_it_has_none(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: list[str] = []

    def draw(_count: int, kind: str, *_: object) -> torch.Tensor:
        kinds.append(kind)
        return torch.tensor([0.5])

    for override in ("decoder.time=null", "decoder.time=logit-normal"):
        recipe = changed(tiny_recipe, "flow.time=uniform", override)
        flow_loss(recipe, 0.2, 0.5, monkeypatch, draw)
    assert kinds == ["uniform", "logit-normal"]
