"""A trained sampler as a diffusers pipeline."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image

from vugen_cli import __version__
from vugen_cli.engine.checkpoint import load_checkpoint, save_checkpoint
from vugen_cli.engine.sampling import Sampler, load_sampler
from vugen_cli.errors import VugenError
from vugen_cli.files import write_json
from vugen_cli.flow import Solver
from vugen_cli.vlm.frozen import bundle

INDEX, CHECKPOINT, VLM = "model_index.json", "sampler.safetensors", "vlm"


class VugenPipeline(DiffusionPipeline):
    """Text to image by a sampler of `vugen train-sampler`, used as any other diffusers pipeline.

        pipe = VugenPipeline.from_sampler("sampler.safetensors")
        images = pipe("a bear in a forest", num_images_per_prompt=8).images

    A saved pipeline is whole: the VLM as a Hugging Face directory, and the sampler's checkpoint. Loading one
    runs no code of the directory.

    Args:
        sampler: from `load_sampler`.
    """

    def __init__(self, sampler: Sampler):
        super().__init__()
        self.sampler = sampler
        self.register_modules(vlm=sampler.vlm.model, expert=sampler.expert, decoder=sampler.decoder)

    @classmethod
    def from_sampler(
        cls,
        path: str | Path | None = None,
        vlm: str | None = None,
        device: torch.device | str = "cpu",
        decoder: str | Path | None = None,
    ) -> "VugenPipeline":
        """A pipeline of a sampler checkpoint.

        Args:
            path: default: the bundled sampler.
            vlm, device, decoder: see `load_sampler`.

        Raises:
            VugenError: as `load_sampler`.
        """
        return cls(load_sampler(path or bundle(CHECKPOINT), vlm, device, decoder=decoder))

    @classmethod
    def from_pretrained(cls, directory: str | Path, **options: Any) -> "VugenPipeline":
        """A pipeline that `save_pretrained` wrote.

        Args:
            directory: on this machine.
            options: of `from_sampler`: `device`.

        Raises:
            VugenError: it is none, or as `load_sampler`.
        """
        directory = Path(directory)
        if not (directory / CHECKPOINT).is_file() or not (directory / VLM).is_dir():
            raise VugenError(
                f"{directory} is no saved VugenPipeline: it needs {CHECKPOINT} and {VLM}/; "
                "VugenPipeline.from_sampler takes a checkpoint"
            )
        return cls.from_sampler(directory / CHECKPOINT, str(directory / VLM), **options)

    def save_pretrained(self, directory: str | Path, **_: Any) -> None:
        """Write the whole pipeline into a folder: `model_index.json`, `vlm/` and `sampler.safetensors`.

        Raises:
            VugenError: the sampler draws with another checkpoint's decoder, or its file is gone.
        """
        if "decoder" in self.sampler.card:
            raise VugenError(
                f"this pipeline draws with the decoder of {self.sampler.card['decoder']}, beside its own "
                "sampler: save one whose sampler holds the decoder"
            )
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors, card = load_checkpoint(self.sampler.path, "sampler")
        vlm = self.sampler.vlm
        vlm.model.save_pretrained(directory / VLM)
        whole = callable(vlm.processor)
        for part in [vlm.processor] if whole else [vlm.processor.image_processor, vlm.processor.tokenizer]:
            part.save_pretrained(directory / VLM)
        save_checkpoint(directory / CHECKPOINT, tensors, card)
        write_json(directory / INDEX, {"_class_name": type(self).__name__, "_vugen_version": __version__})

    def to(self, *args: Any, **kwargs: Any) -> "VugenPipeline":
        """As `DiffusionPipeline.to`: a device."""
        super().to(*args, **kwargs)
        self.sampler.vlm.device = self.device
        self.sampler.__dict__.pop("unconditional", None)  # of the device before
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        solver: Solver | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw.

        Args:
            prompt: one or several.
            num_images_per_prompt: images of each.
            num_inference_steps, guidance_scale, solver: default: the checkpoint's.
            seed: gives just the pictures of `vugen sample --seed`.
            generator: draws the seed, where none is given; without either it is 0.
            output_type: "pil", "np" (float32 [B, H, W, 3] in [0, 1]) or "pt" (float32 [B, 3, H, W]).
            return_dict: whether to return an `ImagePipelineOutput` or a tuple.

        Returns:
            Images, those of the first prompt first.

        Raises:
            VugenError: an unknown `output_type`, or a prompt that is too long.
        """
        if output_type not in ("pil", "np", "pt"):
            raise VugenError(f"output_type={output_type!r}: take 'pil', 'np' or 'pt'")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if seed is None:
            drawn = (
                torch.randint(2**31, (1,), generator=generator, device=generator.device) if generator else 0
            )
            seed = int(drawn)
        different = list(dict.fromkeys(prompts))
        stream = self.sampler.sample(
            different, num_images_per_prompt, seed, num_inference_steps, guidance_scale, solver
        )
        found: dict[tuple[str, int], torch.Tensor] = {}
        with self.progress_bar(total=len(different) * num_images_per_prompt) as bar:
            for p, i, image in stream:
                found[different[p], i] = image
                bar.update()
        pixels = torch.stack([found[text, i] for text in prompts for i in range(num_images_per_prompt)])
        images: Any = pixels.float() / 255
        if output_type == "np":
            images = images.permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            rows = pixels.permute(0, 2, 3, 1).numpy()
            images = [Image.fromarray(np.ascontiguousarray(row)) for row in rows]
        return ImagePipelineOutput(images=images) if return_dict else (images,)
