"""The Fréchet distance between two image sets: streaming moments, the distance, and statistics files.

    d² = |mu_1 - mu_2|² + tr(S_1) + tr(S_2) - 2 tr((S_1 S_2)^(1/2))

On Inception features it is the FID of Heusel et al. (2017); on other features it is only a Fréchet distance,
and is called that. Everything here is float64, and memory is O(d²) however many images there are.
"""

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch

from vugen_cli.errors import VugenError
from vugen_cli.files import whole_file
from vugen_cli.moments import Moments

MAX_STATISTICS_BYTES = 4 << 30  # a covariance of 16,384 features is 2 GiB; more is no statistics file
JACKKNIFE_GROUPS = 10
SEED = 2020  # of their choice
IDENTITIES = ("weights_sha256", "vlm_fingerprint", "weights_fingerprint")


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a set's features, and where they come from as far as it is known.

    Attributes:
        mean: float64 [d].
        covariance: float64 [d, d], the unbiased estimate.
        n: how many images, None if the file does not say.
        label: the `Extractor.label` they were taken with, None if the file does not say.
        identity: the `Extractor.identity`, empty if the file does not say.
        resize: the `Extractor.resize`, None if the file does not say.
    """

    mean: np.ndarray
    covariance: np.ndarray
    n: int | None = None
    label: str | None = None
    identity: dict[str, str] = field(default_factory=dict)
    resize: str | None = None


def frechet_distance(a: Moments | Statistics, b: Moments | Statistics) -> float:
    """Squared Fréchet (2-Wasserstein) distance between two Gaussians, the number that FID reports.

    With S_i = L_i L_iᵀ the trace of (S_1 S_2)^(1/2) is the sum of the singular values of L_1ᵀ L_2. Taken from
    rank-revealing (pivoted) Cholesky factors it stays exact to rounding where covariances are singular (fewer
    images than features); a matrix square root or the eigenvalues of S_1 S_2 are off by 1e-7 there.

    Returns:
        A float, never negative; 0 up to rounding for equal statistics.

    Raises:
        VugenError: the dimensions differ or a statistic is not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise VugenError(
            f"statistics of dimensions {a.mean.size} and {b.mean.size} cannot be compared: "
            f"take both with the same features."
        )
    covariances = a.covariance, b.covariance
    if not all(np.isfinite(x).all() for x in (a.mean, b.mean, *covariances)):
        raise VugenError("statistics that are not finite cannot be compared: take them again.")
    left, right = (_pivoted_cholesky(covariance) for covariance in covariances)
    overlap = _nuclear_norm(left.T @ right)
    traces = float(np.trace(covariances[0]) + np.trace(covariances[1]))
    return max(0.0, float(np.sum((a.mean - b.mean) ** 2)) + traces - 2 * overlap)


def _nuclear_norm(matrix: np.ndarray) -> float:
    """Sum of the singular values of a float64 matrix, to a relative 1e-9 or better.

    The eigenvalues of the Gram matrix cost a third of a singular value decomposition, but hold the small
    values to half their digits only; where that could show in the sum, the decomposition is made after all.
    """
    if not matrix.size:
        return 0.0
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    threads = torch.get_num_threads()
    # The reductions wait on memory and on each other: more threads gain little on an idle machine and cost
    # tenfold on a shared one.
    torch.set_num_threads(1)
    try:
        squares = torch.linalg.eigvalsh(torch.from_numpy(gram)).clamp_min(0)
        noise = torch.finfo(torch.float64).eps * squares[-1]  # what rounding leaves of each eigenvalue
        values = squares.sqrt()
        error = (noise / values.clamp_min(noise.sqrt())).sum()
        if error > 1e-9 * values.sum():
            values = torch.linalg.svdvals(torch.from_numpy(matrix))
    finally:
        torch.set_num_threads(threads)
    return float(values.sum())


def _pivoted_cholesky(covariance: np.ndarray) -> np.ndarray:
    """L [d, rank] with L Lᵀ = covariance [d, d], positive semi-definite; LAPACK's default tolerance."""
    symmetric = (covariance + covariance.T) / 2
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(symmetric, lower=1)
    lower = np.empty((len(symmetric), rank))
    lower[pivots - 1] = np.tril(factor)[:, :rank]
    return lower


def frechet_standard_error(
    a: np.ndarray,
    b: np.ndarray,
    prompts: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
) -> float | None:
    """Standard error of the Fréchet distance between two sets of features [n, d], [m, d].

    Args:
        a, b: the features.
        prompts: of each set the number of each row's prompt, where several rows share one: they are no
            independent draws, so they are left out together, which takes ten prompts:
            None for fewer.

    The delete-a-group jackknife (Kott 2001): each set is cut into ten groups, the distance taken without one
    of them at a time, and the two sets' variances added. Resampling with replacement would not do: repeated
    images raise the distance itself. Twenty distances, so dear where d is large.
    """
    variance = 0.0
    whole = Moments(a), Moments(b)
    for side, rows in enumerate((a, b)):
        # At random: of images whose classes come in turn, every tenth is no smaller set of the same kind.
        rng = np.random.default_rng(SEED)
        units, asked = rng.permutation(len(rows)), prompts[side]
        if asked is not None and asked.max() + 1 < len(rows):
            if asked.max() + 1 < JACKKNIFE_GROUPS:
                return None
            units = rng.permutation(asked.max() + 1)[asked]
        groups = [Moments(rows[units % JACKKNIFE_GROUPS == group]) for group in range(JACKKNIFE_GROUPS)]
        values = []
        for left_out in groups:
            rest = Moments()
            for group in groups:
                if group is not left_out:
                    rest.merge(group)
            values.append(frechet_distance(rest, whole[1 - side]))
        variance += (JACKKNIFE_GROUPS - 1) * float(np.var(values))
    return variance**0.5


def save_statistics(path: Path, statistics: Statistics, spatial: Statistics | None = None) -> None:
    """Write mean and covariance as `.npz` in pytorch-fid's layout (mu, sigma), those of sFID's features as
    guided-diffusion (ADM) names them (mu_s, sigma_s), with n and the extractor beside them.

    The file appears whole or not at all.

    Raises:
        VugenError: the file cannot be written.
    """
    arrays: dict[str, Any] = {"mu": statistics.mean, "sigma": statistics.covariance, **statistics.identity}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    if statistics.n is not None:
        arrays["n"] = statistics.n
    if statistics.label is not None:
        arrays["features"] = statistics.label
    if statistics.resize is not None:
        arrays["resize"] = statistics.resize
    path = Path(path)
    if path.suffix != ".npz":  # np.savez would add it to the temporary name, and readers look for it
        raise VugenError(f"statistics are written as .npz, not {path.name}: name a file that ends in .npz.")
    with whole_file(path) as temporary:
        np.savez(temporary, **arrays)


def load_statistics(path: Path, spatial: bool = False) -> Statistics:
    """Read statistics from `.npz`: as `save_statistics` writes, or in the layout of pytorch-fid (mu, sigma)
    or of guided-diffusion (ADM; mu, sigma, and mu_s, sigma_s of sFID). Nothing is unpickled.

    Args:
        path: the file.
        spatial: read those of sFID's features instead.

    Raises:
        VugenError: the file is missing, damaged, or holds no such arrays.
    """
    path = Path(path)
    if not path.is_file():
        raise VugenError(f"no statistics at {path}: there is no such file.")
    wanted = ("mu_s", "sigma_s") if spatial else ("mu", "sigma")
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
        if not sizes.keys() >= set(wanted):
            raise ValueError(f"expected the arrays {' and '.join(wanted)}")
        if (size := sum(sizes.values()) - sizes.get("arr_0", 0)) > MAX_STATISTICS_BYTES:
            raise ValueError(f"{size} bytes is too large")
        with np.load(path, allow_pickle=False) as arrays:
            mean, covariance = (np.asarray(arrays[name], dtype=np.float64) for name in wanted)
            n = int(arrays["n"]) if "n" in sizes else None
            label = str(arrays["features"]) if "features" in sizes else None
            resize = str(arrays["resize"]) if "resize" in sizes else None
            identity: dict[str, str] = {name: str(arrays[name]) for name in IDENTITIES if name in sizes}
    # np.load raises many kinds on a damaged file, zlib.error and pickle refusals among them.
    except Exception as error:
        raise VugenError(f"{path} cannot be read as statistics: {error}.") from error
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size) or not mean.size:
        raise VugenError(
            f"{path} holds {wanted[0]} {list(mean.shape)} and {wanted[1]} {list(covariance.shape)}: expected "
            f"[d] and [d, d]."
        )
    return Statistics(mean, covariance, n, label, identity, resize)
