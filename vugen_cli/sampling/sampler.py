"""From prompts to pictures: prompt -> prefix -> ODE in z̃ -> pixel decoder."""

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from vugen_cli.card import Card
from vugen_cli.data.images import adm_crop, decode, opened
from vugen_cli.data.sample import MOST_SOURCES, PICTURE
from vugen_cli.data.shapes import Shape, as_shape, shape_name
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
from vugen_cli.vlm.prompts import Prompt, pictures_of

T = TypeVar("T")

SAMPLE_BATCH = 8  # images drawn together
WIDTH = 32  # prompts are padded to a multiple of this many tokens
Kind = tuple[int, bool, int]  # see `Sampler.kind`
Read = dict[
    str, tuple[Prefix, Prefix | None]
]  # what the expert reads of prompts, and of their pictures alone


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
        self.vlm, self.expert, self.autoencoder = vlm, expert, autoencoder
        self.card, self.path = card, Path(path)
        recipe = parse_recipe(card.recipe, str(path))
        self.defaults: Sampling = recipe.sampling
        self.shift = recipe.flow.shift_of(card.latents.grid, card.latents.channels)
        self._grids: dict[Shape, tuple[int, int]] = {}  # of z̃ for sizes that were drawn

    @property
    def passes(self) -> Callable[[], AbstractContextManager[Any]]:
        """Makes contexts in which it draws in its precision, on the device where it is now."""
        return passes(self.defaults.precision, self.vlm.device)

    @property
    def decoder(self) -> ImageDecoder:
        """The pixel decoder."""
        return self.autoencoder.decoder

    @property
    def learned_edits(self) -> bool:
        """Whether it was trained on edits, as far as the names of its data sets tell."""
        named = any(name.endswith("edits") for name in self.card.data.datasets)
        return bool(self.expert.reference) or named

    def to(self, device: torch.device) -> None:
        """Move every network to a device."""
        self.vlm.model.to(device)
        self.vlm.device = device
        self.expert.to(device)
        self.autoencoder.to(device)
        if self.autoencoder.vae:  # no part of the autoencoder's module
            self.autoencoder.vae.model.to(device)
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
        return self._prefix("", self.kind(Prompt(""))[-1])

    def _prefix(self, prompt: str | Prompt, width: int) -> Prefix:
        """What the expert reads of a prompt, padded to `width` tokens, of one row."""
        return read_prompts(self.vlm, self.expert, self.autoencoder, [prompt], width)

    def _prefixes(self, prompt: Prompt, width: int) -> tuple[Prefix, Prefix | None]:
        """What the expert reads of a prompt, and of its pictures alone if it has both text and pictures."""
        alone = Prompt("", prompt.pictures) if prompt.text and prompt.pictures else None
        return self._prefix(prompt, width), self._prefix(alone, width) if alone else None

    def settings(
        self,
        steps: int | None = None,
        guidance: float | None = None,
        solver: Solver | None = None,
        image_guidance: float | None = None,
    ) -> Sampling:
        """The given settings, with the recipe's where one is None.

        Raises:
            VugenError: a scale or number of steps that there is not.
        """
        given = {"steps": steps, "guidance": guidance, "solver": solver, "image_guidance": image_guidance}
        sampling = self.defaults.model_dump() | {key: v for key, v in given.items() if v is not None}
        return parse_recipe({"sampling": sampling}, "what to draw with").sampling

    def grid(self, size: int | Shape | None) -> tuple[Shape, tuple[int, int]]:
        """Height and width of the pictures to draw, and rows and columns of their z̃.

        Args:
            size: pixels a side, or (height, width); None: as its card says.

        Raises:
            VugenError: it cannot draw that size.
        """
        usual, latents = as_shape(self.card.image_size), self.card.latents
        shape = usual if size is None else as_shape(size)
        if shape == usual:
            return shape, latents.grid
        if isinstance(self.expert, GenerationExpert):
            raise VugenError(
                f"{self.path} draws {shape_name(usual)} alone: its expert, a copy of the VLM's decoder, "
                "learned the places of that grid; train one with expert.kind=dit for other sizes"
            )
        if shape not in self._grids:
            self._grids[shape] = self.autoencoder.grid(self.vlm, shape)
        if self._grids[shape] == latents.grid:
            raise VugenError(
                f"{self.path} draws {shape_name(usual)} alone: its VLM sees pictures of {shape_name(shape)} "
                f"as {latents.grid[1]} x {latents.grid[0]} places too"
            )
        return shape, self._grids[shape]

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str | Prompt],
        n: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        solver: Solver | None = None,
        image_guidance: float | None = None,
        size: int | Shape | None = None,
        there: Container[tuple[int, int]] = (),
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Draw n images for each prompt.

        Image i of a prompt depends only on seed, prompt and i, from which its noise is derived; in the last
        bit of a pixel also on how many are drawn together, since products of matrices round by their shapes.
        Prompts are padded to a multiple of WIDTH, so that there are few shapes.

        Args:
            prompts: any texts, with pictures as a `Prompt`; the empty one draws unconditionally. Pictures
                should be cut to `picture_shape`, as `open_picture` does: the expert learned from such.
            n: images for each.
            seed: of the noise.
            steps, guidance, solver, image_guidance: see `Sampling`; None takes the checkpoint's.
            size: see `grid`.
            there: prompt and image numbers of those that need not be drawn.

        Yields:
            (prompt number, image number, uint8 [3, H, W] on the CPU): prompts of like length together, each
            prompt's images in order.

        Raises:
            VugenError: at once, a prompt is too long, the VLM does not read pictures in a prompt, the size is
                none that it can draw, or there is an image guidance and no picture.
        """
        settings = self.settings(steps, guidance, solver, image_guidance)
        asked = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        if image_guidance is not None and not any(prompt.pictures for prompt in asked):
            raise VugenError("image guidance is by a prompt's pictures, and none is given: leave it out")
        kinds = [self.kind(prompt) for prompt in asked]
        self.grid(size)

        def drawn() -> Iterator[tuple[int, int, Tensor]]:
            known: Read = {}  # of the prompts in the batch: one of many images is read once
            for kind in sorted(set(kinds)):
                of_kind = ((p, i) for p in range(len(asked)) if kinds[p] == kind for i in range(n))
                jobs = (key for key in of_kind if key not in there)
                while batch := list(islice(jobs, SAMPLE_BATCH)):
                    keys = [(seed, asked[p], i) for p, i in batch]
                    images = self.draw_together(keys, settings, known, size=size)
                    yield from ((p, i, image) for (p, i), image in zip(batch, images, strict=True))

        return drawn()

    def kind(self, prompt: Prompt) -> Kind:
        """Prompts of one kind can be drawn together: they are guided alike and of one padded length.

        Returns:
            Its pictures, whether it has them and text, and its tokens, rounded up to what it is padded to.

        Raises:
            VugenError: it is too long, has too many pictures, places more or fewer than it has, or the VLM
                does not read them in a prompt.
        """
        prompt.parts()  # those that the expert reads by itself stand somewhere too
        if self.expert.reference and len(prompt.pictures) > MOST_SOURCES:
            raise VugenError(f"a prompt has {len(prompt.pictures)} pictures: give at most {MOST_SOURCES}")
        length = self.vlm.prompt_length(for_vlm(prompt, self.expert))
        return len(prompt.pictures), bool(prompt.pictures and prompt.text), -(-length // WIDTH) * WIDTH

    @torch.no_grad()
    def draw_together(
        self,
        keys: Sequence[tuple[int, Prompt, int]],
        settings: Sampling,
        known: Read | None = None,
        each_step: Callable[[], None] | None = None,
        size: int | Shape | None = None,
    ) -> Tensor:
        """Draw one batch of images, each with a seed of its own.

        Args:
            keys: (seed, prompt, image number) each; the prompts are of one kind.
            settings: of all of them.
            known: prompts that were read before, by their keys; afterwards those of this batch.
            each_step: called before each velocity; what it raises ends the drawing.
            size: see `grid`.

        Returns:
            uint8 [B, 3, H, W] on the CPU.

        Raises:
            VugenError: it cannot draw that size.
        """
        wanted = {prompt.key: prompt for _, prompt, _ in keys}
        first, before, (shape, grid) = keys[0][1], known or {}, self.grid(size)
        sides = {tuple(picture.shape[1:]) for picture in first.pictures} if self.expert.reference else set()
        if sides - {shape} and (grid != self.card.latents.grid or any(h != w for h, w in sides)):
            raise VugenError(
                f"{self.path} reads pictures as references, and learned from none of {shape_name(shape)}: "
                "leave the size out"
            )
        names, width = list(wanted), self.kind(first)[-1]
        if first.pictures and not first.text:  # they are all there is to guide by
            settings = settings.model_copy(update={"guidance": settings.image_guidance})
        with self.passes():
            read = {key: before.get(key) or self._prefixes(p, width) for key, p in wanted.items()}
            rows = torch.tensor([names.index(prompt.key) for _, prompt, _ in keys], device=self.vlm.device)
            prefix = Prefix.join([prefix for prefix, _ in read.values()]).rows(rows)
            alone = [pictures for _, pictures in read.values() if pictures]
            pictures = Prefix.join(alone).rows(rows) if alone else None
            noises = [(seed, prompt.key, i) for seed, prompt, i in keys]
            latents = self.latents(prefix, noises, settings, pictures, each_step, grid)
            noise = torch.stack([seeded_noise((3, *shape), *key, "pixels") for key in noises])
            images = self.autoencoder.decode(latents, noise.to(latents.device)).cpu()
        if known is not None:
            known.clear()
            known.update(read)
        return images

    def latents(
        self,
        prefix: Prefix,
        keys: Sequence[tuple[int, str, int]],
        settings: Sampling,
        pictures: Prefix | None = None,
        each_step: Callable[[], None] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Sample z̃ [B, h, w, c] for a batch of prefixes, with classifier-free guidance (arXiv 2207.12598)
        within `guidance_interval` (arXiv 2404.07724).

        Args:
            prefix: of the prompts.
            keys: (seed, prompt's key, image number) each.
            settings: steps, solver and scales.
            pictures: of the prompts' pictures alone, where prompts have pictures and text: each is then
                guided by a scale of its own (arXiv 2211.09800, eq. 3).
            each_step: see `draw_together`.
            grid: rows and columns of z̃; default as the card says.
        """
        grid, channels = grid or self.card.latents.grid, self.card.latents.channels
        noise = torch.stack([seeded_noise((*grid, channels), *key, "latents") for key in keys]).to(
            self.vlm.device
        )
        scale, (first, last) = settings.guidance, settings.guidance_interval
        first_row = torch.zeros(len(noise), dtype=torch.long, device=noise.device)
        unconditional = self.unconditional.rows(first_row)

        def velocity(x: Tensor, t: float) -> Tensor:
            if each_step:
                each_step()
            guided = first <= t < last
            if pictures is not None and guided:
                # v(∅) + s_I (v(pictures) - v(∅)) + s (v(prompt) - v(pictures)); no pass for a weight of 0
                by = settings.image_guidance
                terms = [(scale, prefix), (by - scale, pictures), (1 - by, unconditional)]
                return torch.stack([w * self.expert(x, at(t, x), read) for w, read in terms if w]).sum(0)
            conditional = self.expert(x, at(t, x), prefix)
            if scale == 1 or not guided:
                return conditional
            free = self.expert(x, at(t, x), unconditional)
            return free + scale * (conditional - free)  # v(∅) + s (v(prompt) - v(∅))

        return solve(velocity, noise, settings.steps, settings.solver, self.shift)


@torch.no_grad()
def read_prompts(
    vlm: FrozenVLM,
    expert: GenerationExpert | DiTExpert,
    autoencoder: Autoencoder,
    prompts: Sequence[str | list[int] | Prompt],
    length: int | None = None,
    multiple: int = 1,
) -> Prefix:
    """What an expert reads of prompts: the VLM's prefix, and z̃ of their pictures if it takes references.

    Args:
        vlm, expert, autoencoder: of the sampler.
        prompts, length, multiple: see `FrozenVLM.prefix`.
    """
    prefix = vlm.prefix([for_vlm(p, expert) for p in prompts], length, multiple, expert.reads)
    rows = [pictures_of(p) for p in prompts]
    if not expert.reference or not any(rows):
        return prefix
    latents = autoencoder.encode(vlm, torch.stack([picture for row in rows for picture in row]))
    most = max(map(len, rows))
    references = latents.new_zeros(len(rows), most, *latents.shape[1:])
    referred = torch.tensor([[n < len(row) for n in range(most)] for row in rows], device=latents.device)
    references[referred] = latents
    return replace(prefix, references=references, referred=referred)


def for_vlm(prompt: T, expert: GenerationExpert | DiTExpert) -> T | Prompt:
    """A prompt as the VLM reads it: without its pictures where the expert reads these by itself alone."""
    if isinstance(prompt, Prompt) and expert.reference == "only":
        return Prompt(prompt.text.replace(PICTURE, "") if prompt.pictures else prompt.text)
    return prompt


def picture_shape(card: Card, drawn: int | Shape | None = None) -> Shape:
    """What a sampler's prompts have their pictures cut to: the size to draw if it learned from such, as edits
    of several shapes are made, else the square that it learned from.

    Args:
        card: of the sampler.
        drawn: see `Sampler.grid`.
    """
    shape = as_shape(card.data.size if drawn is None else drawn)
    return shape if shape_name(shape) in (card.data.shapes or []) else as_shape(card.data.size)


def open_picture(picture: str | Path | bytes | Image.Image, size: int | Shape) -> Tensor:
    """A picture as prompts take it, uint8 [3, H, W]: decoded and cut as `vugen prepare` does it.

    Args:
        picture: a file, its bytes, or an open picture.
        size: pixels a side, or (height, width); see `picture_shape`.

    Raises:
        VugenError: there is no such file, it is none that `vugen prepare` would take, or no picture at all.
    """
    name = str(picture) if isinstance(picture, str | Path) else "the picture"
    try:
        if isinstance(picture, Image.Image):
            pixels = opened(picture)
        elif isinstance(picture, bytes | str | Path):
            pixels = decode(picture if isinstance(picture, bytes) else Path(picture).read_bytes())
        else:
            kind = type(picture).__name__
            raise VugenError(f"a picture is given as {kind}: give a file, its bytes or a PIL image")
    except OSError as error:
        raise VugenError(f"{name} cannot be read: {error.strerror or error}") from error
    except (ValueError, SyntaxError) as error:  # Pillow's, of an open PNG that is damaged
        raise VugenError(f"{name} cannot be used in a prompt: {error}") from error
    return torch.from_numpy(adm_crop(pixels, size).copy()).permute(2, 0, 1)
