"""How easy a latent space is to sample: the spread of its channels, their rank, and how Gaussian they are.

The sampler starts from a standard normal. The nearer z̃ is to one, the less it has to learn: channels that
repeat each other lower the effective rank, heavy tails and gaps raise the negentropy.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import entr
from torch import Tensor

from vugen_cli.files import whole_file, write_json
from vugen_cli.moments import Moments

REACH, BIN = 8.0, 0.05  # the histograms' range in standard deviations, and the width of a bin
PANELS = 16  # channels whose histogram is drawn


def describe_latents(batches: Iterable[Tensor]) -> dict[str, Any]:
    """Diagnostics of normalised latents, streaming.

    Args:
        batches: z̃ [B, h, w, c], each channel of about zero mean and unit variance.

    Returns:
        `tokens` (how many places were seen), `effective_rank`, `eigenvalues` of the covariance (largest
        first), and lists with one value a channel: `mean`, `std`, `skewness`, `excess_kurtosis`, `negentropy`
        (nats), `histogram` (density over [-8, 8]).
    """
    moments = Moments()
    counts: Tensor = torch.zeros(0)
    cubes = fourths = torch.zeros(())
    bins = round(2 * REACH / BIN)
    for batch in batches:
        rows = batch.detach().cpu().double().flatten(0, -2)
        moments.update(rows)
        cubes, fourths = cubes + rows.pow(3).sum(0), fourths + rows.pow(4).sum(0)
        if not len(counts):
            counts = torch.zeros(rows.shape[1], bins)
        place = ((rows + REACH) / BIN).floor().clamp(0, bins - 1).long()
        counts.scatter_add_(1, place.T, torch.ones(place.T.shape))
    mean, covariance, n = moments.mean, moments.covariance, moments.n
    std = np.sqrt(np.diag(covariance))
    alive = std > 0  # of a dead channel all that follows is 0
    scale = np.where(alive, std, 1)
    third, fourth = np.asarray(cubes) / n, np.asarray(fourths) / n
    variance = std**2
    skewness = (third - 3 * mean * variance - mean**3) / scale**3
    central = fourth - 4 * mean * third + 6 * mean**2 * (variance + mean**2) - 3 * mean**4
    density = (counts / counts.sum(1, keepdim=True) / BIN).double()
    eigenvalues = np.linalg.eigvalsh(covariance)[::-1]
    return {
        "tokens": n,
        "effective_rank": effective_rank(eigenvalues),
        "eigenvalues": eigenvalues.tolist(),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "skewness": skewness.tolist(),
        "excess_kurtosis": (alive * (central / scale**4 - 3)).tolist(),
        "negentropy": (alive * negentropy(density.numpy(), scale)).tolist(),
        "histogram": density.tolist(),
    }


def effective_rank(eigenvalues: np.ndarray) -> float:
    """exp of the entropy of a covariance's eigenvalues (Roy & Vetterli, 2007): from 1 to c."""
    share = np.clip(eigenvalues, 0, None)
    return float(np.exp(entr(share / share.sum()).sum()))


def negentropy(density: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Entropy that a Gaussian of the same variance has beyond a channel's, in nats: 0 is Gaussian.

    Args:
        density: [c, bins] histograms that integrate to one, bins of width `BIN`.
        std: [c].
    """
    return 0.5 * np.log(2 * math.pi * math.e * std**2) - entr(density).sum(1) * BIN


def save_latent_report(report: dict[str, Any], out: Path) -> Path:
    """Write a report as `<out>.latents.json` and its picture, `<out>.latents.png`, which is returned."""
    from matplotlib.figure import Figure

    write_json(out.with_suffix(".latents.json"), report)
    shown = min(PANELS, len(report["std"]))
    columns = min(4, shown + 1)
    rows = math.ceil((shown + 1) / columns)
    wide, high = 3.0 * columns, 2.2 * rows  # inches; margins are set: measuring labels takes seconds
    margins = {"left": 0.45 / wide, "right": 1 - 0.1 / wide, "bottom": 0.3 / high, "top": 1 - 0.3 / high}
    spaces = {"wspace": 0.2, "hspace": 0.35}
    figure = Figure(figsize=(wide, high))
    axes = figure.subplots(rows, columns, gridspec_kw=margins | spaces, squeeze=False)
    first, *panels = axes.flat
    first.bar(range(1, len(report["eigenvalues"]) + 1), report["eigenvalues"])
    first.set_title(f"eigenvalues, effective rank {report['effective_rank']:.1f} of {len(report['std'])}")
    centres = np.arange(-REACH + BIN / 2, REACH, BIN)
    for channel, axis in enumerate(panels):
        axis.set_visible(channel < shown)
        if channel < shown:
            axis.plot(
                centres, np.exp(-(centres**2) / 2) / math.sqrt(2 * math.pi), color="grey", linewidth=0.8
            )
            axis.plot(centres, report["histogram"][channel])
            axis.set_xlim(-4, 4)
            axis.set_title(f"channel {channel}, negentropy {report['negentropy'][channel]:.3f}")
    picture = out.with_suffix(".latents.png")
    with whole_file(picture) as temporary:
        figure.savefig(temporary, dpi=80, format="png")
    return picture
