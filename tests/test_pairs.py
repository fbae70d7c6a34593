"""Scores of pairs of sets: who stands beside whom, what is left out, and LPIPS against torch-fidelity."""

import math

import numpy as np
import pytest
import torch
from conftest import written
from PIL import Image

from vugen_cli.errors import VugenError
from vugen_cli.metrics.image_sets import open_image_set
from vugen_cli.metrics.lpips import FILES, load_lpips
from vugen_cli.metrics.pairs import psnr, score_pairs
from vugen_cli.torchvision_repair import repair_torchvision

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 20, 24, 3), dtype=np.uint8)


def write(folder, pixels, suffix="png"):
    folder.mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index}.{suffix}")
    return folder


def scores(ours, theirs, count=None):
    sets = open_image_set(ours, count), open_image_set(theirs, count)
    report = written(score_pairs(*sets))
    return {entry["metric"]: entry for entry in report["scores"]}, report


def test_the_mean_over_pairs(tmp_path):
    worse = np.clip(PIXELS.astype(int) + 9, 0, 255).astype(np.uint8)
    a, b = write(tmp_path / "a", PIXELS), write(tmp_path / "b", worse, "bmp")
    found, report = scores(a, b)
    pairs = [torch.from_numpy(x).permute(0, 3, 1, 2).double() / 255 for x in (PIXELS, worse)]
    assert found["psnr"]["value"] == pytest.approx(psnr(*pairs).mean().item(), rel=1e-12)
    low, high = found["psnr"]["interval"]
    assert low < found["psnr"]["value"] < high and 0 < found["ssim"]["value"] < 1
    assert report["images"]["count"] == report["reference"]["count"] == 6
    np.savez(tmp_path / "b.npz", worse)
    assert scores(a, tmp_path / "b.npz")[0]["psnr"]["value"] == found["psnr"]["value"]
    assert scores(a, b, count=2)[0]["psnr"]["parameters"]["pairs"] == 2


def test_pairs_are_measured_in_full_float32(tmp_path, monkeypatch):
    def lpips(a, b):
        assert not torch.backends.cudnn.allow_tf32
        return torch.zeros(len(a))

    monkeypatch.setattr("vugen_cli.metrics.lpips.load_lpips", lambda _: (lpips, {}))
    folder = write(tmp_path / "a", PIXELS[:1])
    score_pairs(open_image_set(folder), open_image_set(folder), ("lpips",))


def test_equal_and_bad_pairs(tmp_path):
    half = PIXELS.copy()
    half[3:] //= 2
    a, b = write(tmp_path / "a", PIXELS), write(tmp_path / "b", half)
    found, _ = scores(a, b)
    assert math.isfinite(found["psnr"]["value"]) and "3 of 6 pairs are equal" in found["psnr"]["warning"]
    assert scores(a, a)[0]["psnr"]["value"] is None
    (b / "5.png").write_bytes(b"no image")
    (a / "0.png").write_bytes(b"no image")
    found, report = scores(a, b)
    assert found["ssim"]["parameters"]["pairs"] == 4
    assert report["images"]["bad"][0].startswith("0.png: ")
    assert report["reference"]["bad"][0].startswith("5.png: ")


def test_sets_that_do_not_pair_up(tmp_path):
    a = write(tmp_path / "a", PIXELS)
    with pytest.raises(VugenError, match=r"only .*a goes on at 4\.png"):
        scores(a, write(tmp_path / "short", PIXELS[:4]))
    with pytest.raises(VugenError, match="0.png is 24x20 and its partner 0.png is 20x24"):
        scores(a, write(tmp_path / "turned", PIXELS.transpose(0, 2, 1, 3)))
    (a / "0.png").rename(a / "00.png")
    with pytest.raises(VugenError, match=r"00\.png stands beside 0\.png"):
        scores(a, write(tmp_path / "named", PIXELS))


def test_reconstructions_pair_up_with_their_originals(trained, scenes, tmp_path):
    from vugen_cli.studies.reconstruct import reconstruct

    report = reconstruct(trained / "reducer.safetensors", scenes, tmp_path, count=3, save_images=True)
    found, _ = scores(tmp_path / "decoded", tmp_path / "originals")
    assert found["psnr"]["parameters"]["pairs"] == 3
    assert found["psnr"]["value"] == pytest.approx(report.psnr, rel=1e-5)
    assert found["ssim"]["value"] == pytest.approx(report.ssim, rel=1e-4)


def test_lpips_agrees_with_torch_fidelity(tmp_path, monkeypatch):
    repair_torchvision()
    from torch_fidelity import sample_similarity_lpips
    from torchvision.models.vgg import cfgs, make_layers

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(VugenError, match="LPIPS needs .*vgg16-397923af.pth: get it from https"):
        load_lpips()
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    vgg = make_layers(cfgs["D"])
    linear = {
        f"lin{i}.model.1.weight": torch.rand(1, channels, 1, 1, generator=generator)
        for i, channels in enumerate((64, 128, 256, 512, 512))
    }
    for name, state in zip(
        FILES, ({f"features.{k}": v for k, v in vgg.state_dict().items()}, linear), strict=True
    ):
        torch.save(state, folder / name)
    lpips, hashes = load_lpips()
    assert set(hashes) == set(FILES)

    class Pretrained:
        features = vgg

    monkeypatch.setattr(sample_similarity_lpips, "torchvision_load_pretrained_vgg16", Pretrained)
    monkeypatch.setattr(sample_similarity_lpips, "load_state_dict_from_url", lambda *_, **__: linear)
    theirs = sample_similarity_lpips.SampleSimilarityLPIPS("lpips")
    a, b = torch.randint(0, 256, (2, 3, 3, 32, 40), dtype=torch.uint8, generator=generator)
    expected = theirs(a, b).flatten()
    assert expected.min() > 1e-4
    torch.testing.assert_close(lpips(a.float() / 255, b.float() / 255), expected, rtol=1e-3, atol=1e-6)
    assert lpips(a.double() / 255, a.double() / 255).tolist() == [0, 0, 0]
    with pytest.raises(VugenError, match="at least 16x16"):
        lpips(a[..., :15].float(), b[..., :15].float())
    (folder / next(iter(FILES))).write_bytes(b"no weights")
    with pytest.raises(VugenError, match="holds no weights of LPIPS"):
        load_lpips()
