"""Kernel distances between two image sets: KID, and CMMD on CLIP's embeddings.

KID is the unbiased MMD² with a cubic kernel over random subsets: Bińkowski et al. (2018), "Demystifying MMD
GANs", with the subsets and the seed of torch-fidelity. CMMD is the biased MMD² with a Gaussian kernel over
all images: Jayasumana et al. (2024), "Rethinking FID" (arXiv 2401.09603).
"""

from dataclasses import dataclass

import numpy as np

from vugen_cli.errors import TooFewImages, VugenError

SUBSETS = 100
SUBSET_SIZE = 1000
SEED = 2020
CMMD_SIGMA = 10.0  # of the kernel exp(-|x - y|² / (2 sigma²)), between embeddings of length 1
CMMD_SCALE = 1000.0
CMMD_BLOCK = 512  # rows of the kernel at a time: 30,000 images take 120 MB


@dataclass(frozen=True)
class KernelDistance:
    """The distance and how far it can be trusted.

    Attributes:
        mean: over the subsets; the KID.
        std: over the subsets, the ± that KIDs are published with.
        standard_error: of the mean as an estimate from these images.
        subset_size: images of each set in a subset.
    """

    mean: float
    std: float
    standard_error: float
    subset_size: int


def kernel_distance(
    a: np.ndarray, b: np.ndarray, subsets: int = SUBSETS, subset_size: int | None = None
) -> KernelDistance:
    """Kernel distance between features [n, d] and [m, d].

    The subsets overlap, so their spread over √100 would be far too small an error. It is that of the first
    order (the delta method): twice each image's part in the distance spreads over the n and the m images, and
    the mean over S subsets adds std / √S. Where the sets are nearly alike it is too large: an image's part is
    known from a subset alone.

    Args:
        a, b: features of the generated and of the real images; the order decides the subsets, not the sign.
        subsets: how many.
        subset_size: images of each set in a subset; None takes 1000, or half the smaller set if it has less.

    Raises:
        TooFewImages: a set is smaller than a subset or than four images.
        VugenError: the dimensions differ.
    """
    smaller = min(len(a), len(b))
    if subset_size is None:
        subset_size = SUBSET_SIZE if smaller >= SUBSET_SIZE else smaller // 2
    if subset_size < 2 or smaller < subset_size:
        raise TooFewImages(
            f"a kernel distance over subsets of {max(2, subset_size)} needs as many images of each set "
            f"(four at least), got {len(a)} and {len(b)}."
        )
    if a.shape[1] != b.shape[1]:
        raise VugenError(f"features of dimensions {a.shape[1]} and {b.shape[1]} cannot be compared.")
    rng = np.random.RandomState(SEED)
    values, variances = np.empty(subsets), np.empty(subsets)
    for i in range(subsets):
        x = a[rng.choice(len(a), subset_size, replace=False)]
        y = b[rng.choice(len(b), subset_size, replace=False)]
        of_x, of_y = _parts(x, y)
        values[i] = of_x.mean() + of_y.mean()
        variances[i] = np.var(of_x, ddof=1) / len(a) + np.var(of_y, ddof=1) / len(b)
    std = float(values.std())
    return KernelDistance(
        mean=float(values.mean()),
        std=std,
        standard_error=float(4 * variances.mean() + std**2 / subsets) ** 0.5,
        subset_size=subset_size,
    )


def _parts(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each image's part in the distance, [k] twice: its kernel with its own set less that with the other."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    between, parts = _cubic(x, y), []
    for rows, beside in ((x, between.mean(1)), (y, between.mean(0))):
        kernel = _cubic(rows, rows)
        parts.append((kernel.sum(1) - kernel.diagonal()) / (len(rows) - 1) - beside)
    return parts[0], parts[1]


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    kernel = x @ y.T
    kernel /= x.shape[1]
    kernel += 1
    return kernel * kernel * kernel


def cmmd(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """CMMD between CLIP embeddings [n, d] and [m, d] of any length, and its standard error, in float64.

    As the published script: all pairs count, those of an image with itself too. The error is that of the
    first order (the delta method); it is too small where the sets are nearly alike.

    Raises:
        VugenError: the dimensions differ.
    """
    if a.shape[1] != b.shape[1]:
        raise VugenError(f"features of dimensions {a.shape[1]} and {b.shape[1]} cannot be compared.")
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a.astype(float), b.astype(float)))
    of_x, of_y = _gaussian_means(x, x)[0], _gaussian_means(y, y)[0]
    of_x_to_y, of_y_to_x = _gaussian_means(x, y)
    value = of_x.mean() + of_y.mean() - 2 * of_x_to_y.mean()
    variance = np.var(of_x - of_x_to_y, ddof=1) / len(x) + np.var(of_y - of_y_to_x, ddof=1) / len(y)
    return CMMD_SCALE * float(value), CMMD_SCALE * 2 * float(variance**0.5)


def _gaussian_means(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of the Gaussian kernel between unit rows [n, d] and [m, d]: of each x [n], and of each y [m]."""
    of_x, of_y = np.empty(len(x)), np.zeros(len(y))
    for first in range(0, len(x), CMMD_BLOCK):
        kernel = np.exp((x[first : first + CMMD_BLOCK] @ y.T - 1) / CMMD_SIGMA**2)  # |x - y|² = 2 - 2 x·y
        of_x[first : first + CMMD_BLOCK] = kernel.mean(axis=1)
        of_y += kernel.sum(axis=0) / len(x)
    return of_x, of_y
