"""Features other than Inception's: a VLM's own vision encoder, CLIP through open_clip, DINOv2."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vugen_cli.checkpoint import fingerprint
from vugen_cli.errors import VugenError, first_line
from vugen_cli.metrics.features import Extractor
from vugen_cli.torchvision_repair import repair_torchvision


def vlm_extractor(vlm: Any) -> Extractor:
    """Features from a VLM's own vision encoder, averaged over its grid of patches.

    Args:
        vlm: what `vugen_cli.vlm.frozen.load_vlm` returns, of which this uses `fingerprint`, the settings of
            `processor.image_processor`, and `encode(uint8 [B, 3, H, W]) -> float [B, h, w, d]`.
    """

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        grid = vlm.encode(images)
        return {"features": grid.double().mean(dim=(1, 2)).float()}

    return Extractor(
        name="vlm",
        label="mean of the VLM's vision embeddings",
        resize=_settings("the VLM's own preprocessing", vlm.processor.image_processor.to_dict()),
        identity={"vlm_fingerprint": str(vlm.fingerprint)},
        features=features,
    )


@dataclass(frozen=True)
class Clip:
    """A frozen CLIP model of open_clip.

    Attributes:
        name: as it was asked for, "MODEL:PRETRAINED".
        architecture: its first half, or the name under which open_clip has it with the activation that the
            weights were trained with.
        network: gives embeddings as they are projected and before they are normalised.
        preprocess: from a picture to float [3, H, W].
        resize: the preprocessing in words.
        fingerprint: hash of the weights.
        device: where the network runs.
    """

    name: str
    architecture: str
    network: Any
    preprocess: Callable[[Image.Image], torch.Tensor]
    resize: str
    fingerprint: str
    device: torch.device | str

    @torch.inference_mode()
    def encode_pictures(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Embeddings float [B, d] of RGB pictures."""
        pixels = torch.stack([self.preprocess(picture) for picture in pictures])
        return self.network.encode_image(pixels.to(self.device))

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings float [B, d] of texts, and bool [B] of which were cut at the model's longest text.

        Raises:
            VugenError: the model's tokenizer cannot be had.
        """
        tokens = self._tokenizer(list(texts))
        longest = tokens.shape[1]
        cut = (tokens != self._tokenizer(list(texts), context_length=2 * longest)[:, :longest]).any(dim=1)
        return self.network.encode_text(tokens.to(self.device)), cut

    @cached_property
    def _tokenizer(self) -> Any:
        import open_clip

        try:
            return open_clip.get_tokenizer(self.architecture)
        except Exception as error:  # some are fetched, and a download fails in many ways
            raise VugenError(f"CLIP {self.name}: no tokenizer ({first_line(error)}).") from error


def load_clip(model: str, device: torch.device | str = "cpu") -> Clip:
    """A CLIP model of open_clip.

    Args:
        model: "MODEL:PRETRAINED" of open_clip, as in "ViT-B-32:laion2b_s34b_b79k", or "MODEL:FILE" with a
            checkpoint on disk.
        device: where the network runs.

    Raises:
        VugenError: there is no such model, or its weights cannot be had.
    """
    architecture, _, pretrained = model.partition(":")
    if not pretrained:
        raise VugenError(
            f"CLIP {model}: give the weights too, as in ViT-B-32:laion2b_s34b_b79k or MODEL:FILE."
        )
    repair_torchvision()
    import open_clip

    if architecture not in open_clip.list_models():
        raise VugenError(
            f"CLIP {model}: open_clip has no model {architecture}; it has ViT-B-32, ViT-L-14, ..."
        )
    # OpenAI's weights, and some others, were trained with another activation than the model of that name has:
    # open_clip only warns.
    quick = f"{architecture}-quickgelu"
    if quick in open_clip.list_models() and open_clip.get_pretrained_cfg(architecture, pretrained).get(
        "quick_gelu"
    ):
        architecture = quick
    try:
        network, _, preprocess = open_clip.create_model_and_transforms(
            architecture, pretrained=pretrained, device=device, weights_only=True
        )
    except Exception as error:  # a foreign file can fail in as many ways as a download
        raise VugenError(f"CLIP {model} could not be loaded: {first_line(error)}") from error
    network.eval().requires_grad_(False)
    resize = _settings("open_clip's preprocessing", open_clip.get_model_preprocess_cfg(network))
    return Clip(model, architecture, network, preprocess, resize, fingerprint(network), device)


def clip_extractor(model: str, device: torch.device | str = "cpu") -> Extractor:
    """Image embeddings of a CLIP model, as they are projected and before they are normalised.

    Args:
        model, device: see `load_clip`.

    Raises:
        VugenError: there is no such model, or its weights cannot be had.
    """
    clip = load_clip(model, device)

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        return {"features": clip.encode_pictures(pictures)}

    return Extractor(
        name="clip",
        label=f"CLIP {clip.architecture} image embedding",
        resize=clip.resize,
        identity={"weights_fingerprint": clip.fingerprint},
        features=features,
    )


DINOV2_SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def dinov2_extractor(directory: Path, device: torch.device | str = "cpu") -> Extractor:
    """The class token of a DINOv2 model after its last normalisation, as Stein et al. (2023) take it.

    "Exposing flaws of generative model evaluation metrics"; their dgm-eval brings every image to 224 x 224,
    whatever its shape, where the directory's own preprocessing would crop it.

    Args:
        directory: a Hugging Face directory of a DINOv2 model, with or without registers.
        device: where the network runs.

    Raises:
        VugenError: there is no such directory or it holds another kind of model.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise VugenError(f"{directory} has no config.json: give a Hugging Face directory of DINOv2.")
    repair_torchvision()
    from transformers import AutoConfig, AutoModel

    source = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(directory, **source)
        if config.model_type not in ("dinov2", "dinov2_with_registers"):
            raise VugenError(f"{directory} holds a {config.model_type} model, not DINOv2.")
        network, report = AutoModel.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **source
        )
    except VugenError:
        raise
    except Exception as error:  # a foreign directory can fail in as many ways as there are model classes
        raise VugenError(f"{directory} could not be loaded: {first_line(error)}") from error
    if report["missing_keys"]:  # transformers would leave these at random
        raise VugenError(f"{directory} lacks weights, such as {sorted(report['missing_keys'])[0]}.")
    identity = {"weights_fingerprint": fingerprint(network)}
    network.eval().requires_grad_(False).to(device)
    if config.model_type == "dinov2":
        _place_as_dinov2(network.embeddings, DINOV2_SIZE // config.patch_size)

    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        pixels = dinov2_pixels(images).to(device)
        return {"features": network(pixel_values=pixels).last_hidden_state[:, 0]}

    return Extractor(
        name="dinov2",
        label=f"DINOv2 class token, {config.hidden_size}",
        resize=f"Pillow's bicubic to {DINOV2_SIZE} x {DINOV2_SIZE}, ImageNet's mean and deviation (dgm-eval)",
        identity=identity,
        features=features,
    )


def dinov2_pixels(images: torch.Tensor) -> torch.Tensor:
    """What dgm-eval shows DINOv2 of images: uint8 [B, 3, H, W] -> float32 [B, 3, 224, 224].

    Pillow's bicubic, which averages where it shrinks, then ImageNet's mean and deviation.
    """
    size = (DINOV2_SIZE, DINOV2_SIZE)
    pictures = (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images)
    rows = np.stack([np.asarray(picture.resize(size, Image.Resampling.BICUBIC)) for picture in pictures])
    pixels = torch.from_numpy(rows).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def _place_as_dinov2(embeddings: Any, grid: int) -> None:
    """Bring the positions to [grid, grid] as DINOv2's own code does: from 37 to 16 by a factor of 16.1 / 37.

    transformers takes 16 / 37, which moves every place a little.
    """
    stored = embeddings.position_embeddings.data
    side = int((stored.shape[1] - 1) ** 0.5)
    if side == grid:
        return
    places = stored[:, 1:].float().view(1, side, side, -1).permute(0, 3, 1, 2)
    moved = torch.nn.functional.interpolate(places, scale_factor=(grid + 0.1) / side, mode="bicubic")
    positions = torch.cat([stored[:, :1], moved.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    embeddings.position_embeddings = torch.nn.Parameter(positions, requires_grad=False)


def _settings(name: str, settings: Mapping[str, object]) -> str:
    """A preprocessing by name and the hash of its settings, which weights do not tell."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return f"{name} (settings {hashlib.sha256(text.encode()).hexdigest()[:12]})"


def load_extractor(features: str, recorded_vlm: str, device: torch.device | str) -> Extractor:
    """The feature extractor that `--features` names; `vlm` alone says which VLM it takes.

    Args:
        features: `inception[:FILE]`, `vlm[:ID]`, `clip:MODEL:PRETRAINED` or `dinov2:DIRECTORY`.
        recorded_vlm: the one that `vlm` alone means.
        device: where the network runs.

    Raises:
        VugenError: it names none of these, or the weights cannot be had.
    """
    kind, _, which = features.partition(":")
    if kind == "inception":
        from vugen_cli.metrics.inception import inception_extractor

        return inception_extractor(Path(which) if which else None, device)
    if kind == "vlm":
        from vugen_cli.vlm.frozen import load_vlm

        if not which:
            print(f"features: of the VLM {recorded_vlm}")
        return vlm_extractor(load_vlm(which or recorded_vlm, device=device))
    if kind == "clip" and which:
        return clip_extractor(which, device)
    if kind == "dinov2" and which:
        return dinov2_extractor(Path(which), device)
    raise VugenError(
        f"--features {features}: give inception, inception:FILE, vlm, vlm:ID, clip:MODEL:PRETRAINED or "
        f"dinov2:DIRECTORY."
    )
