"""Images with the prompts they were drawn for, and means over them with intervals that resample prompts."""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
import torch

from vugen_cli.data.shards import read_at, tar_members
from vugen_cli.errors import VugenError
from vugen_cli.files import read_jsonl
from vugen_cli.metrics.bootstrap import RESAMPLES, SEED, interval
from vugen_cli.metrics.features import full_float32
from vugen_cli.metrics.image_sets import ImageSet, is_image
from vugen_cli.metrics.report import PromptsRecord, Score
from vugen_cli.processes import in_order, world_size
from vugen_cli.progress import progress_bar

Prompted = tuple[str, str, torch.Tensor]  # an image's name, its prompt, and uint8 RGB [3, H, W]
Verdict = TypeVar("Verdict")


@dataclass
class PromptedImages:
    """A set of images of which each has a prompt; `prompted_images` makes one.

    Attributes:
        images: the set.
        prompts: the prompt of each image, by the image's name.
        source: where the prompts were found.
        grid: each image is a 2x2 grid of four.
    """

    images: ImageSet
    prompts: dict[str, str]
    source: str
    grid: bool = False

    def refuse_others(self, known: Collection[str], benchmark: Path, file: str) -> None:
        """Refuse images of prompts that a benchmark does not have.

        Args:
            known: its prompts.
            benchmark: where it was read from.
            file: what its prompts lie in.

        Raises:
            VugenError: names the first image.
        """
        for name, prompt in self.prompts.items():
            if prompt not in known:
                raise VugenError(
                    f"the prompt of {name}, '{prompt[:60]}', is none of {benchmark}'s: draw its prompts with "
                    f"`vugen sample --prompts {file}`."
                )

    def judged(
        self,
        judge: Callable[[list[Prompted]], Sequence[Verdict]],
        task: str,
        batch_size: int = 1,
    ) -> list[tuple[str, str, Verdict]]:
        """(name, prompt, verdict) of each good image in the set's order; of a grid, of each of its four.

        The processes of a job share the images out, and all have all verdicts.

        Args:
            judge: what is asked about each batch of images, one verdict an image; small picklable things.
            task: what is done with them, for the progress bar.
            batch_size: images (or grids) judged together.

        Raises:
            VugenError: as reading the set does; a grid has an odd side; no image is readable.
        """
        found: list[tuple[int, list[tuple[str, str, Verdict]]]] = []
        bar = progress_bar(total=self.images.total, desc=task, unit="img")
        of_processes = itertools.groupby(self.images.read(batch_size), lambda item: item[0] // batch_size)
        for place, items in of_processes:
            batch = [
                one for _, name, pixels in items if pixels is not None for one in self._parts(name, pixels)
            ]
            if batch:
                with full_float32():
                    verdicts = judge(batch)
                rows = [(name, prompt, v) for (name, prompt, _), v in zip(batch, verdicts, strict=True)]
                found.append((place, rows))
            bar.update(batch_size * world_size())
        bar.close()
        self.images.merge()
        if not self.images.count:
            bad = self.images.bad
            raise VugenError(
                f"{self.images.path} has no readable image{f': the first is {bad[0]}' if bad else ''}."
            )
        return [row for rows in in_order(found) for row in rows]

    def _parts(self, name: str, pixels: np.ndarray) -> list[Prompted]:
        """The image, or the four of a grid."""
        image, prompt = torch.from_numpy(pixels), self.prompts[name]
        if not self.grid:
            return [(name, prompt, image)]
        height, width = image.shape[1] // 2, image.shape[2] // 2
        if (2 * height, 2 * width) != tuple(image.shape[1:]):
            raise VugenError(f"{name} of {self.images.path} is no 2x2 grid: a side is odd; drop --grid.")
        corners = [(i // 2 * height, i % 2 * width) for i in range(4)]
        return [
            (f"{name}[{i}]", prompt, image[:, top : top + height, left : left + width].contiguous())
            for i, (top, left) in enumerate(corners)
        ]

    def describe(self) -> PromptsRecord:
        """How many prompts there are and where they were found."""
        return PromptsRecord(count=len(set(self.prompts.values())), source=self.source, grid=self.grid)


def prompted_images(
    images: ImageSet, grid: bool = False, named: Mapping[str, str] | None = None
) -> PromptedImages:
    """A set of images with the prompts that are with them; reads no image yet.

    The prompt of an image is "prompt" of its line in `samples.jsonl` or of its `metadata.jsonl` (GenEval's
    layout), else the first line of the `.txt` of the same name beside it, in a folder, a tar or shards.

    Args:
        images: a set that has prompts.
        grid: each image is a 2x2 grid of four, as DPG-Bench has them.
        named: prompts by the name of a file up to its first dot, for images in a folder without a `.txt`.

    Raises:
        VugenError: it is no such set, or an image has no prompt; names the first.
    """
    if images.kind == "samples":
        source = "samples.jsonl"
        prompts = {sample.file: sample.prompt for sample in images.samples}
    elif images.kind == "geneval":
        source = "metadata.jsonl"
        prompts = {name: _geneval_prompt(images.path, name) for name in images.names()}
    elif images.kind == "folder":
        source = "a .txt beside each image"
        prompts = {name: _line_beside(images.path / name) for name in images.names()}
        if named and not any(prompts.values()):
            source = "the names of the files"
            prompts = {name: named.get(PurePosixPath(name).name.split(".")[0]) for name in prompts}
    elif images.kind in ("tar", "shards"):
        source = "the .txt of each image in the tar"
        prompts = _lines_in_tars(images)
    else:
        raise VugenError(
            f"{images.path} ({images.kind}) names no prompts: give a folder with samples.jsonl, as `vugen "
            "sample` writes, images with a .txt beside each, or tars of such pairs."
        )
    found = {
        name: " ".join(text.split())
        for name, text in prompts.items()
        if isinstance(text, str) and text.strip()
    }
    without = [name for name in images.names() if name not in found]
    if without:
        raise VugenError(
            f"{len(without)} images of {images.path} have no prompt, the first {without[0]}: prompts were "
            f"sought in {source}; give samples.jsonl, or a .txt beside each image."
        )
    return PromptedImages(images, {name: found[name] for name in images.names()}, source, grid)


def _geneval_prompt(directory: Path, name: str) -> str | None:
    metadata = directory / PurePosixPath(name).parent.parent / "metadata.jsonl"
    return next((row.get("prompt") for row in read_jsonl(metadata)), None)


def _line_beside(image: Path) -> str | None:
    text = image.with_suffix(".txt")
    return _line_of(text.read_bytes()) if text.is_file() else None


def _lines_in_tars(images: ImageSet) -> dict[str, str | None]:
    prompts: dict[str, str | None] = {}
    for tar in images.tars:
        texts: dict[str, str | None] = {}
        members: dict[str, str] = {}
        for name, offset, size in tar_members(tar):
            folder, _, file = name.rpartition("/")
            key = f"{folder}/{file.split('.')[0]}"
            if is_image(name):
                members[name] = key
            elif name.lower().endswith(".txt"):
                texts[key] = _line_of(read_at(tar, offset, size))
        prompts |= {f"{tar.name}/{name}": texts.get(key) for name, key in members.items()}
        if images.limit is not None and len(prompts) >= images.limit:
            break
    return prompts


def _line_of(text: bytes) -> str | None:
    lines = text.decode("utf-8-sig", "replace").strip().splitlines()
    return lines[0] if lines else None


def score_of(
    metric: str,
    name: str,
    value: float | None,
    resampled: np.ndarray | None = None,
    *,
    parameters: Mapping[str, object],
    warning: str | None = None,
) -> Score:
    """One score, with the 95% percentile interval of its resamplings.

    Where no resampling differs, as with one prompt, there is no interval.
    """
    score = Score(metric=metric, name=name, value=value, parameters=parameters, warning=warning)
    if resampled is not None and value is not None and np.ptp(resampled) > 0:
        score.interval = interval(resampled)
        score.interval_method = "bootstrap of the prompts, each with all its images"
        score.parameters = {**parameters, "resamples": RESAMPLES, "seed": SEED}
    return score
