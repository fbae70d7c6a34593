"""Scores of an image set: both sides opened, features extracted once, and how every number was obtained."""

import importlib.metadata
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from vugen_cli.errors import TooFewImages, VugenError
from vugen_cli.metrics import inception_score, kernel, manifold
from vugen_cli.metrics.features import Extractor, extract
from vugen_cli.metrics.frechet import (
    Statistics,
    frechet_distance,
    frechet_standard_error,
    load_statistics,
    save_statistics,
)
from vugen_cli.metrics.image_sets import ImageSet, npz_names, open_images
from vugen_cli.moments import Moments
from vugen_cli.processes import is_first
from vugen_cli.version import __version__

NAMES = {
    "fid": "FID",
    "kid": "KID",
    "is": "Inception Score",
    "sfid": "sFID",
    "pr": "precision, recall",
    "dc": "density, coverage",
}
OUTPUTS = {  # what each metric is taken on
    "fid": "features",
    "kid": "features",
    "is": "logits",
    "sfid": "spatial",
    "pr": "features",
    "dc": "features",
}
STATISTICS = {"fid": {"mu", "sigma"}, "sfid": {"mu_s", "sigma_s"}}  # arrays that suffice for a metric
JACKKNIFE_DIM = 512  # Fréchet distances on more features get no interval: twenty of them would take minutes
NORMAL_95 = 1.96
SPOKEN = {"inception": "Inception", "vlm": "VLM", "clip": "CLIP", "dinov2": "DINOv2"}


class _Side:
    """One of the two sets: its images, the statistics that stand in for them, and what was read of it."""

    def __init__(
        self, role: str, path: Path, extractor: Extractor, count: int | None, metrics: Collection[str]
    ):
        self.role, self.path, self.extractor = role, path, extractor
        self.statistics: dict[str, Statistics] = {}
        self.features: dict[str, np.ndarray] = {}
        self.record: dict[str, Any] = {}
        self.images: ImageSet | None = None
        names = npz_names(path) if path.suffix.lower() == ".npz" and path.is_file() else set()
        # ADM's files hold images and the statistics of a larger set; like ADM's evaluator, take those for
        # the distances between Gaussians and the images for the rest.
        for metric, arrays in STATISTICS.items():
            if metric in metrics and names >= arrays:
                statistics = load_statistics(path, spatial=metric == "sfid")
                if statistics_fit(path, statistics, extractor, has_images="arr_0" in names):
                    self.statistics[OUTPUTS[metric]] = statistics
        self.given = set(self.statistics)
        unserved = [name for name in metrics if name not in STATISTICS or OUTPUTS[name] not in self.given]
        self.wanted = sorted({OUTPUTS[name] for name in unserved})
        if unserved and names >= {"mu", "sigma"} and "arr_0" not in names:
            needy = " and ".join(f"--{name}" for name in unserved)
            raise VugenError(
                f"{path} holds no images and not all that {needy} needs: give images as the {role}."
            )
        if unserved:
            self.images = open_images(path, count)

    def read(self, batch_size: int | None, cache: Path | None, progress: bool) -> None:
        """Extract the features that are wanted and fill in the record."""
        if self.images is None:
            counts = [statistics.n for statistics in self.statistics.values()]
            self.record = {"path": str(self.path), "kind": "statistics", "count": counts[0], "bad": []}
            return
        self.features, self.record = extract(
            self.images,
            self.extractor,
            self.wanted,
            batch_size=batch_size,
            cache=cache,
            role=self.role,
            progress=progress,
        )
        if self.images.count < 2:
            bad = self.images.bad
            which = f" ({len(bad)} could not be read, the first {bad[0]})" if bad else ""
            raise VugenError(
                f"{self.path} has {self.images.count} readable images{which}: a score needs at least 2."
            )
        if self.statistics:
            self.record["statistics"] = (
                next(iter(self.statistics.values())).n or "of an unknown number of images"
            )

    def gaussian(self, output: str) -> Statistics:
        """Mean and covariance of one of the features: given, or of the images."""
        if output not in self.statistics:
            moments = Moments(self.features[output])
            self.statistics[output] = Statistics(
                moments.mean,
                moments.covariance,
                moments.n,
                self.extractor.label,
                dict(self.extractor.identity),
            )
        return self.statistics[output]


def score_sets(
    images: Path,
    reference: Path | None,
    extractor: Extractor | str = "nano",
    metrics: Collection[str] = ("fid",),
    *,
    count: int | None = None,
    batch_size: int | None = None,
    save_stats: Path | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores of a set of images, with all that is needed to know how they were obtained.

    Args:
        images, reference: anything `open_images` takes, or an `.npz` of statistics for the Fréchet distances.
            The Inception Score alone needs no reference.
        extractor: what the images are compared by, or the name of a VLM to compare by its vision features.
        metrics: of "fid", "kid", "is", "sfid", "pr" (precision and recall), "dc" (density and coverage).
        count: only this many images of each set, from its start.
        batch_size: images a forward pass; the result depends on it only through the network's rounding.
        save_stats: also write the reference's statistics here.
        cache: folder of cached features (`features.cache_folder`), None for none.
        progress: show a bar on standard error.

    Returns:
        {"scores": [{"metric", "name", "value", ...}], "features", "weights_sha256" or another hash,
        "resize", "images": {...}, "reference": {...} or None, "versions": {...}, "warning": str or None};
        JSON-able. A score may have "std", "standard_error", "interval" [low, high] at 95% and "parameters",
        and has a "warning" of its own or None; its value is None where a set is too small for it. {} on all
        but the first process of a job, which share the extraction.

    Raises:
        VugenError: a set cannot be read, is too small for the only metric, or has statistics of another
            extractor.
    """
    if isinstance(extractor, str):
        from vugen_cli.metrics.encoders import vlm_extractor
        from vugen_cli.vlm.frozen import load_vlm

        frozen = load_vlm(extractor)
        extractor = vlm_extractor(frozen, frozen.device)
    if extractor.name != "inception":
        for metric in {"is", "sfid"}.intersection(metrics):
            raise VugenError(
                f"{NAMES[metric]} is defined on the Inception network alone: drop --{metric} or score with "
                f"--features inception."
            )
    if save_stats is not None and "fid" not in metrics:
        raise VugenError("--save-stats keeps the statistics behind --fid: ask for --fid too.")
    # Both are opened before either is read: a wrong path should not cost a pass over the other set.
    ours = _Side("images", Path(images), extractor, count, metrics)
    theirs = None
    if reference is not None:
        theirs = _Side("reference", Path(reference), extractor, count, set(metrics) - {"is"})
        theirs.read(batch_size, cache, progress)
    elif set(metrics) != {"is"}:
        raise VugenError("only the Inception Score needs no reference: give --reference.")
    ours.read(batch_size, cache, progress)
    if not is_first():
        return {}
    if save_stats is not None and theirs is not None:
        spatial = theirs.gaussian("spatial") if "sfid" in metrics else None
        save_statistics(save_stats, theirs.gaussian("features"), spatial)
    scores: list[dict[str, Any]] = []
    for metric in (name for name in NAMES if name in metrics):
        try:
            scores += _SCORES[metric](ours, theirs or ours, metric)
        except TooFewImages as error:
            if len(metrics) == 1:
                raise
            # The others are worth their pass over the images; this one says why it has no value.
            scores.append({"metric": metric, "name": NAMES[metric], "value": None, "warning": str(error)})
    if extractor.name != "inception":
        for score in scores:
            score["metric"], score["name"] = _foreign_name(score["metric"], extractor.name)
    return {
        "scores": scores,
        "features": extractor.label,
        **extractor.identity,
        "resize": extractor.resize,
        "images": ours.record,
        "reference": theirs.record if theirs else None,
        "versions": versions(),
        "warning": extractor.warning,
    }


def versions() -> dict[str, str]:
    """The versions of everything that had a hand in a number."""
    packages = (
        "torch",
        "torch-fidelity",
        "transformers",
        "open-clip-torch",
        "numpy",
        "scipy",
        "pillow",
        "simplejpeg",
    )
    return {"vugen-cli": __version__, **{name: importlib.metadata.version(name) for name in packages}}


def statistics_fit(path: Path, statistics: Statistics, extractor: Extractor, has_images: bool) -> bool:
    """Whether a statistics file fits the extractor; False where it does not but has images to use instead.

    A file without a label is in the layout of pytorch-fid or ADM, which only ever hold Inception features.

    Raises:
        VugenError: it does not fit and there are no images.
    """
    if statistics.label is None:
        if extractor.name == "inception":
            return True
        found = "Inception features (it names no other)"
    elif statistics.label != extractor.label:
        found = f"'{statistics.label}'"
    elif statistics.identity != extractor.identity:
        found = f"the same network with other weights ({statistics.identity})"
    else:
        return True
    if has_images:
        return False
    raise VugenError(
        f"{path} holds statistics of {found}, not of '{extractor.label}' {extractor.identity}: "
        f"give images as the reference, or score with those features."
    )


def _frechet(ours: _Side, theirs: _Side, metric: str) -> list[dict[str, Any]]:
    output = OUTPUTS[metric]
    a, b = ours.gaussian(output), theirs.gaussian(output)
    score: dict[str, Any] = {
        "metric": metric,
        "name": NAMES[metric],
        "value": frechet_distance(a, b),
        "warning": _singular(a, b),
    }
    measured = output not in ours.given | theirs.given
    if measured and a.mean.size <= JACKKNIFE_DIM and score["warning"] is None:
        error = frechet_standard_error(ours.features[output], theirs.features[output])
        score |= _normal_interval(score["value"], error, "jackknife over ten groups of each set")
    return [score]


def _singular(images: Statistics, reference: Statistics) -> str | None:
    dim = images.mean.size
    small = [
        f"{statistics.n} {role}"
        for role, statistics in (("images", images), ("reference images", reference))
        if statistics.n is not None and statistics.n <= dim
    ]
    if not small:
        return None
    return (
        f"Only {' and '.join(small)} for {dim} features: the covariance is singular and the distance "
        f"biased upwards; compare it only with scores from as many images."
    )


def _kernel(ours: _Side, theirs: _Side, metric: str) -> list[dict[str, Any]]:
    distance = kernel.kernel_distance(ours.features["features"], theirs.features["features"])
    score: dict[str, Any] = {
        "metric": metric,
        "name": NAMES[metric],
        "value": distance.mean,
        "std": distance.std,
        "parameters": {
            "subsets": kernel.SUBSETS,
            "subset_size": distance.subset_size,
            "kernel": "(x·y / d + 1)³",
            "seed": kernel.SEED,
        },
        "warning": None,
    }
    if distance.standard_error is not None:
        score |= _normal_interval(
            distance.mean, distance.standard_error, "subsampling, from the subsets' spread"
        )
    if distance.subset_size < kernel.SUBSET_SIZE:
        score["warning"] = (
            f"Too few images for the usual subsets of {kernel.SUBSET_SIZE}: they hold "
            f"{distance.subset_size}, which changes the spread but not what is estimated."
        )
    return [score]


def _inception_score(ours: _Side, _: _Side, metric: str) -> list[dict[str, Any]]:
    logits = ours.features["logits"]
    found = inception_score.inception_score(logits)
    score = {
        "metric": metric,
        "name": NAMES[metric],
        "value": found.mean,
        "std": found.std,
        **_normal_interval(found.mean, found.standard_error, "bootstrap of the images of each split"),
        "parameters": {"splits": inception_score.SPLITS, "shuffled": True, "seed": inception_score.SEED},
        "warning": None,
    }
    if len(logits) < 5000:
        score["warning"] = (
            f"{len(logits)} images are {len(logits) // inception_score.SPLITS} a split: the score grows with "
            f"their number; compare it only with scores from as many images."
        )
    return [score]


def _precision_recall(ours: _Side, theirs: _Side, _: str) -> list[dict[str, Any]]:
    found = manifold.compare_manifolds(ours.features["features"], theirs.features["features"], density_k=None)
    return _means(precision=found.precision, recall=found.recall, k=manifold.PRECISION_K)


def _density_coverage(ours: _Side, theirs: _Side, _: str) -> list[dict[str, Any]]:
    found = manifold.compare_manifolds(
        ours.features["features"], theirs.features["features"], precision_k=None
    )
    return _means(density=found.density, coverage=found.coverage, k=manifold.DENSITY_K)


_SCORES = {
    "fid": _frechet,
    "sfid": _frechet,
    "kid": _kernel,
    "is": _inception_score,
    "pr": _precision_recall,
    "dc": _density_coverage,
}


def _means(k: int, **values: np.ndarray | None) -> list[dict[str, Any]]:
    return [
        {
            "metric": metric,
            "name": metric,
            "value": float(each.mean(dtype=np.float64)),
            "interval": list(manifold.bootstrap_interval(each)),
            "interval_method": "bootstrap of the images counted, the other set's manifold fixed",
            "parameters": {"k": k, "resamples": manifold.RESAMPLES, "seed": manifold.SEED},
            "warning": None,
        }
        for metric, each in values.items()
        if each is not None
    ]


def _normal_interval(value: float, error: float, method: str) -> dict[str, Any]:
    return {
        "standard_error": error,
        "interval": [value - NORMAL_95 * error, value + NORMAL_95 * error],
        "interval_method": method,
    }


def _foreign_name(metric: str, extractor: str) -> tuple[str, str]:
    """What a metric is called on features that are not Inception's: never FID, never KID."""
    key, name, usual = {
        "fid": ("frechet", "Fréchet distance", " (not FID)"),
        "kid": ("kernel", "kernel distance", " (not KID)"),
    }.get(metric, (metric, metric, ""))
    return f"{key}_{extractor}", f"{name} on {SPOKEN[extractor]} features{usual}"
