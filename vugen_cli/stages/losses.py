"""What decoders learn from beside flow matching or pixels: how a picture looks to other networks.

Least squares averages over all pictures that a noised or coded one may have been, which blurs what is
uncertain. These losses compare the predicted picture with the true one in features where blur is expensive,
or in steps from pixel to pixel, where grain is. None of the networks changes: gradients pass through them to
the pixels only.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from vugen_cli.errors import VugenError
from vugen_cli.flow import draw_times, flow_matching_loss
from vugen_cli.metrics.lpips import load_lpips
from vugen_cli.models.autoencoder import Autoencoder
from vugen_cli.models.pixel_decoder import PixelDecoder
from vugen_cli.models.vae import VAEDecoder
from vugen_cli.recipe import PictureLosses, Recipe
from vugen_cli.vlm.frozen import FrozenVLM

NEAREST = 0.05  # the least 1 - t that weighs: the velocity's loss is at most 400 times that of x̂
PictureLoss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (predicted, true pixels [B, 3, S, S], z) -> scalar


def picture_losses(
    weights: PictureLosses, vlm: FrozenVLM | None, size: int, device: torch.device
) -> dict[str, tuple[float, PictureLoss]]:
    """The losses that a recipe asks for: name -> (weight, loss).

    Args:
        weights: a weight of 0 leaves its loss out.
        vlm: whose encoder the perceptual loss looks through; without that loss none is needed.
        size: pixels a side of the pictures.
        device: where they are.

    Raises:
        VugenError: the VLM's preprocessing cannot be followed, or the weights of LPIPS are missing.
    """
    losses: dict[str, tuple[float, PictureLoss]] = {}
    if weights.perceptual:
        assert vlm
        see = VisionFeatures(vlm)
        see.check(size)
        losses["perceptual"] = (
            weights.perceptual,
            lambda predicted, _, z: cosine_distance(see(predicted), z),
        )
    if weights.lpips:
        lpips, _ = load_lpips(device)
        losses["lpips"] = (
            weights.lpips,
            lambda predicted, true, _: lpips(predicted.float() / 2 + 0.5, true.float() / 2 + 0.5).mean(),
        )
    if weights.gradient:
        losses["gradient"] = (weights.gradient, lambda predicted, true, _: gradient_error(predicted, true))
    return losses


def gradient_error(predicted: Tensor, true: Tensor) -> Tensor:
    """Mean |error| of the differences of neighbouring pixels [B, 3, H, W], a scalar (arXiv 1511.05440).

    Squares forgive small errors, and in a flat area small errors are grain.
    """
    error = predicted.float() - true.float()
    return (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean of 1 - cosine over all places; [B, h, w, d] twice -> scalar in [0, 2]."""
    return (1 - functional.cosine_similarity(a.float(), b.float(), dim=-1)).mean()


class VisionFeatures:
    """z of pixels, as `FrozenVLM.encode` but with a gradient to the pixels.

    `encode` goes through the VLM's image processor, which rounds to uint8 and is not differentiable. Most
    processors only resize, crop and normalise, which torch does as well; here those steps are repeated and
    compared with the processor once.

    Args:
        vlm: frozen; a Llava-style model, whose encoder takes one picture as [3, side, side].

    Raises:
        VugenError: its processor does something else.
    """

    def __init__(self, vlm: FrozenVLM):
        self.vlm = vlm
        processor = vlm.processor.image_processor
        sizes = dict(getattr(processor, "size", None) or {})
        self.side: int = sizes.get("shortest_edge") or sizes.get("height") or 0
        crop = dict(getattr(processor, "crop_size", None) or {})
        self.crop = crop.get("height") if getattr(processor, "do_center_crop", False) else None
        self.mode = {2: "bilinear", 3: "bicubic"}.get(int(getattr(processor, "resample", 3) or 3), "bicubic")
        if vlm.recipe.vlm_size:  # resized by `resized`, not by the processor
            self.side, self.crop, self.mode = vlm.recipe.vlm_size, None, "bicubic"
        mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
        self.refused = VugenError(
            f"losses.perceptual: the image processor of {vlm.name} does more than resize and normalise, so "
            "its encoder gives no gradient to pixels; set decoder.losses.perceptual=0, or "
            "vae.losses.perceptual=0 for train-vae"
        )
        if not self.side or mean is None or std is None:
            raise self.refused
        self.mean = torch.tensor(mean, device=vlm.device).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=vlm.device).view(1, 3, 1, 1)

    def check(self, size: int) -> None:
        """Compare with the processor.

        Args:
            size: pixels a side of the pictures that will come.

        Raises:
            VugenError: it does something else.
        """
        images = self._example(size)
        try:
            with torch.no_grad():
                difference = cosine_distance(self(images.float() / 127.5 - 1), self.vlm.encode(images))
        except Exception as error:  # an encoder of another kind fails in its own way
            raise self.refused from error
        if difference > 0.02:
            raise self.refused

    def __call__(self, pixels: Tensor) -> Tensor:
        """z [B, h, w, d] of float pixels [B, 3, S, S] in [-1, 1]."""
        x = pixels.float() / 2 + 0.5
        if x.shape[-1] != self.side:
            x = functional.interpolate(x, (self.side, self.side), mode=self.mode, antialias=True)
        if self.crop and self.crop < self.side:
            edge = (self.side - self.crop) // 2
            x = x[..., edge : edge + self.crop, edge : edge + self.crop]
        x = ((x - self.mean) / self.std).to(self.vlm.model.dtype)
        return self.vlm.read({"pixel_values": x}, len(x))

    def _example(self, size: int) -> Tensor:
        """A smooth random picture, uint8 [1, 3, size, size]: what resizes alike where natural pictures do."""
        coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        smooth = functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
        return (smooth * 255).round().to(torch.uint8).to(self.vlm.device)


class Alignment(nn.Module):
    """The head of REPA (arXiv 2410.06940): a network's middle features should tell z through it.

    It is trained beside the decoder or the expert and is not part of the checkpoint.

    Args:
        width: of the middle features.
        target: d of z.
    """

    def __init__(self, width: int, target: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width), nn.SiLU()
        )
        self.proj_out = nn.Linear(2 * width, target)

    def forward(self, middle: Tensor) -> Tensor:
        """z as the features tell it; [B, H, W, width] -> [B, H, W, d]."""
        return self.proj_out(self.mlp(middle))


def misalignment(told: Tensor, z: Tensor) -> Tensor:
    """1 - cosine of z as told [B, H, W, d] and z [B, h, w, d] stretched to H x W; a scalar."""
    stretched = functional.interpolate(z.permute(0, 3, 1, 2).float(), told.shape[1:3], mode="bilinear")
    return cosine_distance(told, stretched.permute(0, 2, 3, 1))


def flow_weight(t: Tensor, weighting: str) -> Tensor:
    """What the square of a velocity weighs at times [B], so that the clean prediction's weighs what is asked.

    The velocity of a network that predicts the clean picture is (x̂ - x_t) / (1 - t): its plain square weighs
    that of x̂ by 1 / (1 - t)², most where x_t itself says nearly all and z̃ is not needed. Nearer to the data
    than `NEAREST` that weight grows no more, as if velocity and target were both divided by `NEAREST` there.

    Args:
        t: in [0, 1].
        weighting: `velocity`, `balanced` or `clean`; see `Decoder.weighting`.
    """
    if weighting == "clean":
        return (1 - t).square()
    if weighting == "balanced":
        return 1 - t
    return ((1 - t) / (1 - t).clamp_min(NEAREST)).square()


def reducer_loss(
    module: Autoencoder,
    z: Tensor,
    images: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
    pictures: dict[str, tuple[float, PictureLoss]],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Flow matching of the pixels given z̃, and the recipe's other terms; the total, and each by name.

    The squares at time t are weighted by `decoder.weighting`.

    Args:
        z: [B, h, w, d] of the images.
        images: uint8 [B, 3, S, S].
        recipe: its weights.
        generator: draws times and noise.
        pictures: from `picture_losses`; they see the clean prediction.
    """
    latents, penalty = module.reducer.noisy(z, recipe.decoder.noise, generator)
    assert not isinstance(module.decoder, VAEDecoder)
    t = draw_times(len(images), recipe.decoder.time or recipe.flow.time, recipe.decoder.shift, generator)
    target = module.decoder.target(images)
    middle: list[Tensor] | None = [] if module.alignment else None
    clean = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        v = module.decoder(x, t, latents, middle)
        clean.append(x + (1 - t)[:, None, None, None] * v)
        return v

    pixels = isinstance(module.decoder, PixelDecoder)  # the LDM predicts the velocity itself
    weighted = flow_weight(t, recipe.decoder.weighting) if pixels else None
    total = flow = flow_matching_loss(velocity, target, t, generator, weighted)
    values = {"flow": flow}
    for name, (weight, picture_loss) in pictures.items():
        values[name] = picture_loss(clean[0], target, z)
        total = total + weight * values[name]
    if module.alignment and middle:
        values["repa"] = misalignment(module.alignment(middle[0]), z)
        total = total + recipe.decoder.losses.repa * values["repa"]
    if recipe.reducer.normalise == "kl":
        values["kl"] = penalty
        total = total + recipe.reducer.penalty * penalty
    return total, values if len(values) > 1 else {}
