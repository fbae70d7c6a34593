"""KID, Inception Score, precision/recall, density/coverage: against torch-fidelity, against the formulas, and
against what anyone would expect of them; and a sanity suite over pictures that get worse by degrees."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from vugen_cli.errors import TooFewImages, VugenError
from vugen_cli.metrics.bootstrap import interval, resampled_means
from vugen_cli.metrics.encoders import vlm_extractor
from vugen_cli.metrics.inception_score import inception_score
from vugen_cli.metrics.kid import cmmd, kernel_distance
from vugen_cli.metrics.prdc import density_coverage, precision_recall
from vugen_cli.metrics.scores import score_sets
from vugen_cli.torchvision_repair import repair_torchvision


def features(n, d, seed, shift=0.0):
    """Non-negative float32 with correlated columns, as a network's pooled features are."""
    mix = np.random.default_rng(0).standard_normal((d, d)) / d**0.5
    rows = np.random.default_rng(seed).standard_normal((n, d)) @ mix + shift
    return np.abs(rows).astype(np.float32)


def test_kernel_distance_agrees_with_torch_fidelity():
    repair_torchvision()
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = features(300, 64, 1), features(250, 64, 2, 0.1)
    ours = kernel_distance(a, b, subset_size=100)
    theirs = kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subset_size=100, verbose=False
    )
    # Theirs is the same sum in float32.
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-4)
    doubles = kid_features_to_metric(
        torch.from_numpy(a).double(), torch.from_numpy(b).double(), kid_subset_size=100, verbose=False
    )
    assert ours.mean == pytest.approx(doubles["kernel_inception_distance_mean"], rel=1e-10)
    assert ours.std == pytest.approx(doubles["kernel_inception_distance_std"], rel=1e-10)


def test_mmd_is_its_formula():
    x, y = features(6, 5, 1), features(6, 5, 2)
    kernel = lambda u, v: (float(np.dot(u.astype(float), v.astype(float))) / 5 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    expected = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs) / 30
    expected -= 2 * sum(kernel(u, v) for u in x for v in y) / 36
    assert kernel_distance(x, y, 1, 6).mean == pytest.approx(expected, rel=1e-9)


def test_the_standard_error_of_the_kernel_distance_is_honest():
    """The error found in one sample is near the spread over many, and above it for like sets."""
    ratios = []
    for n, m, shift in ((200, 200, 0.2), (200, 200, 1.5), (52, 300, 1.5), (300, 52, 1.5), (50, 50, 1.5)):
        found = [
            kernel_distance(features(n, 8, s), features(m, 8, 1000 + s, shift), 30, 50) for s in range(40)
        ]
        spread = np.std([one.mean for one in found])
        ratios.append(np.mean([one.standard_error for one in found]) / spread)
    assert 1 < ratios[0] < 4
    assert ratios[1:] == pytest.approx([1, 1, 1, 1], rel=0.35)


def test_cmmd_is_the_published_scripts(monkeypatch):
    """distance.py of google-research/cmmd, and the normalisation of its embedding.py, in numpy's float64."""
    a, b = features(70, 24, 1), features(50, 24, 2, 0.3)
    x, y = (rows.astype(np.float64) for rows in (a, b))
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    y /= np.linalg.norm(y, axis=-1, keepdims=True)
    xx, yy = np.diag(x @ x.T), np.diag(y @ y.T)
    gamma = 1 / (2 * 10**2)
    k_xx = np.mean(np.exp(-gamma * (-2 * x @ x.T + xx[:, None] + xx[None, :])))
    k_xy = np.mean(np.exp(-gamma * (-2 * x @ y.T + xx[:, None] + yy[None, :])))
    k_yy = np.mean(np.exp(-gamma * (-2 * y @ y.T + yy[:, None] + yy[None, :])))
    expected = 1000 * (k_xx + k_yy - 2 * k_xy)
    assert expected > 0.1 and cmmd(a, b)[0] == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr("vugen_cli.metrics.kid.CMMD_BLOCK", 16)
    assert cmmd(a, b)[0] == pytest.approx(expected, rel=1e-9)
    assert cmmd(a, a)[0] == pytest.approx(0, abs=1e-9)
    with pytest.raises(VugenError, match="dimensions 24 and 8"):
        cmmd(a, b[:, :8])


def test_the_standard_error_of_cmmd_is_honest():
    draws = [cmmd(features(80, 8, seed), features(80, 8, 1000 + seed, 0.5)) for seed in range(100)]
    values, errors = np.array(draws).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.25)


def test_subsets_shrink_with_the_sets_and_say_so():
    found = kernel_distance(features(40, 8, 1), features(30, 8, 2))
    assert found.subset_size == 15
    with pytest.raises(TooFewImages, match="got 3 and 30"):
        kernel_distance(features(3, 8, 1), features(30, 8, 2))
    with pytest.raises(TooFewImages, match="subsets of 50"):
        kernel_distance(features(40, 8, 1), features(60, 8, 2), subset_size=50)
    with pytest.raises(VugenError, match="dimensions 8 and 9"):
        kernel_distance(features(40, 8, 1), features(40, 9, 2))


def test_inception_score_agrees_with_torch_fidelity():
    repair_torchvision()
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * np.random.default_rng(0).standard_normal((157, 20)).astype(np.float32)
    theirs = isc_features_to_metric(torch.from_numpy(logits))
    ours = inception_score(logits)
    assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert ours.std == pytest.approx(theirs["inception_score_std"], rel=1e-12)


def test_inception_score_at_its_limits():
    sure = 1000 * np.eye(10, dtype=np.float32)[np.arange(500) % 10]
    assert inception_score(sure, splits=1).mean == pytest.approx(10, rel=1e-6)  # every class, no doubt
    assert inception_score(sure[:1].repeat(50, 0)).mean == pytest.approx(1)  # one class
    unsure = np.zeros((50, 10), np.float32)
    found = inception_score(unsure)
    assert found.mean == pytest.approx(1) and found.standard_error == pytest.approx(0, abs=1e-9)
    with pytest.raises(TooFewImages):
        inception_score(unsure[:9])


def test_the_error_of_the_inception_score_is_honest():
    scores = [inception_score(np.random.default_rng(s).standard_normal((400, 6)) * 2) for s in range(40)]
    spread = np.std([score.mean for score in scores])
    assert np.mean([score.standard_error for score in scores]) == pytest.approx(spread, rel=0.35)


def test_precision_and_recall_agree_with_torch_fidelity():
    repair_torchvision()
    from torch_fidelity.metric_prc import prc_features_to_metric

    for shift in (0.0, 0.3, 5.0):
        a, b = features(220, 12, 1, shift), features(310, 12, 2)
        theirs = prc_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), verbose=False)
        precision, recall = precision_recall(a, b)
        assert precision.mean() == pytest.approx(theirs["precision"], rel=1e-6)
        assert recall.mean() == pytest.approx(theirs["recall"], rel=1e-6)
    assert theirs["precision"] < 0.1  # the far set is seen to be far


def test_manifolds_match_brute_force(monkeypatch):
    from vugen_cli.metrics import prdc

    monkeypatch.setattr(prdc, "BLOCK", 7)  # blocks that do not divide the sets
    generated, real = features(33, 6, 1, 0.2), features(40, 6, 2)
    distances = lambda x, y: np.linalg.norm(x[:, None].astype(float) - y[None], axis=2)  # noqa: E731
    across = distances(real, generated)

    def radius(rows, k):
        return np.sort(distances(rows, rows), axis=1)[:, k]

    (precision, recall), (density, coverage) = (
        f(generated, real) for f in (precision_recall, density_coverage)
    )
    inside = across < radius(real, 5)[:, None]
    assert np.array_equal(precision, (across <= radius(real, 3)[:, None]).any(0))
    assert np.array_equal(recall, (across <= radius(generated, 3)).any(1))
    np.testing.assert_allclose(density, inside.sum(0) / 5, rtol=1e-6)
    assert np.array_equal(coverage, inside.any(1))
    assert 0 < precision.mean() < 1 and 0 < recall.mean() < 1


def test_manifolds_survive_a_far_origin_and_copies():
    generated, real = features(60, 6, 1, 0.2), features(60, 6, 2)
    near, far = precision_recall(generated, real)[0], precision_recall(generated + 4096, real + 4096)[0]
    assert np.mean(near != far) < 0.05  # float32 inputs keep three decimals there
    # A collapsed generator: copies of one real image. Its balls have no size; only that image is recalled.
    copies = np.repeat(real[:1], 30, axis=0)
    precision, recall = precision_recall(copies, real)
    assert precision.all() and recall.sum() == 1
    with pytest.raises(TooFewImages, match="at least 6 real images, got 5"):
        density_coverage(generated, real[:5])
    precision_recall(generated, real[:5])


def test_bootstrap_interval_covers():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(60):
        low, high = interval(resampled_means(rng.random(80) < 0.3, seed=seed))
        hits += low <= 0.3 <= high
    assert hits >= 51  # 95% of 60 is 57


# --- sanity: pictures that get worse by degrees


def blur(image, strength):
    return image.filter(ImageFilter.GaussianBlur(strength))


def noise(image, strength):
    pixels = np.asarray(image, dtype=float)
    grain = np.random.default_rng(int(pixels.sum())).normal(0, 1, pixels.shape)
    return Image.fromarray(np.clip(pixels + strength * grain, 0, 255).astype(np.uint8))


def jpeg(image, strength):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=int(100 - strength))
    return Image.open(stream)


@pytest.fixture(scope="module")
def pictures(scenes):
    from vugen_cli.data.loader import ShardedImages

    return [Image.fromarray(pixels) for pixels, _ in ShardedImages(scenes).in_order(64)]


@pytest.mark.parametrize(
    ("damage", "strengths"), [(blur, (0.5, 1, 2, 4)), (noise, (8, 24, 60, 120)), (jpeg, (40, 80, 92, 98))]
)
def test_distances_rise_with_damage(tmp_path, pictures, vlm, damage, strengths):
    def batch(name, images):
        np.savez(tmp_path / name, np.stack([np.asarray(image.convert("RGB")) for image in images]))
        return tmp_path / name

    clean = batch("clean.npz", pictures)
    extractor = vlm_extractor(vlm)
    rows = []
    for strength in (0, *strengths):
        worse = batch("worse.npz", [damage(image, strength) if strength else image for image in pictures])
        report = score_sets(worse, clean, extractor, ["fid", "kid"])
        rows.append([score.value for score in report.scores])
    frechet, kernel = np.array(rows).T
    assert frechet[0] == pytest.approx(0, abs=1e-9 * frechet[-1])
    assert (np.diff(frechet) > 0).all(), frechet
    assert kernel[-1] > kernel[0]
