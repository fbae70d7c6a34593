"""A trained sampler as a diffusers pipeline."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

from vugen_cli.errors import VugenError
from vugen_cli.files import refuse_foreign, whole_folder, write_json
from vugen_cli.flow import Solver
from vugen_cli.hub import PREFIX
from vugen_cli.sampling.sampler import Sampler, open_picture, picture_shape
from vugen_cli.sampling.trained import VLM, WEIGHTS, load_sampler, save_sampler
from vugen_cli.vlm.frozen import WORDS
from vugen_cli.vlm.prompts import Prompt, refuse_places

Picture = str | Path | bytes | Image.Image  # what `open_picture` takes
# By these diffusers' own DiffusionPipeline, told to trust remote code, finds what is installed here.
CODE = {
    "pipeline.py": "from vugen_cli.sampling.pipeline import VugenPipeline  # noqa: F401\n",
    "sampler/pipeline.py": "from vugen_cli.sampling.pipeline import Component  # noqa: F401\n",
}


class Component:
    """How diffusers loads the one component of a pipeline."""

    @staticmethod
    def from_pretrained(path: str) -> Sampler:
        """The sampler of a saved pipeline's folder, whose subfolder `path` is."""
        return load_sampler(Path(path).parent)


class VugenPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers is not typed
    """Draws as `vugen sample` does; see `__call__`.

    A saved pipeline is a folder: `model_index.json`, `sampler.safetensors` (expert, reducer and decoder, the
    checkpoint that every command takes) and `vlm/` (a Hugging Face directory). Loading runs no code from it;
    two lines of it are for `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`.

    Args:
        sampler: from `load_sampler`.
    """

    def __init__(self, sampler: Sampler):
        super().__init__()
        self.register_modules(sampler=sampler)

    @classmethod
    def from_sampler(cls, path: str | Path | None = None, **options: Any) -> Self:
        """The pipeline of a checkpoint of `vugen train-sampler`; default the bundled one.

        Args:
            path: the checkpoint.
            options: of `load_sampler`.
        """
        return cls(load_sampler(path, **options))

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write the whole pipeline, the VLM included, to a folder.

        Of a pipeline that was saved there before, nothing stays. `model_index.json` is written last: a folder
        that has one is whole.

        Raises:
            VugenError: an option of diffusers that does not apply here, the folder cannot be written, or its
                `vlm` is none of a saved pipeline.
        """
        if options:
            raise VugenError(f"VugenPipeline.save_pretrained takes a folder alone, not {', '.join(options)}")
        folder, vlm = Path(save_directory), self.sampler.vlm
        ours = folder / "pipeline.py"
        if ours.exists() and "vugen_cli" not in ours.read_text(encoding="utf-8", errors="replace"):
            raise VugenError(f"{ours} is of something else: choose another folder, or move it away")
        for part in (VLM, WEIGHTS, self.config_name, "sampler"):
            refuse_foreign(folder / part, ours)
        try:
            (folder / self.config_name).unlink(missing_ok=True)
            for name, text in CODE.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise VugenError(f"cannot write {folder}: {error.strerror or error}") from error
        with whole_folder(folder / VLM) as temporary:
            vlm.model.save_pretrained(temporary)
            if hasattr(vlm.processor, "save_pretrained"):
                vlm.processor.save_pretrained(temporary)
            else:  # its two parts, where the whole could not be had
                vlm.processor.tokenizer.save_pretrained(temporary)
                vlm.processor.image_processor.save_pretrained(temporary)
            if vlm.words is not None:
                write_json(temporary / WORDS, sorted(vlm.words))
        save_sampler(self.sampler, folder / WEIGHTS)
        index = {"_class_name": ["pipeline", "VugenPipeline"], "sampler": ["pipeline", "Component"]}
        write_json(folder / self.config_name, {**self.config, **index})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Self:
        """The pipeline that `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: the folder, or `hf:owner/name[@revision]`.
            options: of `load_sampler`.

        Raises:
            VugenError: there is no such pipeline there, or it is damaged.
        """
        given = str(pretrained_model_name_or_path)
        if not given.startswith(PREFIX) and not (Path(given) / cls.config_name).is_file():
            raise VugenError(f"no pipeline at {given}: give the folder that save_pretrained wrote")
        if unknown := options.keys() - {"device", "allow_vlm_mismatch", "decoder", "adapters"}:
            raise VugenError(f"VugenPipeline.from_pretrained does not take {', '.join(sorted(unknown))}")
        return cls(load_sampler(given, **options))

    @property
    def device(self) -> torch.device:
        """Where it draws."""
        return self.sampler.vlm.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the expert's weights."""
        return next(self.sampler.expert.parameters()).dtype

    def to(self, device: str | torch.device) -> Self:
        """Move every network to a device."""
        self.sampler.to(torch.device(device))
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] = "",
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        solver: Solver | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        image: Picture | Sequence[Picture] | None = None,
        image_guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Any:
        """Draw pictures for prompts.

        Args:
            prompt: what to draw, one or several; may be left out where there is an image, to vary it.
            num_images_per_prompt: pictures for each.
            guidance_scale, num_inference_steps, solver: default the checkpoint's.
            generator: draws the seed, so that each call with it gives other pictures; default torch's own.
            seed: the pictures of `vugen sample --seed`, on the same device. Give this or `generator`.
            output_type: "pil"; "np", float32 [B, H, W, 3] in [0, 1]; "pt", float32 [B, 3, H, W] in [0, 1].
            return_dict: otherwise a tuple.
            image: a picture that every prompt is about, or several: files, their bytes or open pictures.
            height, width: in pixels, of samplers that draw other sizes than one; default the checkpoint's.
            image_guidance_scale: by these pictures, as `guidance_scale` is by the text.

        Returns:
            An object whose `images` has the pictures of the first prompt, then those of the second, ...

        Raises:
            VugenError: an empty or too long prompt, a size that it cannot draw, both seed and generator, an
                unknown output type, or an image that is none.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        given: Any = [] if image is None else image if isinstance(image, list | tuple) else [image]
        card = self.sampler.card
        rows, columns = (card.image_size if side is None else side for side in (height, width))
        size = rows, columns
        pictures = tuple(open_picture(each, picture_shape(card, size)) for each in given)
        if not prompts or not (pictures or all(text.strip() for text in prompts)):
            raise VugenError("a prompt is empty: say what to draw")
        if not pictures:
            refuse_places(prompts, "add image=...")
        if output_type not in ("pil", "np", "pt"):
            raise VugenError(f"output_type {output_type}: give pil, np or pt")
        if num_images_per_prompt < 1:
            raise VugenError(f"num_images_per_prompt {num_images_per_prompt}: give 1 or more")
        if isinstance(generator, list):
            raise VugenError("give one generator: each picture of a seed has noise of its own")
        if seed is not None and generator is not None:
            raise VugenError("give a seed or a generator, not both")
        if seed is None:
            where = generator.device if generator else torch.device("cpu")
            seed = int(torch.randint(2**63 - 1, (), generator=generator, device=where))
        if not isinstance(seed, int) or seed < 0:
            raise VugenError(f"seed {seed}: give a whole number, 0 or more")
        asked = [Prompt(text.strip(), pictures) for text in prompts]
        drawn = {}
        with self.progress_bar(total=len(asked) * num_images_per_prompt) as progress:
            for p, i, picture in self.sampler.sample(
                asked,
                num_images_per_prompt,
                seed,
                num_inference_steps,
                guidance_scale,
                solver,
                image_guidance_scale,
                size,
            ):
                drawn[p, i] = picture
                progress.update()
        stack = torch.stack([drawn[key] for key in sorted(drawn)])
        images: Any = stack.float() / 255
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = [Image.fromarray(np.ascontiguousarray(i.permute(1, 2, 0).numpy())) for i in stack]
        return ImagePipelineOutput(images=images) if return_dict else (images,)
