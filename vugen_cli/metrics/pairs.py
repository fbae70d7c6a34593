"""Full-reference image quality of pairs: PSNR, SSIM and (from `lpips`) LPIPS, one value a pair."""

from collections.abc import Callable, Collection
from itertools import zip_longest
from pathlib import PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F

from vugen_cli.errors import VugenError
from vugen_cli.metrics.bootstrap import RESAMPLES, SEED, interval, resampled_means
from vugen_cli.metrics.features import full_float32
from vugen_cli.metrics.image_sets import ImageSet, Read
from vugen_cli.metrics.report import Report, Score, versions
from vugen_cli.processes import in_order
from vugen_cli.progress import progress_bar

SSIM_WINDOW = 11  # Gaussian window of the paper: 11x11, sigma 1.5
SSIM_SIGMA = 1.5
BLOCK = 64  # pairs that a process of a job takes at a time


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in decibels, 10 log10(1 / MSE), over all channels of each pair.

    Args:
        a, b: float [B, 3, H, W] in [0, 1].

    Returns:
        float [B]; infinity where the two images are equal.

    Raises:
        VugenError: the shapes differ or the tensors are not float.

    Example:
        >>> psnr(torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 0.1)).round()
        tensor([20.])
    """
    a, b = _checked(a, b)
    return -10 * torch.log10((a - b).square().mean(dim=(1, 2, 3)))


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al., 2004), averaged over channels and over the window's valid
    positions.

    The paper's constants: 11x11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, data range 1, population
    covariances. The same as scikit-image's `structural_similarity(..., gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1)`.

    Args:
        a, b: float [B, 3, H, W] in [0, 1], H and W at least 11.

    Returns:
        float [B], at most 1.

    Raises:
        VugenError: the shapes differ, the tensors are not float, or an image is smaller than the window.
    """
    a, b = _checked(a, b)
    if min(a.shape[-2:]) < SSIM_WINDOW:
        raise VugenError(
            f"SSIM needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, got "
            f"{a.shape[-2]}x{a.shape[-1]}: compare larger images, or use PSNR."
        )
    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b, aa, bb, ab = _gaussian(torch.stack([a, b, a * a, b * b, a * b]))
    var_a, var_b, cov = aa - mean_a * mean_a, bb - mean_b * mean_b, ab - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def score_pairs(
    ours: ImageSet,
    theirs: ImageSet,
    metrics: Collection[str] = ("psnr", "ssim"),
    *,
    device: torch.device | str = "cpu",
) -> Report:
    """Mean PSNR, SSIM and LPIPS of the images of one set and those of another, first with first and so on.

    A pair of which one image is bad is left out; the record of its set names it.

    Args:
        ours, theirs: the sets; where both have file names, those must be the same up to the suffix.
        metrics: of "psnr" (dB), "ssim" and "lpips".
        device: where LPIPS's network runs.

    Returns:
        A report without an extractor.

    Raises:
        VugenError: the sets do not pair up, a pair differs in size, no pair is left, or LPIPS's weights are
            not there.
    """
    from vugen_cli.metrics.lpips import load_lpips

    measures: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"psnr": psnr, "ssim": ssim}
    hashes: dict[str, str] = {}
    if "lpips" in metrics:
        measures["lpips"], hashes = load_lpips(device)
    found: list[tuple[int, dict[str, float]]] = []
    pairs = zip_longest(ours.read(BLOCK), theirs.read(BLOCK))
    bar = progress_bar(pairs, desc="pairs", total=ours.total, unit="pair")
    for a, b in bar:
        _check_partners(ours, theirs, a, b)
        (index, ours_name, one), (_, theirs_name, other) = a, b
        if one is None or other is None:
            continue
        if one.shape != other.shape:
            raise VugenError(
                f"{ours_name} is {_size(one)} and its partner {theirs_name} is {_size(other)}: pairs must be "
                "of one size."
            )
        x, y = (torch.from_numpy(pixels)[None].double() / 255 for pixels in (one, other))
        with full_float32():
            found.append((index, {metric: measures[metric](x, y).item() for metric in metrics}))
    ours.merge()
    theirs.merge()
    rows = in_order(found)
    values = {metric: [row[metric] for row in rows] for metric in metrics}
    if not all(values.values()):
        bad = [*ours.bad, *theirs.bad][:1]
        raise VugenError(
            f"no pair of {ours.path} and {theirs.path} is readable{f' ({bad[0]})' if bad else ''}."
        )
    report = Report(
        scores=[_mean_of_pairs(metric, np.array(each)) for metric, each in values.items()],
        images=ours.describe(),
        reference=theirs.describe(),
        versions=versions(),
    )
    if hashes:
        report.lpips_weights_sha256 = hashes
    return report


def _mean_of_pairs(metric: str, values: np.ndarray) -> Score:
    finite = values[np.isfinite(values)]
    same = len(values) - len(finite)
    return Score(
        metric=metric,
        name={"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS (VGG16)"}[metric],
        value=float(finite.mean()) if len(finite) else None,  # JSON has no infinity
        interval=interval(resampled_means(finite)) if len(finite) > 1 else None,
        interval_method="bootstrap of the pairs",
        parameters={"pairs": len(values), "resamples": RESAMPLES, "seed": SEED},
        warning=f"{same} of {len(values)} pairs are equal: their infinite PSNR is left out."
        if same
        else None,
    )


def _check_partners(ours: ImageSet, theirs: ImageSet, a: Read | None, b: Read | None) -> None:
    if a is None or b is None:
        longer, goes_on = (theirs, b) if a is None else (ours, a)
        at = goes_on[1] if goes_on else ""
        raise VugenError(f"{ours.path} and {theirs.path} do not pair up: only {longer.path} goes on at {at}.")
    named = {"folder", "samples", "zip"}  # not tars, whose members are numbered as a rule
    if ours.kind in named and theirs.kind in named:
        stems = [PurePosixPath(name).with_suffix("") for _, name, _ in (a, b)]
        if stems[0] != stems[1]:
            raise VugenError(
                f"{ours.path} and {theirs.path} do not pair up: {a[1]} stands beside {b[1]}; give a pair the "
                f"same name and place in both."
            )


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[2]}x{pixels.shape[1]}"


def _checked(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair as float32, or float64 where it came so: half precision is too coarse for variances."""
    if a.shape != b.shape or a.ndim != 4:
        raise VugenError(
            f"a pair must be two image batches of one shape [B, 3, H, W], got {list(a.shape)} and "
            f"{list(b.shape)}: resize one of them first."
        )
    if not (a.is_floating_point() and b.is_floating_point()):
        raise VugenError(
            f"images must be float in [0, 1], got {a.dtype} and {b.dtype}: divide uint8 by 255 first."
        )
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype), b.to(dtype)


def _gaussian(x: torch.Tensor) -> torch.Tensor:
    """Blur [..., H, W] with the SSIM window, valid positions only -> [..., H - 10, W - 10]; separable."""
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=x.device) - SSIM_WINDOW // 2
    window = torch.exp(-0.5 * (offsets / SSIM_SIGMA).square())
    window = (window / window.sum()).to(x.dtype)
    flat = x.reshape(-1, 1, *x.shape[-2:])
    flat = F.conv2d(flat, window.view(1, 1, -1, 1))
    flat = F.conv2d(flat, window.view(1, 1, 1, -1))
    return flat.reshape(*x.shape[:-2], *flat.shape[-2:])
