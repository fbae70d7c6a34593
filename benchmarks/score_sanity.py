"""What must hold of any Fréchet distance, checked on images of yours or on drawn scenes; ends in 1 if not.

    python benchmarks/score_sanity.py
    python benchmarks/score_sanity.py --images photos --features inception:weights.pth --count 2000

A set against itself is at 0; features drawn from known Gaussians come to the closed-form distance; and the
distance of a set to its own blurred, noisy or JPEG-compressed copies rises with every step of strength.
"""

import argparse
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from vugen_cli.metrics.encoders import load_extractor
from vugen_cli.metrics.features import Extractor
from vugen_cli.metrics.frechet import frechet_distance
from vugen_cli.metrics.image_sets import open_image_set
from vugen_cli.metrics.scores import score_sets
from vugen_cli.moments import Moments
from vugen_cli.nano.scenes import OpenMojiScenes


def blur(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def noise(image: Image.Image, sigma: float) -> Image.Image:
    """Gaussian noise in levels of 255, the same pattern at every strength and another for every image."""
    pixels = np.asarray(image).astype(np.float64)
    seed = int(pixels.sum()) % 2**32
    noisy = pixels + sigma * np.random.default_rng(seed).standard_normal(pixels.shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: float) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(quality))
    return Image.open(buffer).convert("RGB")


DAMAGES: dict[str, tuple[Callable[[Image.Image, float], Image.Image], str, list[float]]] = {
    "blur": (blur, "radius", [0.5, 1, 2, 4]),
    "noise": (noise, "sigma", [8, 16, 32, 64]),
    "JPEG": (jpeg, "quality", [90, 60, 30, 10]),
}


def gaussians(dim: int = 16, rows: int = 200_000) -> tuple[float, float]:
    """The distance of samples of two Gaussians with diagonal covariances, and |μ₁-μ₂|² + Σ(σ₁-σ₂)²."""
    rng = np.random.default_rng(0)
    means, deviations = rng.standard_normal((2, dim)), rng.uniform(0.5, 2, (2, dim))
    samples = [
        Moments(m + s * rng.standard_normal((rows, dim))) for m, s in zip(means, deviations, strict=True)
    ]
    exact = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    return frechet_distance(*samples), float(exact)


def check(images: list[Image.Image], extractor: Extractor) -> bool:
    """Print the table; whether all of it holds."""
    holds = []

    def row(what: str, value: float, good: bool) -> None:
        holds.append(good)
        print(f"{what:28} {value:14.6g}  {'ok' if good else 'WRONG'}", flush=True)

    found, exact = gaussians()
    row(f"Gaussians at {exact:.4f}", found, abs(found - exact) < 0.01 * exact)
    with tempfile.TemporaryDirectory() as scratch:

        def write(name: str, pictures: list[Image.Image]) -> Path:
            folder = Path(scratch) / name
            folder.mkdir()
            for i, picture in enumerate(pictures):
                picture.save(folder / f"{i:06d}.png")
            return folder

        clean = write("clean", images)

        def distance(folder: Path) -> float:
            cache = Path(scratch) / "cache"
            report = score_sets(folder, clean, extractor, ("fid",), cache=cache)
            value = report.scores[0].value
            assert value is not None  # enough pictures for a distance
            return value

        itself = distance(clean)
        scale = 0.0
        for name, (damage, unit, strengths) in DAMAGES.items():
            last = itself
            for strength in strengths:
                damaged = write(f"{name}-{strength}", [damage(image, strength) for image in images])
                value = distance(damaged)
                row(f"{name}, {unit} {strength:g}", value, value > last)
                last = value
            scale = max(scale, last)
        row("identical sets", itself, abs(itself) <= 1e-6 * scale)
    return all(holds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="any set `vugen score` takes (default: drawn scenes)")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--features", default="vlm:nano", help="as those of `vugen score`")
    arguments = parser.parse_args()
    extractor = load_extractor(arguments.features, "nano", "cpu")
    if arguments.images:
        pixels = open_image_set(arguments.images, arguments.count)
        pictures = [Image.fromarray(image.transpose(1, 2, 0)) for image in pixels]
    else:
        scenes = OpenMojiScenes(arguments.count, "val", 64)
        pictures = [
            image for i in range(arguments.count) if isinstance(image := scenes[i].image, Image.Image)
        ]
    print(f"{len(pictures)} images, {extractor.label}")
    sys.exit(0 if check(pictures, extractor) else 1)


if __name__ == "__main__":
    main()
