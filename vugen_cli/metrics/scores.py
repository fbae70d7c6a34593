"""Scores of an image set: features of both sides extracted once, and how every number was obtained."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vugen_cli.errors import TooFewImages, VugenError
from vugen_cli.metrics import inception_score, kid, mjhq, prdc
from vugen_cli.metrics.bootstrap import RESAMPLES, SEED, interval, resampled_means
from vugen_cli.metrics.encoders import load_extractor
from vugen_cli.metrics.features import Extractor, extract
from vugen_cli.metrics.frechet import (
    Statistics,
    frechet_distance,
    frechet_standard_error,
    load_statistics,
    save_statistics,
)
from vugen_cli.metrics.image_sets import ImageSet, open_image_set
from vugen_cli.metrics.report import Report, Score, SetRecord, joined, versions
from vugen_cli.metrics.samples import recorded_vlm
from vugen_cli.moments import Moments
from vugen_cli.processes import is_first

JACKKNIFE_DIM = 512  # Fréchet distances on more features get no interval: twenty of them would take minutes
NORMAL_95 = 1.96
CMMD_FEATURES = "CLIP ViT-L-14-336-quickgelu image embedding"  # as open_clip names OpenAI's weights
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

    def read(self, batch_size: int | None, cache: Path | None) -> None:
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
        )
        if self.images.count < 2:
            bad = self.images.bad
            which = f" ({len(bad)} could not be read, the first {bad[0]})" if bad else ""
            raise VugenError(
                f"a score needs at least 2 readable images, and {path} has {self.images.count}{which}."
            )
        if self.statistics:
            self.record.statistics = (
                next(iter(self.statistics.values())).n or "of an unknown number of images"
            )

    def prompts(self) -> np.ndarray | None:
        """The number of each row's prompt, its pictures included, int [n]; None where none are known."""
        asked = {sample.file: sample.asked for sample in self.images.samples if sample.prompt is not None}
        found = [asked.get(name) for name in self.images.good_names()] if asked else [None]
        if None in found:
            return None
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(found))}
        return np.array([numbers[prompt] for prompt in found])

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
                self.extractor.resize,
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
) -> Report:
    """Scores of the images at a path against those at another; see `compare_sets`.

    Args:
        images, reference: anything `open_image_set` takes, `.npz` of statistics too for the Fréchet
            distances. The Inception Score alone needs no reference.
        extractor: what the images are compared by, or the name of a VLM to compare by its vision features.
        metrics: of "fid", "kid", "is", "sfid", "pr" (precision and recall), "dc" (density and coverage).
        count: only this many images of each set, from its start.
        batch_size, save_stats, cache: as of `compare_sets`.

    Returns:
        The scores, and how they were obtained.

    Raises:
        VugenError: as `open_image_set` and `compare_sets`.
    """
    if isinstance(extractor, str):
        extractor = load_extractor(f"vlm:{extractor}", "", "cpu")
    # Both are opened before either is read: a wrong path should not cost a pass over the other set.
    ours = open_image_set(images, count)
    theirs = None if reference is None else open_image_set(reference, count)
    return compare_sets(ours, theirs, extractor, metrics, batch_size, save_stats, cache)


def compare_sets(
    images: ImageSet,
    reference: ImageSet | None,
    extractor: Extractor,
    metrics: Collection[str],
    batch_size: int | None = None,
    save_stats: Path | None = None,
    cache: Path | None = None,
) -> Report:
    """Scores of a set of images, with all that is needed to know how they were obtained.

    Args:
        images, reference: the two sets; the Inception Score alone needs no reference.
        extractor: what the images are compared by.
        metrics: keys of `METRICS`.
        batch_size: images a forward pass; the result depends on it only through the network's rounding.
        save_stats: also write the reference's statistics here.
        cache: folder of cached features (`features.cache_folder`), None for none.

    Returns:
        A report; a score's value is None where a set is too small for it. An empty report on all but the
        first process of a job, which share the extraction.

    Raises:
        VugenError: a set cannot be read, is too small for the only metric, or has statistics of another
            extractor.
    """
    check_features(metrics, [extractor.name])
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
        theirs.read(batch_size, cache)
    ours.read(batch_size, cache)
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
    warning = extractor.warning
    if "fid" in metrics and theirs is not None and theirs.images.kind == "mjhq" and ours.features:
        try:
            scores += _by_category(ours, theirs)
        except VugenError as error:  # the distance over all is worth having without
            warning = " ".join(filter(None, (warning, f"No distance by category: {error}")))
    if extractor.name != "inception":
        for score in scores:
            score.metric, score.name = _foreign_name(score.metric, score.name, extractor)
    report = Report(
        scores=scores,
        features=extractor.label,
        resize=extractor.resize,
        images=ours.record,
        reference=theirs.record if theirs else None,
        versions=versions(),
        warning=warning,
    )
    return report.model_copy(update=extractor.identity)


def compare_over(
    images: ImageSet,
    reference: ImageSet | None,
    features: Sequence[str],
    metrics: Collection[str],
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    save_stats: Path | None = None,
    cache: Path | None = None,
) -> Report:
    """Scores of a set of images on several features, one after another; see `compare_sets`.

    A metric of one kind of features (the Inception Score, sFID, CMMD) is taken on those alone.

    Args:
        features: as `load_extractor` reads them.
        device: where their networks run.

    Returns:
        One report. Of several features, every score says under `parameters` what it was taken on.

    Raises:
        VugenError: as `compare_sets`; a metric is defined on none of the features, or statistics of several
            are to be saved.
    """
    kinds = [each.partition(":")[0] for each in features]
    if SPOKEN.keys() >= set(kinds):  # else loading says what there is
        check_features(metrics, kinds)
    if save_stats is not None and len(features) > 1:
        raise VugenError("--save-stats keeps the statistics of one kind of features: give one --features.")
    reports = []
    for each, kind in zip(features, kinds, strict=True):
        served = [name for name in metrics if METRICS[name].only in (None, kind)]
        if kind in SPOKEN and not (served or save_stats):
            continue
        extractor = load_extractor(each, recorded_vlm(images), device)
        report = compare_sets(images, reference, extractor, served, batch_size, save_stats, cache)
        if len(features) > 1:
            how = {"features": extractor.label, "resize": extractor.resize, **extractor.identity}
            for score in report.scores:
                score.parameters = {**score.parameters, **how}
            # A hash at the top would be of one of the networks, and not say of which.
            kept = report.model_fields_set - extractor.identity.keys()
            report = Report().model_copy(update={key: getattr(report, key) for key in kept})
        reports.append(report)
    return joined(reports)


def check_features(metrics: Collection[str], kinds: Collection[str]) -> None:
    """Refuse a metric that is defined on other features than there are.

    Args:
        metrics: keys of `METRICS`.
        kinds: names of extractors.

    Raises:
        VugenError: names the metric and the features that it needs.
    """
    for metric in (METRICS[name] for name in metrics):
        if metric.only not in (None, *kinds):
            network, features = {
                "inception": ("Inception", "inception"),
                "clip": ("CLIP", "clip:ViT-L-14-336:openai"),
            }[str(metric.only)]
            raise VugenError(
                f"{metric.name} is defined on the {network} network alone: drop --{metric.key} or score with "
                f"--features {features}."
            )


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
    elif statistics.resize not in (None, extractor.resize):
        found = f"'{statistics.label}' with another preprocessing ({statistics.resize})"
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
        features = ours.features[output], theirs.features[output]
        error = frechet_standard_error(*features, (ours.prompts(), theirs.prompts()))
        if error is not None:
            _add_normal_interval(score, value, error, "jackknife over ten groups of each set")
    return [score]


def _by_category(ours: Side, theirs: Side) -> list[Score]:
    """The Fréchet distance within each category of MJHQ-30K that both sets have.

    Raises:
        VugenError: an image is of no category.
    """
    metric = METRICS["fid"]
    entries = mjhq.read_meta(theirs.images.path)
    parts = [mjhq.rows_by_category(side.images, entries) for side in (ours, theirs)]
    scores = []
    for category in sorted(parts[0].keys() & parts[1].keys()):
        of_ours, of_theirs = (
            side.features[metric.output][rows[category]]
            for side, rows in zip((ours, theirs), parts, strict=True)
        )
        score = Score(metric=f"{metric.key}_{category}", name=f"{metric.name}, {category}", value=None)
        score.parameters = {"images": len(of_ours), "reference_images": len(of_theirs)}
        score.warning = "Needs at least 2 images of each set."
        if min(len(of_ours), len(of_theirs)) >= 2:
            a, b = Moments(of_ours), Moments(of_theirs)
            score.value, score.warning = frechet_distance(a, b), _singular(a, b)
        scores.append(score)
    return scores


def _singular(images: Statistics | Moments, reference: Statistics | Moments) -> str | None:
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
    how = "delta method, over the images of each set, and the spread of the subsets"
    _add_normal_interval(score, distance.mean, distance.standard_error, how)
    return [score]


def _cmmd(ours: Side, theirs: Side, metric: "Metric") -> list[Score]:
    value, error = kid.cmmd(ours.features[metric.output], theirs.features[metric.output])
    parameters = {"kernel": "exp(-|x - y|² / 2σ²)", "sigma": kid.CMMD_SIGMA, "scale": kid.CMMD_SCALE}
    score = Score(metric=metric.key, name=metric.name, value=value, parameters=parameters, warning=None)
    _add_normal_interval(score, value, error, "delta method, over the images of each set")
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
    precision, recall = prdc.precision_recall(*sets)
    return _means(precision=precision, recall=recall, k=prdc.PRECISION_K)


def _density_coverage(ours: Side, theirs: Side, metric: "Metric") -> list[Score]:
    sets = ours.features[metric.output], theirs.features[metric.output]
    density, coverage = prdc.density_coverage(*sets)
    return _means(density=density, coverage=coverage, k=prdc.DENSITY_K)


def _means(k: int, **values: np.ndarray) -> list[Score]:
    return [
        Score(
            metric=name,
            name=name,
            value=float(each.mean(dtype=np.float64)),
            interval=interval(resampled_means(each)),
            interval_method="bootstrap of the images counted, the other set's manifold fixed",
            parameters={"k": k, "resamples": RESAMPLES, "seed": SEED},
            warning=None,
        )
        for name, each in values.items()
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
        only: the extractor that it is defined on, None for any.
    """

    key: str
    name: str
    output: str
    measure: Callable[[Side, Side, "Metric"], list[Score]]
    arrays: frozenset[str] = frozenset()
    only: str | None = None


METRICS = {
    metric.key: metric
    for metric in (
        Metric("fid", "FID", "features", _frechet, frozenset({"mu", "sigma"})),
        Metric("kid", "KID", "features", _kernel),
        Metric("cmmd", "CMMD", "features", _cmmd, only="clip"),
        Metric("is", "Inception Score", "logits", _inception_score, only="inception"),
        Metric("sfid", "sFID", "spatial", _frechet, frozenset({"mu_s", "sigma_s"}), "inception"),
        Metric("pr", "precision, recall", "features", _precision_recall),
        Metric("dc", "density, coverage", "features", _density_coverage),
    )
}


def _foreign_name(metric: str, name: str, extractor: Extractor) -> tuple[str, str]:
    """What a metric is called on features that are not Inception's: never FID, never KID.

    CMMD is that of OpenAI's ViT-L/14 at 336 pixels alone.
    """
    if extractor.label == CMMD_FEATURES and metric == "cmmd":
        return metric, name
    for usual, key, plain in (("fid", "frechet", "Fréchet distance"), ("kid", "kernel", "kernel distance")):
        if metric.partition("_")[0] == usual:
            metric, name = metric.replace(usual, key, 1), name.replace(usual.upper(), plain, 1)
            return (
                f"{metric}_{extractor.name}",
                f"{name} on {SPOKEN[extractor.name]} features (not {usual.upper()})",
            )
    if metric == "cmmd":
        return f"gaussian_{extractor.name}", f"Gaussian kernel distance on {extractor.label} (not CMMD)"
    return f"{metric}_{extractor.name}", f"{metric} on {SPOKEN[extractor.name]} features"
