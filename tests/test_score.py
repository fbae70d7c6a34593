"""`vugen score`: FID against torch-fidelity, what a score records, and every way it can be asked wrongly."""

import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import make_card, written
from PIL import Image
from typer.testing import CliRunner

from vugen_cli.checkpoint import save_checkpoint
from vugen_cli.commands.score import app
from vugen_cli.errors import VugenError
from vugen_cli.metrics import image_sets, inception, scores
from vugen_cli.metrics.encoders import load_extractor, vlm_extractor
from vugen_cli.metrics.features import Extractor
from vugen_cli.metrics.frechet import load_statistics
from vugen_cli.metrics.image_sets import open_image_set
from vugen_cli.metrics.inception import find_weights, inception_extractor
from vugen_cli.metrics.samples import newest_samples, recorded_reference, recorded_vlm
from vugen_cli.torchvision_repair import repair_torchvision

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "score.py"


def score_sets(*arguments, **options):
    """The report, as it is written."""
    return written(scores.score_sets(*arguments, **options))


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A seeded random state dict of the FID network, the benchmark's."""
    spec = importlib.util.spec_from_file_location("benchmark", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark.random_weights(tmp_path_factory.mktemp("weights") / "inception.pth")


def write_images(folder, n, seed, size=(40, 32)):
    """Noisy gradients, so that sets of different seeds differ in more than noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, size[1])[None, :, None]
    for index in range(n):
        tint = rng.uniform(0, 1, 3)
        pixels = np.clip(ramp * tint + rng.normal(0, 10 + 10 * seed, (*size, 3)), 0, 255)
        name = f"{index:03d}.{'jpg' if index % 3 == 0 else 'png'}"
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
    return folder


def channel_means(images):
    """Four cheap features of an image; stands in where the network does not matter."""
    x = images.double()
    features = torch.stack([*x.mean(dim=(2, 3)).T, x.std(dim=(1, 2, 3))], dim=1)
    return {"features": features, "logits": features / 20, "spatial": features[:, :3]}


def tiny_extractor(name="inception", label="channel means", sha="00"):
    return Extractor(name, label, "none", {"weights_sha256": sha}, channel_means)


@pytest.fixture
def tiny(monkeypatch):
    """Let the command use the tiny extractor, whatever it is asked for; yields what it was asked."""
    asked = []

    def load_extractor(features, recorded_vlm, device):
        asked.append((features, recorded_vlm, device.type))
        return tiny_extractor("vlm" if features == "vlm" else "inception")

    monkeypatch.setattr(scores, "load_extractor", load_extractor)
    return asked


def run(*arguments):
    """The command's output; a VugenError comes through, as it does to `app.main`."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if isinstance(result.exception, VugenError):
        raise result.exception
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.fixture
def one_thread():
    """torch on one thread: its threads wait for each other many times over where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def by_name(report):
    return {entry["metric"]: entry for entry in report["scores"]}


def frechet(*arguments, **options):
    (entry,) = score_sets(*arguments, **options)["scores"]
    return entry["value"]


@pytest.mark.slow
def test_features_and_fid_agree_with_torch_fidelity(tmp_path, weights, monkeypatch, one_thread):
    a, b = write_images(tmp_path / "a", 5, 1), write_images(tmp_path / "b", 5, 2)
    extractor = inception_extractor(weights, "cpu")
    report = score_sets(a, b, extractor, ["fid"], batch_size=5)
    repair_torchvision()
    from torch_fidelity import calculate_metrics
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # The same LAPACK routine, but of torch, whose threads can be limited.
    monkeypatch.setattr(np.linalg, "eigvals", lambda m: torch.linalg.eigvals(torch.from_numpy(m)).numpy())
    theirs = calculate_metrics(
        input1=str(a),
        input2=str(b),
        fid=True,
        cuda=False,
        verbose=False,
        cache=False,
        samples_find_deep=False,
        feature_extractor_weights_path=str(weights),
        save_cpu_ram=True,
        batch_size=4,
    )["frechet_inception_distance"]
    assert theirs > 1e-3
    (entry,) = report["scores"]
    assert entry["value"] == pytest.approx(theirs, rel=1e-4)
    assert entry["metric"] == "fid" and entry["name"] == "FID"
    assert report["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert "not the standard file" in report["warning"] and "5 images" in entry["warning"]

    names = ["2048", "logits_unbiased"]
    network = FeatureExtractorInceptionV3("x", names, feature_extractor_weights_path=str(weights))
    seen = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _args, output: seen.append(output))
    images = torch.randint(0, 256, (2, 3, 40, 30), dtype=torch.uint8)
    pool, logits = network(images)
    ours = extractor.features(images)
    for value, expected in ((ours["features"], pool), (ours["logits"], logits)):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    # ADM's evaluator flattens TensorFlow's [B, 17, 17, 192] after taking seven channels.
    spatial = seen[0].movedim(1, -1)[..., :7].reshape(2, 2023)
    torch.testing.assert_close(ours["spatial"], spatial, rtol=1e-4, atol=1e-5 * float(spatial.max()))


class Exploit:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_bad_weights_are_refused_and_never_executed(tmp_path):
    path = tmp_path / "weights.pth"
    for content in ({"fc.weight": Exploit()}, {"fc.weight": torch.zeros(3)}, torch.zeros(3), "text"):
        torch.save(content, path)
        with pytest.raises(VugenError, match=r"weights\.pth holds no weights"):
            inception_extractor(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(VugenError, match=r"weights\.pth holds no weights"):
        inception_extractor(path)
    with pytest.raises(VugenError, match="cannot read the Inception weights"):
        inception_extractor(tmp_path / "gone.pth")


def test_weights_are_taken_from_torch_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "WEIGHTS_URL", "http://127.0.0.1:9/nothing")
    file = tmp_path / "hub" / "checkpoints" / inception.WEIGHTS_NAME
    with pytest.raises(VugenError, match=r"--features inception:FILE, or score with --features vlm"):
        find_weights()
    file.touch()
    assert find_weights() == file


def test_a_silent_server_is_given_up_in_time(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(inception, "WEIGHTS_URL", f"http://127.0.0.1:{server.getsockname()[1]}/weights")
        started = time.monotonic()
        with pytest.raises(VugenError, match="could not be downloaded"):
            find_weights()
        assert time.monotonic() - started < 3
    assert inception.CONNECT_SECONDS < 10
    assert list((tmp_path / "hub" / "checkpoints").iterdir()) == []


def test_a_download_is_checked_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    served = tmp_path / "served.pth"
    served.write_bytes(b"weights")
    monkeypatch.setattr(inception, "WEIGHTS_URL", served.as_uri())
    with pytest.raises(VugenError, match="its hash is wrong"):
        find_weights()
    assert list((tmp_path / "home" / "hub" / "checkpoints").iterdir()) == []
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(inception, "WEIGHTS_SHA256_PREFIX", digest[:8])
    assert find_weights().read_bytes() == b"weights"


def test_identical_sets_score_zero_and_a_score_says_how(tmp_path):
    a = write_images(tmp_path / "a", 12, 1)
    (a / "zz_broken.png").write_bytes(b"nothing")
    report = score_sets(a, a, tiny_extractor(), ["fid", "kid", "is", "sfid", "pr", "dc"])
    scores = by_name(report)
    assert list(scores) == ["fid", "kid", "is", "sfid", "precision", "recall", "density", "coverage"]
    assert scores["fid"]["value"] == pytest.approx(0, abs=1e-6)
    assert scores["sfid"]["value"] == pytest.approx(0, abs=1e-6)
    for metric in ("precision", "recall", "density", "coverage"):
        assert scores[metric]["value"] == pytest.approx(1)
    low, high = scores["kid"]["interval"]
    assert low < 0 < high and scores["kid"]["parameters"]["subset_size"] == 6
    assert report["warning"] is None and scores["fid"]["warning"] is None
    for role in ("images", "reference"):
        assert report[role]["count"] == 12 and report[role]["path"] == str(a)
        assert len(report[role]["bad"]) == 1 and "zz_broken.png" in report[role]["bad"][0]
    assert report["features"] == "channel means" and report["resize"] == "none"
    assert report["versions"]["torch"] == torch.__version__
    json.dumps(report)


def test_batch_size_and_container_do_not_matter(tmp_path):
    a, b = write_images(tmp_path / "a", 12, 1), write_images(tmp_path / "b", 9, 2)
    expected = frechet(a, b, tiny_extractor())
    assert expected > 1
    assert frechet(a, b, tiny_extractor(), batch_size=1) == pytest.approx(expected, rel=1e-9)
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(a.iterdir())])
    np.savez(tmp_path / "a.npz", pixels)
    assert frechet(tmp_path / "a.npz", b, tiny_extractor()) == expected
    report = score_sets(a, b, tiny_extractor(), count=5)
    assert report["images"]["count"] == report["reference"]["count"] == 5


def test_statistics_stand_in_for_images(tmp_path):
    a, b = write_images(tmp_path / "a", 12, 1), write_images(tmp_path / "b", 9, 2)
    stats = tmp_path / "b.npz"
    both = ["fid", "sfid"]
    expected = by_name(score_sets(a, b, tiny_extractor(), both, save_stats=stats))
    report = score_sets(a, stats, tiny_extractor(), both)
    assert {name: entry["value"] for name, entry in by_name(report).items()} == {
        name: entry["value"] for name, entry in expected.items()
    }
    assert report["reference"] == {"path": str(stats), "kind": "statistics", "count": 9, "bad": []}
    for extractor in (tiny_extractor(label="other"), tiny_extractor(sha="ff")):
        with pytest.raises(VugenError, match=r"b\.npz holds statistics of"):
            score_sets(a, stats, extractor)
    with pytest.raises(VugenError, match="statistics of 'channel means' with another preprocessing"):
        score_sets(a, stats, replace(tiny_extractor(), resize="cropped"))
    with pytest.raises(VugenError, match=r"b\.npz holds no images and not all that --kid needs"):
        score_sets(a, stats, tiny_extractor(), ["fid", "kid"])
    # Other tools' files name no features: they are Inception's, of a number of images that is not known.
    known = load_statistics(stats)
    foreign = tmp_path / "foreign.npz"
    np.savez(foreign, mu=known.mean, sigma=known.covariance)
    report = score_sets(a, foreign, tiny_extractor())
    assert report["scores"][0]["value"] == pytest.approx(expected["fid"]["value"])
    assert report["reference"]["count"] is None
    with pytest.raises(VugenError, match=r"foreign\.npz holds statistics of Inception features"):
        score_sets(a, foreign, tiny_extractor("vlm"))
    # ADM's reference batches hold images too: for other features, and for what statistics do not suffice for.
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(b.iterdir())])
    np.savez(foreign, pixels, mu=known.mean + 1, sigma=known.covariance)
    report = score_sets(a, foreign, tiny_extractor())
    assert report["reference"]["kind"] == "statistics"
    shifted = report["scores"][0]["value"]
    assert shifted != pytest.approx(expected["fid"]["value"])
    report = score_sets(a, foreign, tiny_extractor("vlm"))
    assert report["reference"]["kind"] == "npz"
    assert report["scores"][0]["value"] == expected["fid"]["value"]
    report = score_sets(a, foreign, tiny_extractor(), ["fid", "pr"])
    assert report["reference"]["kind"] == "npz" and report["scores"][0]["value"] == shifted
    assert report["reference"]["statistics"] == "of an unknown number of images"


def test_small_sets(tmp_path):
    a, b = write_images(tmp_path / "a", 4, 1), write_images(tmp_path / "b", 1, 2)
    with pytest.raises(VugenError, match="at least 2"):
        score_sets(a, b, tiny_extractor())
    c = write_images(tmp_path / "c", 30, 2)
    (entry,) = score_sets(a, c, tiny_extractor())["scores"]
    assert entry["warning"].startswith("Only 4 images for 4 features") and "interval" not in entry
    with pytest.raises(VugenError, match="neighbourhoods of 5 need at least 6 generated images, got 4"):
        score_sets(a, c, tiny_extractor(), ["dc"])
    with pytest.raises(VugenError, match="10 splits needs as many images, got 4"):
        score_sets(a, None, tiny_extractor(), ["is"])
    three = write_images(tmp_path / "three", 3, 2)
    with pytest.raises(VugenError, match="four at least"):
        score_sets(three, c, tiny_extractor(), ["kid"])
    (entry,) = score_sets(c, None, tiny_extractor(), ["is"])["scores"]
    assert entry["value"] >= 1 and "3 a split" in entry["warning"]


def test_vlm_features_are_averaged_over_the_grid_and_never_called_fid(tmp_path):
    class Vlm:
        fingerprint = "feed"
        processor = SimpleNamespace(image_processor=SimpleNamespace(to_dict=lambda: {"size": 8}))

        def encode(self, images):
            assert images.dtype == torch.uint8
            return torch.nn.functional.avg_pool2d(images / 255, 8).permute(0, 2, 3, 1)

    extractor = vlm_extractor(Vlm())
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(extractor.features(images)["features"], images.float().mean(dim=(2, 3)) / 255)
    a, b = write_images(tmp_path / "a", 6, 1), write_images(tmp_path / "b", 6, 2)
    report = score_sets(a, b, extractor, ["fid", "kid", "pr"])
    scores = by_name(report)
    assert list(scores) == ["frechet_vlm", "kernel_vlm", "precision_vlm", "recall_vlm"]
    assert "not FID" in scores["frechet_vlm"]["name"] and "not KID" in scores["kernel_vlm"]["name"]
    assert report["vlm_fingerprint"] == "feed" and "weights_sha256" not in report
    for metric in ("is", "sfid"):
        with pytest.raises(VugenError, match=f"drop --{metric}"):
            score_sets(a, b, extractor, [metric])


def test_several_features_are_scored_in_one_call(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "a", 12, 1), write_images(tmp_path / "b", 12, 2)
    run("--fid", "--is", "--features", "inception", "--features", "vlm", "--images", "a", "--reference", "b")
    report = json.loads(Path("scores.json").read_text())
    scores = by_name(report)
    assert list(scores) == ["fid", "is", "frechet_vlm"]  # the Inception Score is Inception's alone
    assert scores["fid"]["value"] == scores["frechet_vlm"]["value"]
    assert all(entry["parameters"]["weights_sha256"] == "00" for entry in scores.values())
    assert scores["frechet_vlm"]["parameters"]["features"] == "channel means"
    assert "weights_sha256" not in report and report["images"]["count"] == 12
    several = ["--features", "inception", "--features", "vlm", "--images", "a", "--reference", "b"]
    with pytest.raises(VugenError, match="CMMD is defined on the CLIP network alone: drop --cmmd"):
        run("--cmmd", *several)
    with pytest.raises(VugenError, match="--save-stats keeps the statistics of one kind"):
        run("--fid", "--save-stats", "s.npz", *several)


def test_cmmd_has_its_name_on_its_own_clip_alone(tmp_path):
    a, b = write_images(tmp_path / "a", 6, 1), write_images(tmp_path / "b", 6, 2)
    for label, metric, name in (
        (scores.CMMD_FEATURES, "cmmd", "CMMD"),
        ("CLIP ViT-B-32 image embedding", "gaussian_clip", "not CMMD"),
    ):
        (entry,) = score_sets(a, b, tiny_extractor("clip", label), ["cmmd"])["scores"]
        assert entry["metric"] == metric and name in entry["name"]
        assert entry["value"] > 0 and entry["parameters"]["sigma"] == 10 and len(entry["interval"]) == 2


@pytest.fixture
def mjhq(tmp_path):
    """Twelve pictures in two categories, as MJHQ-30K's two files have them."""
    images = write_images(tmp_path / "images", 12, 2)
    folder, meta = tmp_path / "mjhq", {}
    folder.mkdir()
    with zipfile.ZipFile(folder / "mjhq30k_imgs.zip", "w") as archive:
        for number, path in enumerate(sorted(images.iterdir())):
            category = ("animals", "art")[number % 2]
            meta[f"id{number:02d}"] = {"category": category, "prompt": f"prompt \n {number}"}
            archive.write(path, f"mjhq30k_imgs/{category}/id{number:02d}{path.suffix}")
    (folder / "meta_data.json").write_text(json.dumps(meta))
    return folder


def test_mjhq_has_a_distance_within_each_category(tmp_path, mjhq):
    """Each is the published formula, with its matrix square root, over that category's pictures."""
    drawn = write_images(tmp_path / "drawn", 12, 1)
    rows = [
        {"file": path.name, "prompt": f"prompt {number}"}
        for number, path in enumerate(sorted(drawn.iterdir()))
    ]
    (drawn / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = score_sets(drawn, mjhq, tiny_extractor(), ["fid", "kid"])
    entries = by_name(report)
    assert list(entries) == ["fid", "kid", "fid_animals", "fid_art"]
    assert report["reference"]["kind"] == "mjhq" and entries["fid_art"]["name"] == "FID, art"
    for start, category in enumerate(("animals", "art")):
        sides = []
        for images in (drawn, tmp_path / "images"):
            paths = sorted(path for path in images.iterdir() if path.suffix != ".jsonl")[start::2]
            pixels = [np.asarray(Image.open(path)).astype(np.float64) for path in paths]
            sides.append(np.array([[*x.mean(axis=(0, 1)), x.std(ddof=1)] for x in pixels]))
        means, covariances = [x.mean(axis=0) for x in sides], [np.cov(x, rowvar=False) for x in sides]
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
        expected = np.sum((means[0] - means[1]) ** 2) + np.trace(sum(covariances) - 2 * root)
        assert entries[f"fid_{category}"]["value"] == pytest.approx(expected, rel=1e-6)
        assert entries[f"fid_{category}"]["parameters"] == {"images": 6, "reference_images": 6}


def test_mjhq_is_scored_whole_where_pictures_are_of_no_category(tmp_path, mjhq):
    with zipfile.ZipFile(mjhq / "mjhq30k_imgs.zip") as archive:
        archive.extractall(mjhq)
    report = score_sets(mjhq, mjhq, tiny_extractor())  # unpacked, and named after its ids
    assert [entry["value"] for entry in report["scores"]] == pytest.approx([0, 0, 0], abs=1e-6)
    report = score_sets(tmp_path / "images", mjhq, tiny_extractor())
    assert [entry["metric"] for entry in report["scores"]] == ["fid"]
    assert "000.jpg of" in report["warning"] and "is of no category" in report["warning"]
    (mjhq / "meta_data.json").write_text('{"id00": {"category": "art"}}')
    report = score_sets(mjhq, mjhq, tiny_extractor())
    assert "is not as MJHQ-30K's meta_data.json: id00.prompt: Field required" in report["warning"]


def write_samples(folder, reference=None, **row):
    write_images(folder, 6, 1)
    rows = [{"prompt": "x", "seed": 0, "index": 0, "file": path.name, **row} for path in folder.iterdir()]
    for entry in rows:
        if reference is not None:
            entry["reference"] = str(reference)
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_bare_command(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    write_images(Path("data/scenes"), 7, 2)
    write_samples(Path("samples"), "data/scenes", dataset="folder")
    output = run("--fid")
    assert "samples" in output and "scores.json" in output and "FID" in output
    report = json.loads(Path("scores.json").read_text())
    assert report["scores"][0]["metric"] == "fid" and report["images"]["kind"] == "samples"
    assert report["images"]["count"] == 6 and report["reference"]["count"] == 7
    assert not report["images"]["cached"]
    run("--fid")
    assert json.loads(Path("scores.json").read_text())["images"]["cached"]
    run("--fid", "--no-cache")
    assert not json.loads(Path("scores.json").read_text())["images"]["cached"]
    where = "cuda" if torch.cuda.is_available() else "cpu"
    assert tiny == 3 * [("inception", "nano", where)]
    run("--fid", "--features", "vlm", "--device", "cpu", "--out", "deep/er/vlm.json", "--save-stats", "r.npz")
    (entry,) = json.loads(Path("deep/er/vlm.json").read_text())["scores"]
    assert entry["metric"] == "frechet_vlm" and Path("r.npz").is_file()
    output = run(
        "--fid", "--kid", "--is", "--pr", "--psnr", "--images", "data/scenes", "--reference", "data/scenes"
    )
    scores = json.loads(Path("scores.json").read_text())["scores"]
    assert [entry["metric"] for entry in scores] == ["fid", "kid", "is", "precision", "recall", "psnr"]
    assert all(entry["name"] in output for entry in scores) and "7 of 7 pairs are equal" in output
    assert scores[2]["value"] is None and "Inception Score over 10 splits" in scores[2]["warning"]
    write_images(Path("data/scenes"), 12, 2)
    run("--is", "--images", "data/scenes")
    assert json.loads(Path("scores.json").read_text())["reference"] is None


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("clip", "give .*clip:MODEL:PRETRAINED"),
        ("dinov2", "give .*dinov2:DIRECTORY"),
        ("resnet", "--features resnet: give inception"),
        ("", "--features : give inception"),
        ("dinov2:gone", "gone has no config.json"),
        ("clip:ViT-B-32", "give the weights too"),
        ("vlm:./gone", "no VLM at gone"),
        ("vlm", "no VLM at gone"),  # alone it is the recorded one
        ("inception:gone", "cannot read the Inception weights gone"),
    ],
)
def test_features_name_a_network(features, message):
    with pytest.raises(VugenError, match=message):
        load_extractor(features, "./gone", "cpu")


def test_the_vlm_is_the_samplers(tmp_path):
    assert recorded_vlm(open_image_set(write_samples(tmp_path / "samples", vlm="some/vlm"))) == "some/vlm"
    assert recorded_vlm(open_image_set(write_images(tmp_path / "images", 1, 1))) == "nano"


def test_command_refuses_bad_input(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    images = write_images(tmp_path / "a", 4, 1)
    with pytest.raises(VugenError, match="add one or several of --fid"):
        run("--images", images)
    with pytest.raises(VugenError, match="no samples under"):
        run("--fid")
    with pytest.raises(VugenError, match="give --reference"):
        run("--fid", "--images", images)
    with pytest.raises(VugenError, match="no images at"):
        run("--fid", "--images", images, "--reference", tmp_path / "gone")
    with pytest.raises(VugenError, match="--device nonsense"):
        run("--fid", "--images", images, "--reference", images, "--device", "nonsense")
    with pytest.raises(VugenError, match=r"\.npz"):
        run("--fid", "--images", images, "--reference", images, "--save-stats", "stats.txt")
    with pytest.raises(VugenError, match="ask for --fid"):
        run("--kid", "--images", images, "--reference", images, "--save-stats", "stats.npz")
    with pytest.raises(VugenError, match="ask for --fid"):
        run("--psnr", "--images", images, "--reference", images, "--save-stats", "stats.npz")
    with pytest.raises(VugenError, match="--reference: the Inception Score is of the images alone"):
        run("--is", "--images", images, "--reference", images)
    with pytest.raises(VugenError, match="--features: pairs are compared by"):
        run("--psnr", "--images", images, "--reference", images, "--features", "vlm")
    with pytest.raises(VugenError, match="--vlm answers --vqa-score"):
        run("prompts", "--clip-score", "--clip", "x:y", "--images", images, "--vlm", "nano")
    for unread in ("clip", "detector"):
        with pytest.raises(VugenError, match=f"--{unread} is for --"):
            run("prompts", "--vqa-score", "--images", images, f"--{unread}", "x")
    (tmp_path / "file").touch()
    with pytest.raises(VugenError, match="cannot write"):
        run("--fid", "--images", images, "--reference", images, "--out", "file/scores.json")
    assert not (tmp_path / "scores.json").exists()


def test_newest_samples(tmp_path):
    for age, name in enumerate(("runs/one", "samples", "a/b/too_deep")):
        write_samples(tmp_path / name)
        listing = tmp_path / name / "samples.jsonl"
        stamp = 1_000_000_000 - age * 1000 if name != "a/b/too_deep" else 2_000_000_000
        os.utime(listing, (stamp, stamp))
    write_samples(tmp_path / "week" / "0-m", study=True)  # what a comparison drew is not the user's
    assert newest_samples(tmp_path) == tmp_path / "runs/one"


def test_reference_from_the_samplers_card(tmp_path, monkeypatch):
    data = write_images(tmp_path / "data", 2, 1)
    sampler = tmp_path / "sampler.safetensors"
    facts = {"path": str(data), "dataset": "folder", "size": 32, "counts": {}}
    save_checkpoint(sampler, {"w": torch.zeros(1)}, make_card("sampler", data=facts))
    samples = write_samples(tmp_path / "samples", sampler=str(sampler))

    def reference_of(folder):
        return recorded_reference(open_image_set(folder), lambda out: pytest.fail(f"{out} was drawn"))

    assert reference_of(samples) == data
    sampler.unlink()
    with pytest.raises(VugenError, match="names no reference"):
        reference_of(samples)
    gone = write_samples(tmp_path / "others", tmp_path / "gone", dataset="imagenet")
    with pytest.raises(VugenError, match="is not on disk"):
        reference_of(gone)


@pytest.mark.slow
@pytest.mark.parametrize("trained_on", ["openmoji", "openmoji + openmoji-edits"])
def test_a_missing_embedded_reference_is_drawn(tmp_path, monkeypatch, tiny, trained_on):
    monkeypatch.setattr("vugen_cli.nano.scenes.REFERENCE_SCENES", 8)
    samples = write_samples(tmp_path / "samples", tmp_path / "data", dataset=trained_on)
    assert "drawing 8 scenes of 32 px" in run("--fid", "--images", samples, "--out", tmp_path / "scores.json")
    manifest = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert manifest["splits"]["val"]["shards"][0]["samples"] == 8
    report = score_sets(samples, tmp_path / "data", tiny_extractor())
    assert report["reference"]["split"] == "val" and report["reference"]["count"] == 8


def test_scores_do_not_need_the_embedded_world(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    images = write_images(tmp_path / "data", 7, 2)
    write_samples(tmp_path / "samples", images)
    for name in [name for name in sys.modules if name.startswith("vugen_cli.nano")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vugen_cli.nano", None)
    with pytest.raises(ImportError):
        import vugen_cli.nano.scenes  # noqa: F401
    run("--fid", "--images", images, "--reference", images)
    run("--fid")  # its reference is on disk
    run("--is", "--images", write_images(tmp_path / "more", 12, 1))
    assert json.loads(Path("scores.json").read_text())["reference"] is None


def test_a_set_is_opened_once_and_its_listing_read_once(tmp_path, monkeypatch, tiny):
    samples = write_samples(tmp_path / "samples", write_images(tmp_path / "data", 6, 2))
    opened, read = [], []
    open_set, read_listing = image_sets.open_image_set, image_sets.read_samples
    monkeypatch.setattr(
        image_sets, "open_image_set", lambda *given: opened.append(given[0]) or open_set(*given)
    )
    monkeypatch.setattr(
        image_sets, "read_samples", lambda folder: read.append(folder) or read_listing(folder)
    )
    run("--fid", "--is", "--pr", "--images", samples, "--out", tmp_path / "scores.json")
    assert opened == [samples, tmp_path / "data"] and read == [samples]


def test_the_command_imports_nothing_heavy():
    code = "import sys, vugen_cli.commands.score, vugen_cli.commands.study\n"
    code += "print({'torch', 'numpy', 'rich.table'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout and "numpy" not in done.stdout
