"""Moments, the Fréchet distance and statistics files, and PSNR and SSIM, against independent computations."""

import math
import pickle

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vugen_cli.errors import VugenError
from vugen_cli.metrics.frechet import (
    Statistics,
    frechet_distance,
    frechet_standard_error,
    load_statistics,
    save_statistics,
)
from vugen_cli.metrics.pairs import psnr, ssim
from vugen_cli.moments import Moments


def features(n, d, seed, rank=None):
    """Correlated, skewed rows [n, d] with a falling spectrum and a mean, as network features have."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((d, d)) * np.exp(-np.arange(d) / d * 3)[:, None]
    if rank is not None:
        mix[rank:] = 0
    return np.maximum(rng.standard_normal((n, d)) @ mix + 0.1 * seed, -0.5)


def moments_of(rows, chunk=None):
    moments = Moments()
    for start in range(0, len(rows), chunk or len(rows)):
        moments.update(rows[start : start + (chunk or len(rows))])
    return moments


def exact_distance(x, y):
    """From the rows themselves: the trace term is the nuclear norm of the centred rows' product."""
    xc, yc = x - x.mean(0), y - y.mean(0)
    overlap = scipy.linalg.svdvals(xc @ yc.T).sum() / np.sqrt((len(x) - 1) * (len(y) - 1))
    traces = np.trace(np.cov(x, rowvar=False)) + np.trace(np.cov(y, rowvar=False))
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + traces - 2 * overlap


def test_moments_match_numpy():
    rows = features(1500, 24, 1)
    moments = moments_of(rows)
    assert moments.n == 1500 and moments.mean.shape == (24,)
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(rows, rowvar=False), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("chunk", [1, 7, 64, 511, 512, 513, 1500])
def test_chunks_do_not_change_the_moments(chunk):
    rows = features(1500, 16, 2)
    whole, chunked = moments_of(rows), moments_of(rows, chunk)
    # Blocks have a fixed number of rows, so this holds to the bit and not just to rounding.
    assert np.array_equal(whole.mean, chunked.mean)
    assert np.array_equal(whole.covariance, chunked.covariance)


@pytest.mark.parametrize("cut", [0, 1, 300, 1499, 1500])
def test_merge_equals_one_pass(cut):
    rows = features(1500, 16, 3)
    left, right = moments_of(rows[:cut], 100), moments_of(rows[cut:], 33)
    before = right.n
    left.merge(right)
    whole = moments_of(rows)
    assert left.n == 1500 and right.n == before
    scale = np.abs(whole.covariance).max()
    np.testing.assert_allclose(left.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(left.covariance, whole.covariance, rtol=1e-12, atol=1e-12 * scale)
    left.update(rows[:5])
    assert left.n == 1505


def test_moments_are_stable_far_from_zero():
    rows = np.random.default_rng(0).standard_normal((2000, 3))
    shifted = moments_of(rows + 1e6, 10)
    np.testing.assert_allclose(shifted.covariance, np.cov(rows, rowvar=False), rtol=1e-7, atol=1e-8)


def test_moments_keep_no_reference_to_the_rows_and_take_bfloat16():
    rows = torch.randn(4, 3, dtype=torch.bfloat16)
    expected = rows.double().numpy().copy()
    moments = Moments()
    moments.update(rows)
    rows.zero_()
    np.testing.assert_allclose(moments.mean, expected.mean(0), rtol=1e-12)


def test_moments_refuse_bad_rows():
    moments = moments_of(np.zeros((2, 3)))
    with pytest.raises(VugenError, match="dimension 4"):
        moments.update(np.zeros((2, 4)))
    with pytest.raises(VugenError, match="not finite"):
        moments.update(np.full((1, 3), np.nan))
    with pytest.raises(VugenError, match="at least 2"):
        _ = moments_of(np.zeros((1, 3))).covariance
    moments.merge(Moments())
    moments.update(np.zeros((0, 3)))
    assert moments.n == 2


def test_identical_sets_are_at_zero():
    for n in (20, 3000):  # fewer and more rows than features
        rows = features(n, 200, 1)
        moments = moments_of(rows)
        scale = np.trace(moments.covariance)
        assert 0 <= frechet_distance(moments, moments_of(rows, 13)) < 1e-12 * scale


def test_known_gaussians():
    rng = np.random.default_rng(5)
    q = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    a, b = rng.uniform(0, 4, 30), rng.uniform(0, 4, 30)
    mu_a, mu_b = rng.standard_normal((2, 30))
    # Covariances that commute: the distance is that of the standard deviations along the shared axes.
    expected = ((mu_a - mu_b) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    value = frechet_distance(Statistics(mu_a, (q * a) @ q.T), Statistics(mu_b, (q * b) @ q.T))
    assert value == pytest.approx(expected, rel=1e-12)
    one = Statistics(np.array([1.0]), np.array([[4.0]]))
    other = Statistics(np.array([4.0]), np.array([[9.0]]))
    assert frechet_distance(one, other) == pytest.approx(10, rel=1e-14)


def test_agrees_with_the_matrix_square_root_and_with_torch_fidelity():
    from vugen_cli.torchvision_repair import repair_torchvision

    repair_torchvision()
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    a, b = moments_of(features(900, 128, 1)), moments_of(features(700, 128, 2))
    value = frechet_distance(a, b)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    classic = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert value == pytest.approx(classic, rel=1e-8)
    stats = [{"mu": m.mean, "sigma": m.covariance} for m in (a, b)]
    theirs = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert value == pytest.approx(theirs, rel=1e-8)


@pytest.mark.parametrize(("n", "m", "rank"), [(40, 50, None), (40, 900, None), (900, 900, 17), (2, 2, None)])
def test_singular_covariances_are_exact(n, m, rank):
    x, y = features(n, 200, 1, rank), features(m, 200, 2, rank)
    assert frechet_distance(moments_of(x), moments_of(y)) == pytest.approx(exact_distance(x, y), rel=1e-8)


@pytest.mark.parametrize("decay", [400, 30, 5])
def test_ill_conditioned_covariances_are_exact(decay):
    falling = np.exp(-np.arange(128) / decay)  # standard deviations down to 1e-11
    x, y = (np.random.default_rng(seed).standard_normal((400, 128)) * falling for seed in (1, 2))
    mix = np.linalg.qr(np.random.default_rng(3).standard_normal((128, 128)))[0]
    value = frechet_distance(moments_of(x @ mix), moments_of(y @ mix))
    assert value == pytest.approx(exact_distance(x, y), rel=1e-8)


def test_the_standard_error_is_honest():
    """The jackknife's error, found in one pair of sets, is near the spread over many pairs."""
    values, errors = [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        a, b = rng.standard_normal((200, 6)), rng.exponential(1.2, (150, 6))
        values.append(frechet_distance(Moments(a), Moments(b)))
        errors.append(frechet_standard_error(a, b))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.35)


def test_the_standard_error_is_honest_where_pictures_share_prompts():
    values, errors = [], []
    prompts = np.repeat(np.arange(30), 8)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        a = np.repeat(rng.standard_normal((30, 4)), 8, 0) + 0.3 * rng.standard_normal((240, 4))
        b = rng.exponential(1.2, (150, 4))
        values.append(frechet_distance(Moments(a), Moments(b)))
        errors.append(frechet_standard_error(a, b, (prompts, None)))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.35)
    assert frechet_standard_error(a, b, (prompts % 9, None)) is None


def test_the_standard_error_does_not_depend_on_classes_that_come_in_turn():
    rng = np.random.default_rng(0)
    classes = 3 * rng.standard_normal((10, 4))
    a = np.tile(classes, (40, 1)) + rng.standard_normal((400, 4))
    b = rng.standard_normal((400, 4))
    mixed = frechet_standard_error(rng.permutation(a), b)
    assert frechet_standard_error(a, b) == pytest.approx(
        mixed, rel=0.6
    )  # in turn it would be many times that


def test_zero_covariance():
    point = Statistics(np.zeros(3), np.zeros((3, 3)))
    assert frechet_distance(point, Statistics(np.ones(3), np.eye(3))) == pytest.approx(6)
    assert frechet_distance(point, point) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(2, 30), st.integers(2, 30), st.integers(0, 1000), st.floats(0.01, 100))
def test_distance_is_symmetric_nonnegative_and_scales(d, n, m, seed, scale):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, d)), 2 * rng.standard_normal((m, d)) + 1
    a, b = moments_of(x), moments_of(y)
    forward, backward = frechet_distance(a, b), frechet_distance(b, a)
    size = np.trace(a.covariance) + np.trace(b.covariance)
    assert forward >= 0
    assert forward == pytest.approx(backward, rel=1e-9, abs=1e-9 * size)
    scaled = frechet_distance(moments_of(x * scale), moments_of(y * scale))
    assert scaled == pytest.approx(forward * scale**2, rel=1e-6, abs=1e-7 * size * scale**2)


def test_distance_refuses_what_cannot_be_compared():
    a, b = moments_of(np.eye(3)), moments_of(np.eye(4))
    with pytest.raises(VugenError, match="dimensions 3 and 4"):
        frechet_distance(a, b)
    with pytest.raises(VugenError, match="not finite"):
        frechet_distance(a, Statistics(np.zeros(3), np.full((3, 3), np.nan)))


def test_statistics_survive_a_file(tmp_path):
    moments = moments_of(features(50, 8, 1))
    written = Statistics(moments.mean, moments.covariance, 50, "fake features", {"weights_sha256": "ab"})
    save_statistics(tmp_path / "stats.npz", written)
    read = load_statistics(tmp_path / "stats.npz")
    assert np.array_equal(read.mean, moments.mean) and np.array_equal(read.covariance, moments.covariance)
    assert (read.n, read.label, read.identity) == (50, "fake features", {"weights_sha256": "ab"})
    assert [path.name for path in tmp_path.iterdir()] == ["stats.npz"]


def test_statistics_of_others_are_read(tmp_path):
    mu, sigma = np.arange(3.0), np.eye(3)
    np.savez(tmp_path / "pytorch_fid.npz", mu=mu, sigma=sigma)
    np.savez_compressed(
        tmp_path / "adm.npz", mu=mu, sigma=sigma.astype(np.float32), mu_s=np.zeros(2), sigma_s=np.eye(2)
    )
    for name in ("pytorch_fid", "adm"):
        read = load_statistics(tmp_path / f"{name}.npz")
        assert np.array_equal(read.mean, mu) and np.array_equal(read.covariance, sigma)
        assert read.mean.dtype == read.covariance.dtype == np.float64
        assert (read.n, read.label, read.identity) == (None, None, {})
    spatial = load_statistics(tmp_path / "adm.npz", spatial=True)
    assert np.array_equal(spatial.mean, np.zeros(2)) and np.array_equal(spatial.covariance, np.eye(2))
    with pytest.raises(VugenError, match="expected the arrays mu_s and sigma_s"):
        load_statistics(tmp_path / "pytorch_fid.npz", spatial=True)
    save_statistics(tmp_path / "both.npz", Statistics(mu, sigma, 9), spatial)
    again = load_statistics(tmp_path / "both.npz", spatial=True)
    assert np.array_equal(again.covariance, np.eye(2)) and again.n == 9


class Exploit:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_bad_statistics_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("mu sigma")
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    np.savez(tmp_path / "pickled.npz", mu=np.array([Exploit()], dtype=object), sigma=np.eye(1))
    np.savez(tmp_path / "whole.npz", mu=np.zeros(30), sigma=np.eye(30))
    data = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    (tmp_path / "flipped.npz").write_bytes(data.replace(b"\xf0\x3f", b"\xf1\x3f", 1))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps([1]))
    for name in ("text", "other", "shape", "pickled", "cut", "flipped", "pickle", "missing"):
        with pytest.raises(VugenError, match=f"{name}.npz"):
            load_statistics(tmp_path / f"{name}.npz")
    with pytest.raises(VugenError, match=r"\.npz"):
        save_statistics(tmp_path / "stats.txt", Statistics(np.zeros(1), np.eye(1)))
    (tmp_path / "file").touch()
    with pytest.raises(VugenError, match="cannot write"):
        save_statistics(tmp_path / "file" / "stats.npz", Statistics(np.zeros(1), np.eye(1)))


def ssim_reference(a, b):
    """SSIM of one image pair [3, H, W] in float64, window by window as the paper's formulas read."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for channel_a, channel_b in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        for top in range(a.shape[1] - 10):
            for left in range(a.shape[2] - 10):
                x = channel_a[top : top + 11, left : left + 11]
                y = channel_b[top : top + 11, left : left + 11]
                mx, my = (window * x).sum(), (window * y).sum()
                vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
                cov = (window * (x - mx) * (y - my)).sum()
                c1, c2 = 0.01**2, 0.03**2
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return np.mean(values)


def test_ssim_and_psnr_match_the_formulas():
    rng = np.random.default_rng(0)
    a = rng.random((2, 3, 17, 20)).astype(np.float32)
    b = np.clip(a + np.array([0.05, 0.3]).reshape(2, 1, 1, 1) * rng.standard_normal(a.shape), 0, 1)
    b = b.astype(np.float32)
    expected = [ssim_reference(x, y) for x, y in zip(a, b, strict=True)]
    ta, tb = torch.from_numpy(a), torch.from_numpy(b)
    np.testing.assert_allclose(ssim(ta, tb).numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(ssim(ta.double(), tb.double()).numpy(), expected, rtol=1e-12)
    mse = ((a.astype(np.float64) - b) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(psnr(ta, tb).numpy(), 10 * np.log10(1 / mse), rtol=1e-6)
    assert torch.equal(ssim(ta, tb), ssim(tb, ta))


def test_equal_pairs_and_bad_pairs():
    image = torch.rand(2, 3, 16, 16)
    assert psnr(image, image).tolist() == [math.inf, math.inf]
    torch.testing.assert_close(ssim(image, image), torch.ones(2))
    assert ssim(image.half(), image.half()).dtype == torch.float32
    with pytest.raises(VugenError, match="one shape"):
        psnr(image, image[:, :, :8])
    with pytest.raises(VugenError, match="float"):
        psnr(image, (image * 255).byte())
    with pytest.raises(VugenError, match="11x11"):
        ssim(image[..., :10], image[..., :10])
