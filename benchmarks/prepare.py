"""Throughput of `vugen prepare` on one core, beside a plain Pillow loop and the decode-only limit.

    python benchmarks/prepare.py ILSVRC2012_img_train.tar --images 500 --rounds 5

Takes any layout that `vugen prepare --dataset imagenet` reads. The contenders run in turn, round after round,
in one process on one core, so that what else the machine does falls on all of them; each one's best round
counts. All read the same files from the page cache and, but for the limit, write to the same temporary
folder:

- decode:  simplejpeg to RGB and nothing else. No pipeline on this decoder can be faster.
- pillow:  open, convert, ADM's centre crop (guided_diffusion/image_datasets.py), save as JPEG at quality 95.
- vugen:   `write_dataset` with one worker: the same and the shard, captions, meta, sha256 and manifest. It
           keeps full chroma (4:4:4), of which Pillow's loop by default saves a quarter.
"""

import argparse
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image

from vugen_cli.data.imagenet import ImageNet
from vugen_cli.data.sample import Sample
from vugen_cli.data.writer import write_dataset


class First:
    """The first `count` pictures of a source in a seeded order, as a source."""

    def __init__(self, source: ImageNet, count: int):
        self.source, self.name, self.origin, self.licence = source, source.name, source.origin, source.licence
        self.classes = source.classes
        self.chosen = np.random.default_rng(0).permutation(len(source))[:count]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Sample:
        return self.source[int(self.chosen[index])]

    def file(self, index: int) -> bytes:
        """The stored file of one of them."""
        stored = self[index].image
        assert isinstance(stored, bytes)  # ImageNet's are files
        return stored


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's `center_crop_arr` in Pillow."""
    while min(*image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def decode_only(source: First, size: int, out: Path) -> None:
    for index in range(len(source)):
        simplejpeg.decode_jpeg(source.file(index))


def pillow_loop(source: First, size: int, out: Path) -> None:
    import io

    out.mkdir()
    for index in range(len(source)):
        image = Image.open(io.BytesIO(source.file(index))).convert("RGB")
        adm_crop(image, size).save(out / f"{index}.jpg", quality=95)


def vugen(source: First, size: int, out: Path) -> None:
    write_dataset(source, out, size=size, workers=1)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="ImageNet in any layout")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 64])
    args = parser.parse_args()
    torch.set_num_threads(1)

    source = First(ImageNet(args.source), args.images)
    shapes = [simplejpeg.decode_jpeg_header(source[i].image)[:2] for i in range(len(source))]
    height, width = np.mean(shapes, axis=0)
    print(f"{len(source)} images of {width:.0f}x{height:.0f} pixels on average, best of {args.rounds} rounds")
    print(f"{cpu_name()}, 1 of {os.cpu_count()} cores; torch {torch.__version__}, Pillow {Image.__version__}")
    contenders: dict[str, Callable[[First, int, Path], None]] = {
        "decode": decode_only,
        "pillow": pillow_loop,
        "vugen": vugen,
    }
    for size in args.sizes:
        best = dict.fromkeys(contenders, float("inf"))
        for _ in range(args.rounds):
            for name, run in contenders.items():
                folder = Path(tempfile.mkdtemp(prefix="vugen-bench-"))
                start = time.perf_counter()
                run(source, size, folder / "out")
                best[name] = min(best[name], time.perf_counter() - start)
                shutil.rmtree(folder)
        rates = {name: len(source) / seconds for name, seconds in best.items()}
        print(
            f"{size} px: vugen {rates['vugen']:.0f} img/s, pillow {rates['pillow']:.0f}, decode "
            f"{rates['decode']:.0f}: {rates['vugen'] / rates['pillow']:.2f}x the Pillow loop, "
            f"{rates['vugen'] / rates['decode']:.0%} of decode-only"
        )


if __name__ == "__main__":
    main()
