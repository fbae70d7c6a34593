"""From prompts to pictures: prompt -> prefix -> ODE in z̃ -> pixel decoder."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from vugen_cli.card import Card
from vugen_cli.engine.compiling import compile_layers
from vugen_cli.engine.distributed import blocks
from vugen_cli.engine.precision import passes
from vugen_cli.errors import VugenError
from vugen_cli.flow import Solver, at, solve
from vugen_cli.models.autoencoder import Autoencoder, ImageDecoder
from vugen_cli.models.dit_expert import DiTExpert
from vugen_cli.models.generation_expert import GenerationExpert
from vugen_cli.recipe import Sampling, parse_recipe
from vugen_cli.seeds import seeded_noise
from vugen_cli.vlm.frozen import FrozenVLM
from vugen_cli.vlm.prefix import Prefix

SAMPLE_BATCH = 8  # images drawn together
WIDTH = 32  # prompts are padded to a multiple of this many tokens


class Sampler:
    """A trained sampler, ready to draw.

    Attributes:
        vlm, expert: two of the networks.
        autoencoder: the reducer, and the decoder that draws.
        card: of its checkpoint.
        path: of its checkpoint.
        defaults: the recipe's sampling settings.
    """

    def __init__(
        self,
        vlm: FrozenVLM,
        expert: GenerationExpert | DiTExpert,
        autoencoder: Autoencoder,
        card: Card,
        path: str | Path,
    ):
        self.vlm, self.expert, self.autoencoder, self.card, self.path = (
            vlm,
            expert,
            autoencoder,
            card,
            Path(path),
        )
        recipe = parse_recipe(card.recipe, str(path))
        self.defaults: Sampling = recipe.sampling
        self.shift = recipe.flow.shift_of(card.latents.grid, card.latents.channels)
        self.passes = passes(recipe.sampling.precision, vlm.device)

    @property
    def decoder(self) -> ImageDecoder:
        """The pixel decoder."""
        return self.autoencoder.decoder

    def to(self, device: torch.device) -> None:
        """Move every network to a device."""
        self.vlm.model.to(device)
        self.vlm.device = device
        self.expert.to(device)
        self.autoencoder.to(device)
        self.__dict__.pop("unconditional", None)  # computed anew where it is needed

    def compile(self) -> None:
        """Compile the expert's layers: slow to begin, faster from then on; the last bits of pictures change.

        On GPUs the layers are replayed as CUDA graphs, which spares small experts the launching of kernels.
        """
        mode = "reduce-overhead" if self.vlm.device.type == "cuda" else None
        compile_layers(blocks(self.expert), must=True, training=False, mode=mode)
        if mode:
            # All layers of one pass belong to one round of graphs, whose memory the next pass takes.
            self.expert.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())

    def quantize(self) -> None:
        """Keep the matrices of the expert's and the VLM's layers in 8 bits, each row with a scale of its own.

        Products are taken in the precision of before, from what was rounded: less memory, other pictures.

        Raises:
            VugenError: `torchao` is not installed.
        """
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
        except ImportError as error:
            raise VugenError("--quantize needs torchao: pip install 'vugen-cli[quantize]'") from error
        for layer in blocks(self.expert) + blocks(self.vlm.model):
            quantize_(layer, Int8WeightOnlyConfig())
        self.__dict__.pop("unconditional", None)

    @cached_property
    def unconditional(self) -> Prefix:
        """The empty prompt's prefix, of one row."""
        return self._prefix("", WIDTH)

    def _prefix(self, prompt: str, width: int) -> Prefix:
        """What the expert reads of a prompt, padded to `width` tokens, of one row."""
        return self.vlm.prefix([prompt], width, hidden=self.expert.reads)

    def settings(
        self, steps: int | None = None, guidance: float | None = None, solver: Solver | None = None
    ) -> Sampling:
        """The given settings, with the recipe's where one is None."""
        given = {"steps": steps, "guidance": guidance, "solver": solver}
        return self.defaults.model_copy(update={key: v for key, v in given.items() if v is not None})

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        n: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        solver: Solver | None = None,
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Draw n images for each prompt.

        Image i of a prompt depends only on seed, prompt and i, from which its noise is derived; in the last
        bit of a pixel also on how many are drawn together, since products of matrices round by their shapes.
        Prompts are padded to a multiple of WIDTH, so that there are few shapes.

        Args:
            prompts: any texts; the empty one draws unconditionally.
            n: images for each.
            seed: of the noise.
            steps, guidance, solver: see `Sampling`; None takes the checkpoint's.

        Yields:
            (prompt number, image number, uint8 [3, S, S] on the CPU): prompts of like length together, each
            prompt's images in order.
        """
        settings = self.settings(steps, guidance, solver)
        kinds = [self.kind(prompt) for prompt in prompts]
        known: dict[str, Prefix] = {}  # of the prompts in the batch: one of many images is read once
        for kind in sorted(set(kinds)):
            jobs = iter([(p, i) for p in range(len(prompts)) if kinds[p] == kind for i in range(n)])
            while batch := list(islice(jobs, SAMPLE_BATCH)):
                keys = [(seed, prompts[p], i) for p, i in batch]
                images = self.draw_together(keys, settings, known)
                yield from ((p, i, image) for (p, i), image in zip(batch, images, strict=True))

    def kind(self, prompt: str) -> int:
        """Prompts of one kind can be drawn together: its tokens, rounded up to what it is padded to.

        Raises:
            VugenError: it is too long.
        """
        return -(-len(self.vlm.prompts.tokens(prompt)) // WIDTH) * WIDTH

    @torch.no_grad()
    def draw_together(
        self,
        keys: Sequence[tuple[int, str, int]],
        settings: Sampling,
        known: dict[str, Prefix] | None = None,
        each_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """Draw one batch of images, each with a seed of its own.

        Args:
            keys: (seed, prompt, image number) each; the prompts are of one kind.
            settings: of all of them.
            known: prefixes of prompts that were read before; afterwards those of this batch.
            each_step: called before each velocity; what it raises ends the drawing.

        Returns:
            uint8 [B, 3, S, S] on the CPU.
        """
        wanted = list(dict.fromkeys(prompt for _, prompt, _ in keys))
        width, before = self.kind(wanted[0]), known or {}
        with self.passes():
            prefixes = {prompt: before.get(prompt) or self._prefix(prompt, width) for prompt in wanted}
            rows = torch.tensor([wanted.index(prompt) for _, prompt, _ in keys], device=self.vlm.device)
            prefix = Prefix.join(list(prefixes.values())).rows(rows)
            latents = self.latents(prefix, keys, settings, each_step)
            size = self.card.image_size
            noise = torch.stack([seeded_noise((3, size, size), *key, "pixels") for key in keys])
            images = self.autoencoder.decode(latents, noise.to(latents.device)).cpu()
        if known is not None:
            known.clear()
            known.update(prefixes)
        return images

    def latents(
        self,
        prefix: Prefix,
        keys: Sequence[tuple[int, str, int]],
        settings: Sampling,
        each_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """Sample z̃ [B, h, w, c] for a batch of prefixes, with classifier-free guidance (arXiv 2207.12598)
        within `guidance_interval` (arXiv 2404.07724); `keys` and `each_step` as for `draw_together`.
        """
        grid, channels = self.card.latents.grid, self.card.latents.channels
        noise = torch.stack([seeded_noise((*grid, channels), *key, "latents") for key in keys]).to(
            self.vlm.device
        )
        scale, (first, last) = settings.guidance, settings.guidance_interval
        first_row = torch.zeros(len(noise), dtype=torch.long, device=noise.device)
        unconditional = self.unconditional.rows(first_row)

        def velocity(x: Tensor, t: float) -> Tensor:
            if each_step:
                each_step()
            conditional = self.expert(x, at(t, x), prefix)
            if scale == 1 or not first <= t < last:
                return conditional
            free = self.expert(x, at(t, x), unconditional)
            return free + scale * (conditional - free)

        return solve(velocity, noise, settings.steps, settings.solver, self.shift)
