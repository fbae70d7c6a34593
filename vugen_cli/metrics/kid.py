"""The kernel distance between two image sets (KID): unbiased MMD² with a cubic kernel, over random subsets.

Bińkowski et al. (2018), "Demystifying MMD GANs", with the subsets and the seed of torch-fidelity.
"""

from dataclasses import dataclass

import numpy as np

from vugen_cli.errors import TooFewImages, VugenError

SUBSETS = 100
SUBSET_SIZE = 1000
SEED = 2020


@dataclass(frozen=True)
class KernelDistance:
    """The distance and how far it can be trusted.

    Attributes:
        mean: over the subsets; the KID.
        std: over the subsets, the ± that KIDs are published with.
        standard_error: of the mean as an estimate from these images; None where a subset is the whole set.
        subset_size: images of each set in a subset.
    """

    mean: float
    std: float
    standard_error: float | None
    subset_size: int


def kernel_distance(
    a: np.ndarray, b: np.ndarray, subsets: int = SUBSETS, subset_size: int | None = None, seed: int = SEED
) -> KernelDistance:
    """Kernel distance between features [n, d] and [m, d].

    The subsets overlap, so their spread over √100 would be far too small an error. Subsets of k out of n
    images spread like samples of k, less what they share: the error of n images is std * √(k / (n - k))
    (Politis and Romano 1994, with the correction for drawing without replacement). Where the sets are nearly
    alike, a part of the spread shrinks faster than that and the error is too large, never too small.

    Args:
        a, b: features of the generated and of the real images; the order decides the subsets, not the sign.
        subsets: how many.
        subset_size: images of each set in a subset; None takes 1000, or half the smaller set if it has less.
        seed: of the subsets.

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
    rng = np.random.RandomState(seed)
    values = np.empty(subsets)
    for i in range(subsets):
        x = a[rng.choice(len(a), subset_size, replace=False)]
        y = b[rng.choice(len(b), subset_size, replace=False)]
        values[i] = mmd2(x, y)
    std = float(values.std())
    rest = smaller - subset_size
    return KernelDistance(
        mean=float(values.mean()),
        std=std,
        standard_error=std * (subset_size / rest) ** 0.5 if rest else None,
        subset_size=subset_size,
    )


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of [k, d] and [k, d] under (x·y / d + 1)³, in float64."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    k = len(x)
    within = 0.0
    for rows in (x, y):
        kernel = _cubic(rows, rows)
        within += (kernel.sum() - np.trace(kernel)) / (k * (k - 1))
    return float(within - 2 * _cubic(x, y).mean())


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    kernel = x @ y.T
    kernel /= x.shape[1]
    kernel += 1
    return kernel * kernel * kernel
