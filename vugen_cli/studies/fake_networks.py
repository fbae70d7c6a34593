"""The networks of a recipe as fake tensors, built from configs alone, and the steps that train them."""

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vugen_cli.card import LatentsCard
from vugen_cli.data.loader import Batch
from vugen_cli.engine.distributed import blocks, recompute
from vugen_cli.errors import VugenError, first_line
from vugen_cli.flow import draw_times, flow_matching_loss
from vugen_cli.hub import may_be_id, reach_hub
from vugen_cli.metrics.lpips import LAYERS, lpips_of, vgg16
from vugen_cli.models.autoencoder import Autoencoder
from vugen_cli.models.dit_expert import DiTExpert
from vugen_cli.models.generation_expert import GenerationExpert
from vugen_cli.models.vae import FrozenVAE
from vugen_cli.recipe import PictureLosses, Recipe, Training
from vugen_cli.sampling.trained import new_expert
from vugen_cli.stages.losses import (
    Alignment,
    PictureLoss,
    VisionFeatures,
    cosine_distance,
    gradient_error,
    misalignment,
    reducer_loss,
)
from vugen_cli.stages.train_sampler import velocity_of
from vugen_cli.stages.train_vae import VAETraining
from vugen_cli.studies.fake_step import Cost, cost, faked, flops_of
from vugen_cli.vlm.configured import configured_vlm
from vugen_cli.vlm.frozen import FrozenVLM
from vugen_cli.vlm.pictured import picture_tokens
from vugen_cli.vlm.prefix import Prefix


class FakeNetworks:
    """The networks of a recipe; none has a weight in memory.

    Args:
        recipe: the whole run's.
        size: pixels a side of the images.
        prompt_tokens: of each prompt.
        gpu: as on a GPU; else as on a CPU, where the expert's attention is another.

    Attributes:
        vlm, autoencoder, expert: the networks.
        vae: None where the recipe names none.
        z, latents: shapes [h, w, d] and [h, w, c].
        shift: of the sampler's times.

    Raises:
        VugenError: a config is missing, or the networks do not fit each other.
    """

    def __init__(self, recipe: Recipe, size: int, prompt_tokens: int, gpu: bool = True):
        self.recipe, self.size, self.prompt_tokens, self.gpu = recipe, size, prompt_tokens, gpu
        self.generator = torch.Generator()
        meta = configured_vlm(recipe.vlm, recipe)
        self.vlm = FrozenVLM(meta.name, faked(meta.model), meta.processor, recipe, digests={})
        self.vae = FrozenVAE(faked(vae_model(recipe)), recipe.decoder.vae) if recipe.decoder.vae else None
        if recipe.reducer.kind == "vae" and self.vae:
            width, height, side = self.vae.encode(self.images(1)).shape[1:]
            self.z = [height, side, width]
        else:
            self.z = list(self.vlm.encode(self.images(1)).shape[1:])
        with torch.device("meta"):
            autoencoder = Autoencoder(recipe, self.z[2], self.vae)
            if recipe.decoder.losses.repa:
                autoencoder.alignment = Alignment(recipe.decoder.channels[-1], self.z[2])
        self.autoencoder: Autoencoder = faked(autoencoder, self.vae)
        grid = self.z[0] // recipe.reducer.merge, self.z[1] // recipe.reducer.merge
        latents = LatentsCard(channels=autoencoder.reducer.channels, grid=grid, width=self.z[2])
        self.latents = [*grid, latents.channels]
        self.shift = recipe.flow.shift_of(grid, latents.channels)
        with torch.device("meta"):
            expert = new_expert(meta, latents, recipe.expert)
        if recipe.train_sampler.repa:
            z = self.vlm.encode(self.images(1))
            with torch.device("meta"):
                expert.alignment = Alignment(expert.width, z.shape[-1])
        if not gpu and isinstance(expert, GenerationExpert):
            expert.decoder.set_attn_implementation("eager")
        self.expert: GenerationExpert | DiTExpert = faked(expert)
        if recipe.engine.recompute:
            recompute(blocks(self.expert))

    def images(self, count: int) -> Tensor:
        """Black images, uint8 [count, 3, size, size]."""
        return torch.zeros(count, 3, self.size, self.size, dtype=torch.uint8)

    def reducer_cost(self) -> Cost:
        """A step of stage 1."""
        pictures = self.picture_losses(self.recipe.decoder.losses)

        def step(count: int) -> Tensor:
            images = self.images(count)
            z = self.autoencoder.z(self.vlm, images)
            return reducer_loss(self.autoencoder, z, images, self.recipe, self.generator, pictures)[0]

        return self._cost(step, self.recipe.train_reducer, self.autoencoder)

    def sampler_cost(self, sources: int = 0) -> Cost:
        """A step of stage 2, from images; of edits with so many source pictures each."""
        flow = self.recipe.flow

        def step(count: int) -> Tensor:
            prefix, told = self.prefix(count, sources), list[Tensor]()
            target = self.encode(count)
            t = draw_times(count, flow.time, self.shift, self.generator)
            velocity = partial(velocity_of, self.expert, [list(range(count))], [prefix], told=told)
            loss = flow_matching_loss(velocity, target, t, self.generator)
            if not told:
                return loss
            # z is there, but where z̃ is a VAE's.
            vae = self.recipe.reducer.kind == "vae"
            z = self.vlm.encode(self.images(count)) if vae else torch.zeros(count, *self.z)
            return loss + misalignment(told[0], z)

        return self._cost(step, self.recipe.train_sampler, self.expert)

    def vae_cost(self, training: VAETraining) -> Cost:
        """A step of `vugen train-vae`; `training` is a fake `VAETraining`."""

        def step(count: int) -> Tensor:
            batch = Batch(self.images(count), [""] * count, [{}] * count, 0)
            return training.loss(batch, self.generator, 0)[0]

        return self._cost(step, self.recipe.train_vae, training)

    @torch.no_grad()
    def encode(self, count: int) -> Tensor:
        """z̃ of some images, as `prepare --latents` computes it."""
        self.autoencoder.eval()
        return self.autoencoder.encode(self.vlm, self.images(count))

    def encode_flops(self) -> float:
        """z̃ of an image."""
        return flops_of(self.encode)

    def prefix_flops(self) -> float:
        """Keys and values of a prompt."""
        return flops_of(self.prefix)

    def velocity_flops(self) -> float:
        """One evaluation of the expert while sampling, for one picture."""

        expert = self.expert.eval()

        def step(count: int) -> Tensor:
            return expert(torch.zeros(count, *self.latents), torch.zeros(count), self.prefix(count))

        return flops_of(step) - self.prefix_flops()

    def decode_flops(self) -> float:
        """One picture from z̃."""
        decoder = self.autoencoder.eval().decoder

        def step(count: int) -> Tensor:
            noise = torch.zeros(count, 3, self.size, self.size)
            return decoder.decode(torch.zeros(count, *self.latents), noise)

        return flops_of(step)

    def prefix(self, count: int, sources: int = 0) -> Prefix:
        """Of some prompts, with so many pictures each, as `sampler.read_prompts` computes it."""
        length = self.prompt_tokens
        if sources and self.expert.reference != "only":
            length += len(self._picture_tokens(count * sources)) // count
        prefix = self.vlm.prefix([[0] * length] * count, hidden=self.expert.reads)
        if not sources or not self.expert.reference:
            return prefix
        prefix.references = self.encode(count * sources).unflatten(0, (count, sources))
        prefix.referred = torch.ones(count, sources, dtype=torch.bool)
        return prefix

    @cached_property
    def picture_tokens(self) -> int:
        """Tokens of a picture in a prompt; those around it, which a chat template adds, are not counted.

        Raises:
            VugenError: the VLM's own code for pictures does not run without weights.
        """
        return len(self._picture_tokens(1))

    @torch.no_grad()
    def _picture_tokens(self, count: int) -> Tensor:
        try:
            return picture_tokens(self.vlm.model, self.vlm.processor.image_processor, self.images(count))
        except Exception as error:  # as many kinds as there are families
            raise VugenError(
                f"{self.vlm.name}: its work on source pictures is not known ({first_line(error)})"
            ) from error

    def _cost(self, step: Callable[[int], Tensor], settings: Training, module: nn.Module) -> Cost:
        module.train()
        return cost(step, module, in_bfloat16(settings), self.gpu)

    def picture_losses(self, weights: PictureLosses) -> dict[str, tuple[float, PictureLoss]]:
        """As `stages.losses.picture_losses`, without LPIPS's weights and without trying the processor."""
        losses: dict[str, tuple[float, PictureLoss]] = {}
        if weights.perceptual:
            see = VisionFeatures(self.vlm)
            losses["perceptual"] = (weights.perceptual, lambda x, _, z: cosine_distance(see(x), z))
        if weights.lpips:
            with torch.device("meta"):
                vgg = vgg16()
            convolutions: list[Any] = [vgg[layer - 1] for layer in LAYERS]
            lpips = lpips_of(faked(vgg), [torch.ones(1, c.out_channels, 1, 1) for c in convolutions], "cpu")
            losses["lpips"] = (weights.lpips, lambda x, y, _: lpips(x / 2 + 0.5, y / 2 + 0.5).mean())
        if weights.gradient:
            losses["gradient"] = (weights.gradient, lambda x, y, _: gradient_error(x, y))
        return losses


def vae_model(recipe: Recipe) -> Any:
    """The `AutoencoderKL` of a recipe on `meta`; where it is not there yet, the one that `train-vae` makes.

    Raises:
        VugenError: what is there is no `AutoencoderKL`, or the hub cannot be reached.
    """
    from diffusers import AutoencoderKL

    name = recipe.decoder.vae or ""
    if is_vae_to_train(recipe):
        with torch.device("meta"):
            return VAETraining(recipe.vae).model
    path = Path(name)
    if (path / "vae" / "config.json").is_file():
        path = path / "vae"
    local = path.is_dir() or not reach_hub(name, "decoder.vae:")
    try:
        config = AutoencoderKL.load_config(str(path) if path.is_dir() else name, local_files_only=local)
        with torch.device("meta"):
            return AutoencoderKL.from_config(config)
    except Exception as error:  # a foreign directory can fail in many ways
        raise VugenError(
            f"decoder.vae: {name} is not the config of an AutoencoderKL: {first_line(error)}"
        ) from error


def in_bfloat16(settings: Training) -> bool:
    """Whether a stage multiplies in bfloat16 on hardware that can."""
    return settings.precision in ("auto", "bfloat16")


def is_vae_to_train(recipe: Recipe) -> bool:
    """Whether the recipe names a VAE that is neither here nor a hub id."""
    name = recipe.decoder.vae
    return bool(name) and not Path(str(name)).is_dir() and not may_be_id(str(name))
