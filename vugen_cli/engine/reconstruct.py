"""Originals beside what the pixel decoder makes of their z̃: the paper's Figure 2 without the full z."""

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vugen_cli.data.images import adm_crop
from vugen_cli.engine.train_reducer import decode_images, load_autoencoder
from vugen_cli.errors import VugenError
from vugen_cli.files import write_json
from vugen_cli.metrics.image_sets import batches, open_images
from vugen_cli.metrics.pairs import psnr, ssim
from vugen_cli.pictures import save_grid
from vugen_cli.vlm.frozen import vlm_of

GRID_IMAGES = 16


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
) -> dict[str, Any]:
    """Encode, reduce and decode a set of images; measure and show what is lost.

    Writes `reconstruction.png` (originals above, decoded below, in rows of eight) and `reconstruction.json`.

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

    Returns:
        Mean `psnr` (dB) and `ssim` over the images, how many there were, and those that could not be read.
    """
    autoencoder, _, card = load_autoencoder(checkpoint, torch.device(device))
    frozen = vlm_of(card, checkpoint, vlm, device, allow_vlm_mismatch)
    source = open_images(images, limit=count)
    size = card["image_size"]
    quality: dict[str, list[torch.Tensor]] = {"psnr": [], "ssim": []}
    rows: list[torch.Tensor] = []
    total, shown = source.total, 0
    with tqdm(total=total, desc="reconstruct", unit="image") as progress:
        for chunk in batches(source, 8):
            originals = torch.stack(
                [
                    torch.from_numpy(adm_crop(i.transpose(1, 2, 0), size).copy()).permute(2, 0, 1)
                    for i in chunk
                ]
            )
            decoded = decode_images(frozen, autoencoder, originals, seed, steps, progress.n).cpu()
            quality["psnr"].append(psnr(originals.float() / 255, decoded.float() / 255))
            quality["ssim"].append(ssim(originals.float() / 255, decoded.float() / 255))
            if shown < GRID_IMAGES:
                rows += [originals, decoded]
                shown += len(originals)
            progress.update(len(originals))
    if not quality["psnr"]:
        raise VugenError(f"no readable image in {images}")
    result = {name: torch.cat(values).double().mean().item() for name, values in quality.items()}
    report = {
        **result,
        "images": {"path": str(images), "count": source.count, "bad": source.bad},
        "checkpoint": str(checkpoint),
        "steps": steps or autoencoder.decoder.recipe.steps,
        "seed": seed,
        "size": size,
    }
    write_json(out / "reconstruction.json", report)
    save_grid(torch.cat(rows), out / "reconstruction.png", columns=min(8, len(rows[0])))
    return report
