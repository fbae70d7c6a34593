"""Running mean and covariance of many vectors."""

import numpy as np
import torch

from vugen_cli.errors import VugenError

BLOCK_ROWS = 512  # rows folded in at once: fixed, so that the sums do not depend on the batch size


class Moments:
    """Streaming, mergeable mean and covariance of feature vectors, in float64.

    Blocks are centred by their own mean and merged by the pairwise update of Chan, Golub and LeVeque (1983),
    which does not lose digits where the mean is large beside the spread, as sums of squares do.

    Args:
        rows: [n, d] to begin with, as by `update`.

    Example:
        >>> moments = Moments(np.array([[0.0], [2.0]]))
        >>> moments.n, moments.mean, moments.covariance
        (2, array([1.]), array([[2.]]))
    """

    def __init__(self, rows: np.ndarray | None = None) -> None:
        self.n = 0
        self._folded = 0  # of the n rows, those already in _mean and _scatter; the rest wait in _pending
        self._mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))  # sum of outer products of deviations from the mean
        self._pending: list[np.ndarray] = []
        if rows is not None:
            for start in range(0, len(rows), BLOCK_ROWS):  # in blocks: float64 would double a large set
                self.update(rows[start : start + BLOCK_ROWS])

    def update(self, features: np.ndarray | torch.Tensor) -> None:
        """Add rows [B, d] of any real dtype.

        Raises:
            VugenError: d differs from the rows before, or a feature is not finite.
        """
        if isinstance(features, torch.Tensor):
            # bfloat16 has no numpy dtype; float64 holds every narrower float exactly.
            features = features.detach().to("cpu", torch.float64).numpy()
        # A copy, since the caller may reuse its buffer before the rows are folded in.
        rows = np.array(features, dtype=np.float64)
        if rows.ndim != 2:
            raise VugenError(f"features must be [B, d], got {list(rows.shape)}.")
        if not len(rows):
            return
        self._expect(rows.shape[1])
        if not np.isfinite(rows).all():
            raise VugenError(
                "the extractor returned features that are not finite: its weights may be damaged."
            )
        self._pending.append(rows)
        self.n += len(rows)
        if self.n - self._folded >= BLOCK_ROWS:
            waiting = np.concatenate(self._pending)
            whole = len(waiting) // BLOCK_ROWS * BLOCK_ROWS
            for start in range(0, whole, BLOCK_ROWS):
                self._fold(waiting[start : start + BLOCK_ROWS])
            self._pending = [waiting[whole:]] if whole < len(waiting) else []

    def merge(self, other: "Moments") -> None:
        """Add everything that `other` has seen, as from another process; `other` stays as it is.

        Raises:
            VugenError: the feature dimensions differ.
        """
        if not other.n:
            return
        other._fold_pending()
        self._fold_pending()
        self._expect(other._mean.size)
        self._combine(other._folded, other._mean, other._scatter)
        self.n = self._folded

    @property
    def mean(self) -> np.ndarray:
        """float64 [d]."""
        self._fold_pending()
        return self._mean

    @property
    def covariance(self) -> np.ndarray:
        """float64 [d, d], divided by n - 1.

        Raises:
            VugenError: fewer than two rows were seen.
        """
        if self.n < 2:
            raise VugenError(f"a covariance needs at least 2 images, got {self.n}.")
        self._fold_pending()
        return self._scatter / (self.n - 1)

    def _expect(self, dim: int) -> None:
        if not self._mean.size:
            self._mean, self._scatter = np.zeros(dim), np.zeros((dim, dim))
        if self._mean.size != dim:
            raise VugenError(f"features of dimension {dim} cannot be added to features of {self._mean.size}.")

    def _fold_pending(self) -> None:
        if self._pending:
            waiting, self._pending = np.concatenate(self._pending), []
            self._fold(waiting)

    def _fold(self, rows: np.ndarray) -> None:
        mean = rows.mean(axis=0)
        centred = rows - mean
        # numpy computes x.T @ x by a symmetric rank-k update: half the work, exactly symmetric.
        self._combine(len(rows), mean, centred.T @ centred)

    def _combine(self, n: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self._folded + n
        delta = mean - self._mean
        self._mean = self._mean + delta * (n / total)
        self._scatter += scatter
        self._scatter += np.outer(delta, delta * (self._folded * n / total))
        self._folded = total
