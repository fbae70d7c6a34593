"""Originals, what is decoded from all of z, and what is from z̃: the paper's Figure 2, with figures."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from vugen_cli.data.images import adm_crop
from vugen_cli.errors import VugenError
from vugen_cli.files import whole_file, write_json
from vugen_cli.metrics.encoders import vlm_extractor
from vugen_cli.metrics.frechet import frechet_distance
from vugen_cli.metrics.image_sets import image_batches, open_image_set
from vugen_cli.metrics.lpips import load_lpips
from vugen_cli.metrics.pairs import psnr, ssim
from vugen_cli.metrics.report import Record, Score, SetRecord
from vugen_cli.moments import Moments
from vugen_cli.pictures import save_grid
from vugen_cli.processes import broadcast, gather, is_first, world_size
from vugen_cli.progress import progress_bar
from vugen_cli.sampling.trained import decode_images, load_autoencoder
from vugen_cli.vlm.frozen import FrozenVLM, vlm_of

GRID_IMAGES = 16
COLUMNS = 8
DECODE_BATCH = 8


class Fidelity(Record):
    """How near reconstructions are to their originals."""

    psnr: float = Field(description="mean peak signal-to-noise ratio, in dB")
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
            `decoded/<i>.png`, for `vugen score`.
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
    size = card.image_size
    ways = {"z reduced": autoencoder}
    if full:
        whole, _, full_card = load_autoencoder(full, device)
        frozen.check(full_card, full, allow_vlm_mismatch)
        if whole.reducer.recipe.kind != "identity":
            raise VugenError(
                f"--full {full} has a reducer of kind {whole.reducer.recipe.kind}: train one on all of z "
                "with `vugen train-reducer --set reducer.kind=identity`"
            )
        if full_card.image_size != size:
            raise VugenError(f"--full {full} draws {full_card.image_size} px, but {checkpoint} {size} px")
        ways = {"z in full": whole, **ways}
    extractor = vlm_extractor(frozen, device)
    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
    with contextlib.suppress(VugenError):  # its weights are not at hand
        measures["lpips"], _ = load_lpips(device)
    source = open_image_set(images, limit=count)
    reference = Moments()
    moments = {name: Moments() for name in ways}
    quality: dict[str, dict[int, dict[str, float]]] = {name: {} for name in ways}  # by image
    shown: dict[str, dict[int, Tensor]] = {name: {} for name in ("original", *ways)}
    judged: dict[int, tuple[Tensor, Tensor]] = {}
    bar = progress_bar(total=source.total, desc="reconstruct", unit="img")
    with bar as progress, torch.no_grad():
        for indices, chunk in image_batches(source, DECODE_BATCH):
            squares = [adm_crop(i.transpose(1, 2, 0), size).copy() for i in chunk]
            originals = torch.stack([torch.from_numpy(i).permute(2, 0, 1) for i in squares])
            pictures = {"original": originals}
            reference.update(extractor.features(originals)["features"])
            for name, way in ways.items():
                decoded = decode_images(frozen, way, originals, seed, steps, indices).cpu()
                pictures[name] = decoded
                moments[name].update(extractor.features(decoded)["features"])
                pair = originals.float() / 255, decoded.float() / 255
                found = {measure: of_pair(*pair).tolist() for measure, of_pair in measures.items()}
                for row, index in enumerate(indices):
                    quality[name][index] = {measure: values[row] for measure, values in found.items()}
            if save_images:
                save_pictures(out / "originals", originals, indices)
                save_pictures(out / "decoded", pictures["z reduced"], indices)
            if judge:
                judged |= dict(zip(indices, zip(originals, pictures["z reduced"], strict=True), strict=True))
            for name, rows in shown.items():
                rows |= dict(zip(indices, pictures[name], strict=True))
                shown[name] = {index: rows[index] for index in sorted(rows)[:GRID_IMAGES]}
            progress.update(len(originals) * world_size())
    source.merge()
    for others in gather((reference, moments, quality, shown, judged))[1:]:
        reference.merge(others[0])
        for name in ways:
            moments[name].merge(others[1][name])
            quality[name] |= others[2][name]
        for name, rows in shown.items():
            rows |= others[3][name]
        judged |= others[4]
    if not source.count:
        raise VugenError(f"no readable image in {images}")
    if not is_first():
        return broadcast(None)
    figures: dict[str, dict[str, float | None]] = {}
    for name, of_image in quality.items():
        rows_of = [of_image[index] for index in sorted(of_image)]
        figures[name] = {measure: float(np.mean([row[measure] for row in rows_of])) for measure in measures}
        figures[name]["frechet"] = frechet_distance(moments[name], reference) if source.count > 1 else None
    about = {
        "features": extractor.label,
        "images": SetRecord(path=str(images), count=source.count, bad=source.bad),
        "checkpoint": str(checkpoint),
        "steps": steps or autoencoder.decoder.recipe.steps,
        "seed": seed,
        "size": size,
    }
    report = Reconstruction.model_validate({**figures["z reduced"], **about})
    if full:
        report.full = Fidelity.model_validate({**figures["z in full"], "checkpoint": str(full)})
    if judge:
        indices = sorted(judged)
        before, after = (torch.stack([judged[index][side] for index in indices]) for side in (0, 1))
        report.judges = judge(frozen, before, after, indices)
    write_json(out / "reconstruction.json", report.written())
    first = {name: [rows[index] for index in sorted(rows)[:GRID_IMAGES]] for name, rows in shown.items()}
    save_rows(first, out / "reconstruction.png")
    return broadcast(report)


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
