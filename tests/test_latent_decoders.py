"""The VAE, the LDM decoder and the baseline that samples VAE latents: the same line as PDD's."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_networks import wake
from test_training import changed, metrics

from vugen_cli.card import LatentsCard
from vugen_cli.checkpoint import fingerprint, load_checkpoint, read_card
from vugen_cli.data.loader import Batch, ShardedImages, held_out_images
from vugen_cli.errors import VugenError
from vugen_cli.models.latent_decoder import LatentDecoder
from vugen_cli.models.vae import FrozenVAE
from vugen_cli.recipe import Decoder, Recipe, load_recipe
from vugen_cli.sampling.trained import decode_images, load_autoencoder, load_sampler, load_vae
from vugen_cli.stages.distill import distill
from vugen_cli.stages.losses import picture_losses
from vugen_cli.stages.train_reducer import train_reducer
from vugen_cli.stages.train_sampler import train_sampler
from vugen_cli.stages.train_vae import VAETraining, train_vae
from vugen_cli.vlm.frozen import FrozenVLM

CPU = torch.device("cpu")
SIZES = {"channels": [8, 16], "heads": 2, "middle_layers": 2, "patch": 2}


@pytest.fixture(scope="module")
def vae_path(scenes: Path, tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE of 20 steps that makes 8 x 8 places of 64 px."""
    recipe = changed(
        tiny_recipe,
        "vae.widths=[8,8,8,16]", "vae.channels=6", "train_vae.steps=20", "train_vae.batch_size=4",
        "train_vae.lr=3e-3", "train_vae.warmup=1", "train_vae.precision=float32",
    )  # fmt: skip
    return train_vae(recipe, scenes, tmp_path_factory.mktemp("vae") / "vae", CPU)


@pytest.fixture(scope="module")
def vae(vae_path: Path) -> FrozenVAE:
    return load_vae(str(vae_path), CPU)


def test_the_vae_learns_and_its_latents_are_normalised(vae: FrozenVAE, vae_path: Path, scenes: Path) -> None:
    losses = [row["pixels"] for row in metrics(vae_path.with_name("vae.run"))]
    assert sum(losses[10:]) / 10 < 0.85 * sum(losses[:3]) / 3
    images = held_out_images(ShardedImages(scenes), 64)
    latents = vae.encode(images)
    assert latents.shape == (8, 6, 8, 8) and vae.factor == 8
    assert latents.mean().abs() < 0.5 and 0.5 < latents.std() < 2
    assert vae.decode(latents).shape == (8, 3, 64, 64)
    assert not any(p.requires_grad for p in vae.model.parameters())


def test_a_vae_can_learn_how_its_picture_looks_to_the_vlm_which_learns_nothing(
    vlm: FrozenVLM, scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = changed(
        tiny_recipe, "vae.widths=[8,8,8,16]", "vae.losses.perceptual=0.5",
        "train_vae.steps=3", "train_vae.batch_size=2", "train_vae.precision=float32",
    )  # fmt: skip
    before = fingerprint(vlm.model)
    training = VAETraining(recipe.vae, picture_losses(recipe.vae.losses, vlm, 64, CPU), vlm)
    batch = Batch(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), ["", ""], [{}, {}], 0)
    total, values = training.loss(batch, torch.Generator().manual_seed(0), 0)
    expected = values["pixels"] + recipe.vae.kl * values["kl"] + 0.5 * values["perceptual"]
    assert torch.allclose(total, expected)
    values["perceptual"].backward()
    assert all(p.grad is not None and p.grad.any() for p in training.model.encoder.conv_in.parameters())
    assert all(p.grad is None for p in vlm.model.parameters()) and fingerprint(vlm.model) == before
    train_vae(recipe, scenes, tmp_path / "vae", CPU)
    assert all(row["perceptual"] > 0 for row in metrics(tmp_path / "vae.run"))


@pytest.mark.parametrize("denoiser", ["unet", "dit"])
def test_gradients_reach_the_denoiser_and_decoding_does_not_depend_on_company(
    denoiser: str, vae: FrozenVAE
) -> None:
    torch.manual_seed(0)
    decoder = wake(LatentDecoder(Decoder(kind="ldm", denoiser=denoiser, vae="x", **SIZES), 4, vae))  # type: ignore[arg-type]
    assert isinstance(decoder, LatentDecoder)
    assert not set(map(id, vae.model.parameters())) & set(map(id, decoder.parameters()))
    latents = torch.randn(3, 4, 4, 4, requires_grad=True)
    decoder(torch.randn(3, 6, 8, 8), torch.rand(3), latents).square().mean().backward()
    assert latents.grad is not None and latents.grad.any()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and (parameter.grad.any() or name.endswith("to_k.bias")), name
    noise = torch.randn(3, 3, 64, 64)
    together = decoder.decode(latents.detach(), noise, 3)
    alone = [decoder.decode(a[None], b[None], 3) for a, b in zip(latents.detach(), noise, strict=True)]
    assert (together.int() - torch.cat(alone).int()).abs().max() <= 1
    assert torch.equal(together, decoder.decode(latents.detach(), noise, 3))
    assert not torch.equal(together, decoder.decode(latents.detach() + 1, noise, 3))
    decoder.recipe = decoder.recipe.model_copy(update={"shift": 5.0})
    assert not torch.equal(together, decoder.decode(latents.detach(), noise, 3)), (
        "steps are where training was"
    )


def test_a_training_step_of_the_dit_throws_no_dice_of_its_own(vae: FrozenVAE) -> None:
    decoder = LatentDecoder(Decoder(kind="ldm", denoiser="dit", vae="x", **SIZES), 4, vae).train()  # type: ignore[arg-type]
    wake(decoder).train()
    x, t, latents = torch.randn(16, 6, 8, 8), torch.rand(16), torch.randn(16, 4, 4, 4)
    assert torch.equal(decoder(x, t, latents), decoder(x, t, latents))


def test_the_whole_line_runs_on_latent_diffusion_without_the_vaes_files(
    vae_path: Path, vae: FrozenVAE, scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    kept = tmp_path / "vae"
    shutil.copytree(vae_path, kept)
    recipe = changed(
        tiny_recipe, "decoder.kind=ldm", f"decoder.vae={kept}",
        "train_reducer.steps=2", "train_sampler.steps=2",
    )  # fmt: skip
    reducer = train_reducer(recipe, scenes, tmp_path / "r.safetensors", CPU)
    shutil.rmtree(kept)
    tensors, card = load_checkpoint(reducer)
    assert {name.split(".")[0] for name in tensors} == {"autoencoder", "vae"}
    assert card.vae and card.vae.fingerprint == fingerprint(vae.model)
    sampler = load_sampler(train_sampler(recipe, reducer, scenes, tmp_path / "s.safetensors", CPU))
    (_, _, picture) = next(sampler.sample(["a bear"]))
    assert picture.shape == (3, 64, 64) and picture.dtype == torch.uint8
    student = distill(changed(recipe, "decoder.steps=2"), reducer, scenes, tmp_path / "d.safetensors", CPU)
    assert load_sampler(tmp_path / "s.safetensors", decoder=student).decoder.recipe.steps == 1


def test_a_decoder_goes_on_with_the_vae_it_began_with_wherever_that_lies(
    vae_path: Path, scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    ways = ("decoder.kind=ldm", "train_reducer.batch_size=2", "train_reducer.steps=1")
    recipe, out = changed(tiny_recipe, *ways, f"decoder.vae={vae_path}"), tmp_path / "r.safetensors"
    train_reducer(recipe, scenes, out, CPU)
    moved = Path(shutil.copytree(vae_path, tmp_path / "vae"))
    longer = changed(recipe, f"decoder.vae={moved}", "train_reducer.steps=2")
    assert read_card(train_reducer(longer, scenes, out, CPU)).step == 2
    weights = moved / "diffusion_pytorch_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(VugenError, match=r"other settings \(vae: [0-9a-f]+ -> "):
        train_reducer(changed(longer, "train_reducer.steps=3"), scenes, out, CPU)


def test_a_vae_learns_from_the_recipes_mixture(scenes: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = changed(
        tiny_recipe, f"data.mixture=[{{path: {scenes}}}, {{path: {scenes}, weight: 2}}]",
        "vae.widths=[8,8]", "train_vae.steps=1", "train_vae.batch_size=2",
    )  # fmt: skip
    train_vae(recipe, None, tmp_path / "vae", CPU)
    assert (tmp_path / "vae" / "config.json").is_file()


def test_the_baseline_samples_the_vaes_latents(
    vae_path: Path, vae: FrozenVAE, vlm: FrozenVLM, scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = changed(
        tiny_recipe, "reducer.kind=vae", "reducer.merge=2", f"decoder.vae={vae_path}",
        "train_sampler.steps=2", "train_sampler.repa=0.5",  # whose teacher is the VLM's z here too
    )  # fmt: skip
    reducer = train_reducer(recipe, scenes, tmp_path / "r.safetensors", CPU)
    module, _, card = load_autoencoder(reducer, CPU)
    assert card.latents == LatentsCard(channels=24, grid=(4, 4), width=6) and card.step == 0
    assert json.loads((tmp_path / "r.latents.json").read_text())["std"] == pytest.approx([1] * 24, abs=0.05)
    images = held_out_images(ShardedImages(scenes), 64)
    decoded = decode_images(vlm, module, images, seed=0)
    direct = vae.decode(vae.encode(images))
    assert (decoded.float() - (direct * 127.5 + 127.5).clamp(0, 255)).abs().max() <= 1
    sampler = load_sampler(train_sampler(recipe, reducer, scenes, tmp_path / "s.safetensors", CPU))
    assert "repa" in metrics(tmp_path / "s.run")[0]
    assert next(sampler.sample(["a bear"]))[2].shape == (3, 64, 64)
    with pytest.raises(VugenError, match="decodes with a VAE, in one call already"):
        distill(recipe, reducer, scenes, tmp_path / "d.safetensors", CPU)


def test_what_does_not_fit_is_one_line(
    vae_path: Path, vlm_path: Path, scenes: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(VugenError, match="decoder.vae is missing: name a VAE"):
        load_recipe(None, ["decoder.kind=ldm"])
    with pytest.raises(VugenError, match="decoder.losses see pixels"):
        load_recipe(None, ["decoder.kind=ldm", "decoder.vae=x", "decoder.losses.repa=1"])
    with pytest.raises(VugenError, match="no VAE at ./nowhere"):
        load_vae("./nowhere", CPU)
    with pytest.raises(VugenError, match="decoder.vae: some/vae is not a local directory and the hub"):
        load_vae("some/vae", CPU)
    with pytest.raises(VugenError, match="could not be loaded as an AutoencoderKL"):
        load_vae(str(vlm_path), CPU)
    damaged = tmp_path / "damaged"
    shutil.copytree(vae_path, damaged)
    (weights,) = damaged.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(VugenError, match="could not be loaded as an AutoencoderKL"):
        load_vae(str(damaged), CPU)
    wide = SimpleNamespace(channels=49, factor=4)
    with pytest.raises(VugenError, match="49 channels at 1 / 4 of the size holds more numbers"):
        LatentDecoder(Decoder(kind="ldm", vae="x"), 8, wide)  # type: ignore[arg-type]
    recipe = changed(tiny_recipe, "decoder.kind=ldm", f"decoder.vae={vae_path}", "decoder.image_size=40")
    with pytest.raises(VugenError, match="needs a multiple of 16"):
        train_reducer(recipe, scenes, tmp_path / "r.safetensors", CPU)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_pipelines_directory_works_too(vae_path: Path, tmp_path: Path) -> None:
    shutil.copytree(vae_path, tmp_path / "pipeline/vae")
    assert load_vae(str(tmp_path / "pipeline"), CPU).channels == 6
