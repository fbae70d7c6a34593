"""Extractors beside Inception, one pass over a set, and the cache of what came out of it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vugen_cli.errors import VugenError
from vugen_cli.metrics.encoders import clip_extractor, dinov2_extractor
from vugen_cli.metrics.features import Extractor, cache_folder, extract
from vugen_cli.metrics.image_sets import ImageSet, open_image_set
from vugen_cli.metrics.scores import CMMD_FEATURES
from vugen_cli.torchvision_repair import repair_torchvision

SIZES = [(20, 16), (16, 20), (20, 16), (24, 24), (16, 20), (20, 16)]


@pytest.fixture
def folder(tmp_path):
    """Six images of three sizes, number i filled with the value i, and a bad one between them."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index, size in enumerate(SIZES):
        Image.fromarray(np.full((*size, 3), index, np.uint8)).save(folder / f"{index}.png")
    (folder / "2x.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def counting():
    """An extractor of an image's mean and its square, which counts the images it is shown."""
    seen = []

    def features(images):
        seen.append(len(images))
        mean = images.float().mean(dim=(1, 2, 3))[:, None]
        return {"features": mean, "logits": mean.square()}

    return Extractor("inception", "mean", "none", {"weights_sha256": "00"}, features), seen


def test_features_are_in_the_sets_order_whatever_the_sizes(folder, counting):
    extractor, seen = counting
    for batch_size in (1, 2, 64):
        features, record = extract(
            open_image_set(folder), extractor, ["features", "logits"], batch_size=batch_size
        )
        assert features["features"].ravel().tolist() == [0, 1, 2, 3, 4, 5]
        assert features["logits"].ravel().tolist() == [0, 1, 4, 9, 16, 25]
        assert features["features"].dtype == np.float32
        assert record.count == 6 and len(record.bad) == 1 and not record.cached
    assert sum(seen) == 18 and max(seen) == 3  # one pass gives every kind of feature


def test_features_that_are_not_finite_are_refused(folder):
    broken = Extractor(
        "vlm", "x", "none", {}, lambda images: {"features": torch.full((len(images), 2), torch.nan)}
    )
    with pytest.raises(VugenError, match="not finite"):
        extract(open_image_set(folder), broken, ["features"])


def test_a_set_is_extracted_once(folder, counting, tmp_path):
    extractor, seen = counting
    cache = tmp_path / "cache"

    def again(path=folder, wanted=("features",), extractor=extractor):
        seen.clear()
        features, record = extract(open_image_set(path), extractor, wanted, cache=cache)
        return features, record, sum(seen)

    first, record, shown = again()
    assert shown == 6 and not record.cached
    moved = folder.rename(tmp_path / "moved")  # content is what counts, not the place
    second, record, shown = again(moved)
    assert shown == 0 and np.array_equal(first["features"], second["features"])
    assert record.cached and record.count == 6 and record.bad[0].startswith("2x.png: ")
    both, record, shown = again(moved, ("features", "logits"))
    assert shown == 6 and not record.cached and set(both) == {"features", "logits"}
    assert again(moved, ("features", "logits"))[2] == 0
    # Other weights, another resize, other bytes: other features.
    for changes in ({"identity": {"weights_sha256": "01"}}, {"resize": "to 8x8"}, {"label": "another"}):
        other = Extractor(**{**vars(extractor), **changes})
        assert again(moved, extractor=other)[2] == 6
    Image.new("RGB", (20, 16)).save(moved / "5.png")
    assert again(moved)[2] == 6


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text"])
def test_a_damaged_cache_is_seen(folder, counting, tmp_path, damage, capsys):
    extractor, seen = counting
    cache = tmp_path / "cache"
    first, _ = extract(open_image_set(folder), extractor, ["features"], cache=cache)
    (file,) = cache.iterdir()
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes({"flip": data, "cut": data[:-8], "empty": b"", "text": b"x" * 100}[damage])
    seen.clear()
    again, record = extract(open_image_set(folder), extractor, ["features"], cache=cache)
    assert sum(seen) == 6 and not record.cached and np.array_equal(again["features"], first["features"])
    assert "damaged" in capsys.readouterr().err
    _, record = extract(open_image_set(folder), extractor, ["features"], cache=cache)
    assert record.cached  # it was written anew


def test_what_could_not_be_read_just_now_is_not_kept(folder, counting, tmp_path, monkeypatch):
    def fail(file):
        if file.name < "3":
            return file.read_bytes()
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patched:
        digest = ImageSet.digest(open_image_set(folder))
        patched.setattr(ImageSet, "digest", lambda _: digest)  # a moment ago it could be read
        patched.setattr("vugen_cli.metrics.image_sets._read_file", fail)
        _, record = extract(open_image_set(folder), counting[0], ["features"], cache=tmp_path / "cache")
        assert record.count == 3
    _, record = extract(open_image_set(folder), counting[0], ["features"], cache=tmp_path / "cache")
    assert record.count == 6 and not record.cached


def test_a_cache_that_cannot_be_written_costs_only_a_line(folder, counting, tmp_path, capsys):
    (tmp_path / "file").touch()
    features, _ = extract(
        open_image_set(folder), counting[0], ["features"], cache=tmp_path / "file" / "cache"
    )
    assert len(features["features"]) == 6
    assert "not cached" in capsys.readouterr().err


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("VUGEN_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "features"
    monkeypatch.delenv("VUGEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == tmp_path / "xdg" / "vugen" / "features"


def bicubic(n_out, n_in, scale):
    """The matrix [n_out, n_in] of torch's bicubic interpolation by a scale: Keys' kernel with a = -0.75."""

    def kernel(x):
        x, a = abs(x), -0.75
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4)

    matrix = np.zeros((n_out, n_in))
    for i in range(n_out):
        centre = (i + 0.5) / scale - 0.5
        for near in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[i, min(max(near, 0), n_in - 1)] += kernel(centre - near)
    return matrix


def test_dinov2_sees_what_dgm_eval_shows_it(tmp_path):
    """The published transform and interpolation, rewritten: dgm_eval/models/dinov2.py without clean_resize,
    and interpolate_pos_encoding of DINOv2's vision_transformer.py."""
    repair_torchvision()
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Dinov2Model(Dinov2Config(**sizes, image_size=70, patch_size=14)).eval()  # 5 x 5 places
    directory = tmp_path / "dinov2"
    model.save_pretrained(directory)  # and no preprocessing of its own: none is read
    extractor = dinov2_extractor(directory)
    images = torch.randint(0, 256, (2, 3, 300, 260), dtype=torch.uint8)
    found = extractor.features(images)["features"]
    assert found.shape == (2, 16) and "224 x 224" in extractor.resize

    rows = []
    for image in images.permute(0, 2, 3, 1).numpy():
        pixels = np.asarray(Image.fromarray(image).resize((224, 224), Image.BICUBIC)).astype(np.float64) / 255
        rows.append((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])
    stored = model.embeddings.position_embeddings.detach().double().numpy()[0]
    matrix = bicubic(16, 5, (16 + 0.1) / 5)
    places = np.einsum("ik,jl,kld->ijd", matrix, matrix, stored[1:].reshape(5, 5, 16)).reshape(256, 16)
    positions = torch.from_numpy(np.concatenate([stored[:1], places])[None]).float()
    plain = model(pixel_values=torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float())
    model.embeddings.position_embeddings = torch.nn.Parameter(positions)
    with torch.inference_mode():
        expected = model(pixel_values=torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float())
    torch.testing.assert_close(found, expected.last_hidden_state[:, 0], rtol=1e-4, atol=1e-5)
    assert (found - plain.last_hidden_state[:, 0]).abs().max() > 1e-4  # transformers' own places differ


def test_other_models_are_no_dinov2(tmp_path):
    repair_torchvision()
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes, image_size=28, patch_size=14)).save_pretrained(tmp_path)
    assert dinov2_extractor(tmp_path).identity["weights_fingerprint"]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(VugenError, match="lacks weights"):
        dinov2_extractor(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(VugenError, match="holds a vit model, not DINOv2"):
        dinov2_extractor(tmp_path)


def test_clip_is_its_image_embedding(tmp_path):
    repair_torchvision()
    import open_clip
    from safetensors.torch import save_file

    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-for-tests.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-for-tests.json")
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-for-tests")
    file = tmp_path / "tiny.safetensors"
    save_file(model.state_dict(), file)
    extractor = clip_extractor(f"tiny-for-tests:{file}")
    images = torch.randint(0, 256, (2, 3, 40, 36), dtype=torch.uint8)
    pixels = torch.stack([preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    with torch.inference_mode():
        expected = model.eval().encode_image(pixels)
        torch.testing.assert_close(extractor.features(images)["features"], expected)
    # io_util.py and embedding.py of google-research/cmmd, of a square image, which needs no crop: Pillow's
    # bicubic, values in [0, 1], CLIP's mean and deviation.
    square = Image.fromarray(images[0, :, :36].permute(1, 2, 0).numpy())
    rows = np.asarray(square.resize((32, 32), Image.BICUBIC)).astype(np.float64) / 255
    rows = (rows - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    np.testing.assert_allclose(preprocess(square).permute(1, 2, 0), rows, atol=1e-6)
    used = open_clip.get_pretrained_cfg("ViT-L-14-336", "openai")  # of these weights the same holds
    assert used["quick_gelu"] and used["interpolation"] == "bicubic" and used["resize_mode"] == "shortest"
    assert CMMD_FEATURES.split()[1] in open_clip.list_models()
    assert "tiny-for-tests" in extractor.label and extractor.identity["weights_fingerprint"]
    with pytest.raises(VugenError, match="could not be loaded"):
        clip_extractor(f"tiny-for-tests:{tmp_path / 'tiny-for-tests.json'}")
    with pytest.raises(VugenError, match="no model ViT-Z"):
        clip_extractor("ViT-Z:openai")
