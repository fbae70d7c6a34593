"""Scores of an image set: features of both sides extracted once, and how every number was obtained."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vugen_cli.errors import TooFewImages, VugenError
from vugen_cli.metrics import inception_score, kid, prdc
from vugen_cli.metrics.bootstrap import RESAMPLES, SEED, bootstrap_interval
from vugen_cli.metrics.features import Extractor, extract
from vugen_cli.metrics.frechet import (
    Statistics,
    frechet_distance,
    frechet_standard_error,
    load_statistics,
    save_statistics,
)
from vugen_cli.metrics.image_sets import ImageSet, open_image_set
from vugen_cli.metrics.report import Report, Score, SetRecord, versions
from vugen_cli.moments import Moments
from vugen_cli.processes import is_first

JACKKNIFE_DIM = 512  # Fréchet distances on more features get no interval: twenty of them would take minutes
NORMAL_95 = 1.96
SPOKEN = {"inception": "Inception", "vlm": "VLM", "clip": "CLIP", "dinov2": "DINOv2"}


class Side:
    """One of the two sets: its images, the statistics that stand in for them, and what was read of it.

    Args:
        role: "images" or "reference".
        images: the set; ADM's files hold images and the statistics of a larger set, and other tools' those
            statistics alone.
        extractor: what looks at the images.
        metrics: what will be asked of this side.

    Attributes:
        features: float [n, d] by output of the extractor, after `read`.
        given: the outputs of which statistics were given.
        record: what was read, after `read`.

    Raises:
        VugenError: the statistics are of other features, or do not suffice and there are no images.
    """

    def __init__(self, role: str, images: ImageSet, extractor: Extractor, metrics: Collection[str]):
        self.role, self.images, self.extractor = role, images, extractor
        self.statistics: dict[str, Statistics] = {}
        self.features: dict[str, np.ndarray] = {}
        self.record: SetRecord | None = None
        # Like ADM's evaluator, take statistics for the distances between Gaussians and images for the rest.
        asked = [METRICS[name] for name in metrics]
        for metric in asked:
            if metric.arrays and images.arrays >= metric.arrays:
                statistics = load_statistics(images.path, spatial=metric.output == "spatial")
                has_images = images.kind != "statistics"
                if statistics_fit(images.path, statistics, extractor, has_images):
                    self.statistics[metric.output] = statistics
        self.given = set(self.statistics)
        unserved = [metric for metric in asked if not metric.arrays or metric.output not in self.given]
        self.wanted = sorted({metric.output for metric in unserved})
        if unserved and images.kind == "statistics":
            needy = " and ".join(f"--{metric.key}" for metric in unserved)
            raise VugenError(
                f"{images.path} holds no images and not all that {needy} needs: give images as the {role}."
            )

    def read(self, batch_size: int | None, cache: Path | None, progress: bool) -> None:
        """Extract the features that are wanted and fill in the record."""
        path = self.images.path
        if not self.wanted:
            count = next(iter(self.statistics.values())).n
            self.record = SetRecord(path=str(path), kind="statistics", count=count, bad=[])
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
                f"{path} has {self.images.count} readable images{which}: a score needs at least 2."
            )
        if self.statistics:
            self.record.statistics = (
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
) -> Report:
    """Scores of the images at a path against those at another; see `compare_sets`.

    Args:
        images, reference: anything `open_image_set` takes, `.npz` of statistics too for the Fréchet
            distances. The Inception Score alone needs no reference.
        extractor: what the images are compared by, or the name of a VLM to compare by its vision features.
        metrics: of "fid", "kid", "is", "sfid", "pr" (precision and recall), "dc" (density and coverage).
        count: only this many images of each set, from its start.
        batch_size, save_stats, cache, progress: as of `compare_sets`.

    Returns:
        The scores, and how they were obtained.

    Raises:
        VugenError: as `open_image_set` and `compare_sets`.
    """
    if isinstance(extractor, str):
        from vugen_cli.metrics.encoders import vlm_extractor
        from vugen_cli.vlm.frozen import load_vlm

        frozen = load_vlm(extractor)
        extractor = vlm_extractor(frozen, frozen.device)
    # Both are opened before either is read: a wrong path should not cost a pass over the other set.
    ours = open_image_set(images, count)
    theirs = None if reference is None else open_image_set(reference, count)
    return compare_sets(ours, theirs, extractor, metrics, batch_size, save_stats, cache, progress)


def compare_sets(
    images: ImageSet,
    reference: ImageSet | None,
    extractor: Extractor,
    metrics: Collection[str],
    batch_size: int | None = None,
    save_stats: Path | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> Report:
    """Scores of a set of images, with all that is needed to know how they were obtained.

    Args:
        images, reference: the two sets; the Inception Score alone needs no reference.
        extractor: what the images are compared by.
        metrics: keys of `METRICS`.
        batch_size: images a forward pass; the result depends on it only through the network's rounding.
        save_stats: also write the reference's statistics here.
        cache: folder of cached features (`features.cache_folder`), None for none.
        progress: show a bar on standard error.

    Returns:
        A report; a score's value is None where a set is too small for it. An empty report on all but the
        first process of a job, which share the extraction.

    Raises:
        VugenError: a set cannot be read, is too small for the only metric, or has statistics of another
            extractor.
    """
    if extractor.name != "inception":
        for metric in {"is", "sfid"}.intersection(metrics):
            raise VugenError(
                f"{METRICS[metric].name} is defined on the Inception network alone: drop --{metric} or score "
                f"with --features inception."
            )
    if save_stats is not None and "fid" not in metrics:
        raise VugenError("--save-stats keeps the statistics behind --fid: ask for --fid too.")
    if save_stats is not None and save_stats.suffix != ".npz":
        raise VugenError(f"--save-stats {save_stats}: statistics are written as .npz.")
    ours = Side("images", images, extractor, metrics)
    theirs = None
    if compared := set(metrics) - {"is"}:
        if reference is None:
            raise VugenError("only the Inception Score needs no reference: give --reference.")
        theirs = Side("reference", reference, extractor, compared)
        theirs.read(batch_size, cache, progress)
    ours.read(batch_size, cache, progress)
    if not is_first():
        return Report()
    if save_stats is not None and theirs is not None:
        spatial = theirs.gaussian("spatial") if "sfid" in metrics else None
        save_statistics(save_stats, theirs.gaussian("features"), spatial)
    scores: list[Score] = []
    for asked in (METRICS[key] for key in METRICS if key in metrics):
        try:
            scores += asked.measure(ours, theirs or ours, asked)
        except TooFewImages as error:
            if len(metrics) == 1:
                raise
            # The others are worth their pass over the images; this one says why it has no value.
            scores.append(Score(metric=asked.key, name=asked.name, value=None, warning=str(error)))
    if extractor.name != "inception":
        for score in scores:
            score.metric, score.name = _foreign_name(score.metric, extractor.name)
    report = Report(
        scores=scores,
        features=extractor.label,
        resize=extractor.resize,
        images=ours.record,
        reference=theirs.record if theirs else None,
        versions=versions(),
        warning=extractor.warning,
    )
    return report.model_copy(update=extractor.identity)


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


def _frechet(ours: Side, theirs: Side, metric: "Metric") -> list[Score]:
    output = metric.output
    a, b = ours.gaussian(output), theirs.gaussian(output)
    value, warning = frechet_distance(a, b), _singular(a, b)
    score = Score(metric=metric.key, name=metric.name, value=value, warning=warning)
    measured = output not in ours.given | theirs.given
    if measured and a.mean.size <= JACKKNIFE_DIM and warning is None:
        error = frechet_standard_error(ours.features[output], theirs.features[output])
        _add_normal_interval(score, value, error, "jackknife over ten groups of each set")
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


def _kernel(ours: Side, theirs: Side, metric: "Metric") -> list[Score]:
    distance = kid.kernel_distance(ours.features[metric.output], theirs.features[metric.output])
    parameters = {
        "subsets": kid.SUBSETS,
        "subset_size": distance.subset_size,
        "kernel": "(x·y / d + 1)³",
        "seed": kid.SEED,
    }
    warning = None
    if distance.subset_size < kid.SUBSET_SIZE:
        warning = (
            f"Too few images for the usual subsets of {kid.SUBSET_SIZE}: they hold "
            f"{distance.subset_size}, which changes the spread but not what is estimated."
        )
    score = Score(
        metric=metric.key,
        name=metric.name,
        value=distance.mean,
        std=distance.std,
        parameters=parameters,
        warning=warning,
    )
    if distance.standard_error is not None:
        how = "subsampling, from the subsets' spread"
        _add_normal_interval(score, distance.mean, distance.standard_error, how)
    return [score]


def _inception_score(ours: Side, _: Side, metric: "Metric") -> list[Score]:
    logits = ours.features[metric.output]
    found = inception_score.inception_score(logits)
    warning = None
    if len(logits) < 5000:
        warning = (
            f"{len(logits)} images are {len(logits) // inception_score.SPLITS} a split: the score grows with "
            f"their number; compare it only with scores from as many images."
        )
    score = Score(
        metric=metric.key,
        name=metric.name,
        value=found.mean,
        std=found.std,
        parameters={"splits": inception_score.SPLITS, "shuffled": True, "seed": inception_score.SEED},
        warning=warning,
    )
    _add_normal_interval(score, found.mean, found.standard_error, "bootstrap of the images of each split")
    return [score]


def _add_normal_interval(score: Score, value: float, error: float, method: str) -> None:
    score.standard_error = error
    score.interval = value - NORMAL_95 * error, value + NORMAL_95 * error
    score.interval_method = method


def _precision_recall(ours: Side, theirs: Side, metric: "Metric") -> list[Score]:
    sets = ours.features[metric.output], theirs.features[metric.output]
    found = prdc.compare_manifolds(*sets, density_k=None)
    return _means(precision=found.precision, recall=found.recall, k=prdc.PRECISION_K)


def _density_coverage(ours: Side, theirs: Side, metric: "Metric") -> list[Score]:
    sets = ours.features[metric.output], theirs.features[metric.output]
    found = prdc.compare_manifolds(*sets, precision_k=None)
    return _means(density=found.density, coverage=found.coverage, k=prdc.DENSITY_K)


def _means(k: int, **values: np.ndarray | None) -> list[Score]:
    return [
        Score(
            metric=name,
            name=name,
            value=float(each.mean(dtype=np.float64)),
            interval=bootstrap_interval(each),
            interval_method="bootstrap of the images counted, the other set's manifold fixed",
            parameters={"k": k, "resamples": RESAMPLES, "seed": SEED},
            warning=None,
        )
        for name, each in values.items()
        if each is not None
    ]


@dataclass(frozen=True)
class Metric:
    """A metric of two sets; all there is to say of one stands in its line of `METRICS`.

    Attributes:
        key: what it is asked for by.
        name: what it is called on Inception features.
        output: which of the extractor's features it is taken on.
        measure: (images, reference, this metric) -> its scores.
        arrays: the arrays of a statistics file that stand in for images.
    """

    key: str
    name: str
    output: str
    measure: Callable[[Side, Side, "Metric"], list[Score]]
    arrays: frozenset[str] = frozenset()


METRICS = {
    metric.key: metric
    for metric in (
        Metric("fid", "FID", "features", _frechet, frozenset({"mu", "sigma"})),
        Metric("kid", "KID", "features", _kernel),
        Metric("is", "Inception Score", "logits", _inception_score),
        Metric("sfid", "sFID", "spatial", _frechet, frozenset({"mu_s", "sigma_s"})),
        Metric("pr", "precision, recall", "features", _precision_recall),
        Metric("dc", "density, coverage", "features", _density_coverage),
    )
}


def _foreign_name(metric: str, extractor: str) -> tuple[str, str]:
    """What a metric is called on features that are not Inception's: never FID, never KID."""
    key, name, usual = {
        "fid": ("frechet", "Fréchet distance", " (not FID)"),
        "kid": ("kernel", "kernel distance", " (not KID)"),
    }.get(metric, (metric, metric, ""))
    return f"{key}_{extractor}", f"{name} on {SPOKEN[extractor]} features{usual}"
