"""Full-reference image quality of pairs: PSNR and SSIM, one value a pair."""

import torch
import torch.nn.functional as F

from vugen_cli.errors import VugenError

SSIM_WINDOW = 11  # Gaussian window of the paper: 11x11, sigma 1.5
SSIM_SIGMA = 1.5


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
