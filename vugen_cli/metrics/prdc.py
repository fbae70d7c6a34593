"""Precision and recall, density and coverage: does each image lie where the other set's images are?

A set's manifold is the union of balls around its images that reach to their k-th nearest neighbour.
Precision and recall: Kynkäänniemi et al. (2019), "Improved Precision and Recall Metric", k = 3. Density and
coverage: Naeem et al. (2020), "Reliable Fidelity and Diversity Metrics", k = 5.
"""

from collections.abc import Iterator

import numpy as np
import torch

from vugen_cli.errors import TooFewImages, VugenError

PRECISION_K = 3
DENSITY_K = 5
BLOCK = 1024  # rows of the distance matrix that are held at once


def precision_recall(generated: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each generated image lies in a ball of the real ones, bool [n]; and the reverse, bool [m].

    As published, a distance equal to the radius is inside. In blocks: memory is O(n + m).

    Raises:
        TooFewImages: a set has no more images than neighbours.
        VugenError: the dimensions differ.
    """
    g, r = _centred(generated, real, PRECISION_K)
    precision, recall = torch.zeros(len(g), dtype=torch.bool), torch.zeros(len(r), dtype=torch.bool)
    real_radii, generated_radii = _radii(r, PRECISION_K), _radii(g, PRECISION_K)
    for start, squares in _squared_distances(r, g):
        block = slice(start, start + BLOCK)
        precision |= (squares <= real_radii[block, None]).any(dim=0)
        recall[block] = (squares <= generated_radii).any(dim=1)
    return precision.numpy(), recall.numpy()


def density_coverage(generated: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Balls of real images that hold a generated one, over k, float [n]; whether a ball holds one, bool [m].

    As published, a distance equal to the radius is outside. Raises as `precision_recall`.
    """
    g, r = _centred(generated, real, DENSITY_K)
    balls, coverage = torch.zeros(len(g), dtype=torch.long), torch.zeros(len(r), dtype=torch.bool)
    radii = _radii(r, DENSITY_K)
    for start, squares in _squared_distances(r, g):
        inside = squares < radii[start : start + BLOCK, None]
        balls += inside.sum(dim=0)
        coverage[start : start + BLOCK] = inside.any(dim=1)
    return balls.double().numpy() / DENSITY_K, coverage.numpy()


def _centred(generated: np.ndarray, real: np.ndarray, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    for rows, what in ((generated, "generated"), (real, "real")):
        if len(rows) <= k:
            raise TooFewImages(f"neighbourhoods of {k} need at least {k + 1} {what} images, got {len(rows)}.")
    if generated.shape[1] != real.shape[1]:
        raise VugenError(
            f"features of dimensions {generated.shape[1]} and {real.shape[1]} cannot be compared."
        )
    # Distances do not change with the origin, and float32 keeps more of them near it.
    centre = real.mean(axis=0, dtype=np.float64)
    g, r = (torch.from_numpy((rows - centre).astype(np.float32)) for rows in (generated, real))
    return g, r


def _radii(rows: torch.Tensor, k: int) -> torch.Tensor:
    """Squared distance of every row to its k-th nearest other row."""
    radii = torch.empty(len(rows))
    for start, squares in _squared_distances(rows, rows):
        squares.diagonal(start).fill_(-1)  # itself comes first, whatever rounding says
        radii[start : start + BLOCK] = squares.topk(k + 1, dim=1, largest=False).values[:, k]
    return radii


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Blocks of rows of the squared distances between a [n, d] and b [m, d], with where each starts."""
    b_norms = b.square().sum(dim=1)
    for start in range(0, len(a), BLOCK):
        rows = a[start : start + BLOCK]
        scale = rows.square().sum(dim=1)[:, None] + b_norms
        squares = torch.addmm(scale, rows, b.T, alpha=-2)
        # What rounding cannot tell from equal is equal: copies of one image are at distance 0.
        yield start, squares.masked_fill_(squares < 1e-6 * scale, 0)
