"""Originals, what is decoded from all of z, and what is from z̃: the paper's Figure 2, with figures."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from vugen_cli.data.images import adm_crop
from vugen_cli.errors import VugenError
from vugen_cli.files import whole_file, write_json
from vugen_cli.metrics.encoders import vlm_extractor
from vugen_cli.metrics.features import full_float32
from vugen_cli.metrics.frechet import frechet_distance
from vugen_cli.metrics.image_sets import image_batches, open_image_set
from vugen_cli.metrics.lpips import load_lpips
from vugen_cli.metrics.pairs import psnr, ssim
from vugen_cli.metrics.report import Record, Score, SetRecord
from vugen_cli.models.autoencoder import Autoencoder
from vugen_cli.moments import Moments
from vugen_cli.pictures import save_grid
from vugen_cli.processes import barrier, broadcast, gather, is_first, world_size
from vugen_cli.progress import progress_bar
from vugen_cli.sampling.trained import decode_images, load_autoencoder
from vugen_cli.vlm.frozen import FrozenVLM, vlm_of

GRID_IMAGES = 16
COLUMNS = 8
DECODE_BATCH = 8
ORIGINAL, REDUCED, FULL = "original", "z reduced", "z in full"  # the grid's rows


class Fidelity(Record):
    """How near reconstructions are to their originals."""

    psnr: float | None = Field(
        description="mean peak signal-to-noise ratio, in dB, of pictures that differ; null if none does"
    )
    ssim: float = Field(description="mean structural similarity")
    lpips: float | None = Field(None, description="mean LPIPS, where its weights are at hand")
    frechet: float | None = Field(description="Fréchet distance of the two sets; null for a single image")
    checkpoint: str = Field("", description="what decoded them")


class Reconstruction(Fidelity):
    """Fidelity of what is decoded from z̃, beside that from all of z where `--full` was given."""

    full: Fidelity | None = Field(None, description="the same keys, decoded from all of z")
    features: str = Field(description="what the Fréchet distance is taken on")
    images: SetRecord = Field(description="the originals: `path`, `count` and `bad`")
    steps: int = Field(description="of the decoder")
    seed: int = Field(description="of the decoder's noise")
    size: int = Field(description="pixels a side")
    judges: list[Score] = Field(
        [], description="of OpenMoji scenes: how often they still show what they should"
    )


def reconstruct(
    checkpoint: Path,
    images: Path,
    out: Path,
    count: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    vlm: str | None = None,
    device: torch.device | str = "cpu",
    allow_vlm_mismatch: bool = False,
    save_images: bool = False,
    full: Path | None = None,
    judge: Callable[[FrozenVLM, Tensor, Tensor, list[int]], list[Score]] | None = None,
) -> Reconstruction:
    """Encode, reduce and decode a set of images, streaming; measure and show what is lost.

    Writes `reconstruction.png` (the first 16, each above what is made of it) and `reconstruction.json`.

    Args:
        checkpoint: of a reducer or a sampler.
        images: any set `vugen score` reads: a folder, shards, a zip or an npz.
        out: folder to write to.
        count: at most this many images.
        steps: decoder steps; default the checkpoint's.
        seed: of the decoder's noise; the noise of image i depends on the seed and i alone.
        vlm: where the VLM is now, if not where the card says.
        device: where to run.
        allow_vlm_mismatch: take a VLM of other weights than the checkpoint was trained on.
        save_images: also write each original and its reconstruction as PNG, `originals/<i>.png` and
            `decoded/<i>.png`, for `vugen score`; earlier ones are removed.
        full: a checkpoint of the identity reducer, for a row decoded from all of z.
        judge: (VLM, originals, reconstructions, their numbers in the set) -> scores that join the report; the
            pictures are kept in memory for it.

    Returns:
        What was measured, which is also what `reconstruction.json` holds; to every process of a job, which
        share the images out.

    Raises:
        VugenError: no image is readable, or the checkpoints do not fit each other or the VLM.
    """
    device = torch.device(device)
    autoencoder, _, card = load_autoencoder(checkpoint, device)
    frozen = vlm_of(card, checkpoint, vlm, device, allow_vlm_mismatch)
    ways = {REDUCED: autoencoder}
    if full:
        ways = {FULL: load_whole(full, frozen, card.image_size, checkpoint, allow_vlm_mismatch), **ways}
    extractor = vlm_extractor(frozen)
    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
    with contextlib.suppress(VugenError):  # its weights are not at hand
        measures["lpips"], _ = load_lpips(device)
    source = open_image_set(images, limit=count)
    if save_images and is_first():  # of another set, or of more pictures of this one
        for path in (*out.glob("originals/*.png"), *out.glob("decoded/*.png")):
            path.unlink()
    barrier("earlier pictures gone")
    seen = {name: Seen() for name in (ORIGINAL, *ways)}
    judged: dict[int, tuple[Tensor, Tensor]] = {}
    bar = progress_bar(total=source.total, desc="reconstruct", unit="img")
    with bar as progress, torch.no_grad():
        for indices, chunk in image_batches(source, DECODE_BATCH):
            squares = [adm_crop(i.transpose(1, 2, 0), card.image_size).copy() for i in chunk]
            originals = torch.stack([torch.from_numpy(i).permute(2, 0, 1) for i in squares])
            made = {
                name: decode_images(frozen, way, originals, seed, steps, indices)
                for name, way in ways.items()
            }
            with full_float32():
                seen[ORIGINAL].add(indices, originals, extractor.features(originals)["features"])
                for name, decoded in made.items():
                    seen[name].add(indices, decoded, extractor.features(decoded)["features"])
                    seen[name].compare(indices, originals, decoded, measures)
            if save_images:
                save_pictures(out / "originals", originals, indices)
                save_pictures(out / "decoded", made[REDUCED], indices)
            if judge:
                judged |= dict(zip(indices, zip(originals, made[REDUCED], strict=True), strict=True))
            progress.update(len(originals) * world_size())
    source.merge()
    for others, theirs in gather((seen, judged))[1:]:
        for name, of_name in others.items():
            seen[name].merge(of_name)
        judged |= theirs
    if not source.count:
        raise VugenError(f"no readable image in {images}")
    if not is_first():
        return broadcast(None)
    report = Reconstruction(
        **seen[REDUCED].figures(seen[ORIGINAL]),
        features=extractor.label,
        images=SetRecord(path=str(images), count=source.count, bad=source.bad),
        checkpoint=str(checkpoint),
        steps=steps or autoencoder.decoder.recipe.steps,
        seed=seed,
        size=card.image_size,
    )
    if full:
        report.full = Fidelity(**seen[FULL].figures(seen[ORIGINAL]), checkpoint=str(full))
    if judge:
        indices = sorted(judged)
        before, after = (torch.stack([judged[index][side] for index in indices]) for side in (0, 1))
        report.judges = judge(frozen, before, after, indices)
    write_json(out / "reconstruction.json", report.written())
    save_rows({name: of_name.first() for name, of_name in seen.items()}, out / "reconstruction.png")
    return broadcast(report)


def load_whole(
    path: Path, vlm: FrozenVLM, size: int, checkpoint: Path, allow_vlm_mismatch: bool
) -> Autoencoder:
    """What decodes from all of z, as another checkpoint's reduced z is decoded.

    Args:
        path: of a checkpoint of the identity reducer.
        vlm: of the other checkpoint.
        size: of the pictures that the other draws.
        checkpoint: the other, for messages.
        allow_vlm_mismatch: see `FrozenVLM.check`.

    Raises:
        VugenError: it reduces z, or does not suit the other.
    """
    whole, _, card = load_autoencoder(path, vlm.device)
    vlm.check(card, path, allow_vlm_mismatch)
    if whole.reducer.recipe.kind != "identity":
        raise VugenError(
            f"--full {path} has a reducer of kind {whole.reducer.recipe.kind}: train one on all of z "
            "with `vugen train-reducer --set reducer.kind=identity`"
        )
    if card.image_size != size:
        raise VugenError(f"--full {path} draws {card.image_size} px, but {checkpoint} {size} px")
    return whole


class Seen:
    """What is kept of a set of pictures, originals or decoded ones, while they stream by."""

    def __init__(self) -> None:
        self.moments = Moments()
        self.quality: dict[int, dict[str, float]] = {}
        self.shown: dict[int, Tensor] = {}

    def add(self, indices: list[int], pictures: Tensor, features: Tensor) -> None:
        """Take in pictures, uint8 [B, 3, S, S], of these indices in the set, with their features [B, D]."""
        self.moments.update(features)
        self._show(dict(zip(indices, pictures, strict=True)))

    def compare(
        self,
        indices: list[int],
        originals: Tensor,
        decoded: Tensor,
        measures: dict[str, Callable[[Tensor, Tensor], Tensor]],
    ) -> None:
        """Take in how near decoded pictures are to their originals, uint8 [B, 3, S, S] both."""
        pair = originals.float() / 255, decoded.float() / 255
        found = {measure: of_pair(*pair).tolist() for measure, of_pair in measures.items()}
        for row, index in enumerate(indices):
            self.quality[index] = {measure: values[row] for measure, values in found.items()}

    def merge(self, other: "Seen") -> None:
        """Take in what another process saw of the set."""
        self.moments.merge(other.moments)
        self.quality |= other.quality
        self._show(other.shown)

    def figures(self, originals: "Seen") -> dict[str, Any]:
        """The means of what was compared, and `frechet`; in the set's order, so that they round alike."""
        rows = [self.quality[index] for index in sorted(self.quality)]
        means: dict[str, float | None] = {}
        for measure in rows[0]:
            finite = [row[measure] for row in rows if np.isfinite(row[measure])]  # JSON has no infinity
            means[measure] = float(np.mean(finite)) if finite else None
        distance = frechet_distance(self.moments, originals.moments) if len(rows) > 1 else None
        return {**means, "frechet": distance}

    def first(self) -> list[Tensor]:
        """The first pictures of the set, uint8 [3, S, S] each."""
        return [self.shown[index] for index in sorted(self.shown)]

    def _show(self, pictures: dict[int, Tensor]) -> None:
        together = self.shown | pictures
        self.shown = {index: together[index] for index in sorted(together)[:GRID_IMAGES]}


def save_pictures(folder: Path, pictures: Tensor, indices: list[int]) -> None:
    """Write uint8 [B, 3, S, S] as PNGs named by their indices in the set."""
    for index, picture in zip(indices, pictures, strict=True):
        with whole_file(folder / f"{index:06d}.png") as temporary:
            Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(temporary)


def save_rows(rows: dict[str, list[Tensor]], path: Path) -> None:
    """Write a grid in which every column is one picture, with the rows' names under their first picture.

    Args:
        rows: name -> uint8 [3, S, S] each, as many in every row; long rows are broken.
        path: the PNG to write.
    """
    count = len(next(iter(rows.values())))
    columns = min(COLUMNS, count)
    tiles: list[Tensor] = []
    labels: list[str] = []
    for begin in range(0, count, columns):
        for name, pictures in rows.items():
            row = pictures[begin : begin + columns]
            blank = torch.full_like(row[0], 255)
            tiles += row + [blank] * (columns - len(row))
            labels += [name] + [""] * (columns - 1)
    save_grid(torch.stack(tiles), path, columns, labels)
