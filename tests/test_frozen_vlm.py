"""The frozen VLM: latents, fingerprints, refusals, and that nothing ever changes it."""

import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from conftest import make_card, save_random_vlm, vugen
from safetensors.torch import load_file, save_file

from vugen_cli.errors import VugenError
from vugen_cli.vlm.chat import ask
from vugen_cli.vlm.frozen import FrozenVLM, load_vlm
from vugen_cli.vlm.prefix import one_stream


def test_latents_are_what_the_projector_reads(vlm: FrozenVLM) -> None:
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    z = vlm.encode(images)
    assert z.shape == (3, 8, 8, 32) and z.dtype == torch.float32 and not z.requires_grad
    pixels = images.float() / 127.5 - 1
    with vlm.taps[0].states() as seen, torch.no_grad():
        vlm.model.get_image_features(pixel_values=pixels)
    assert torch.allclose(z.flatten(1, 2), seen[0], atol=1e-4)


def test_encoding_is_invariant_to_batch(vlm: FrozenVLM) -> None:
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    together = vlm.encode(images)
    assert torch.allclose(together, torch.cat([vlm.encode(i[None]) for i in images]), atol=1e-5)


def test_the_empty_prompt_has_a_prefix_of_its_own(vlm: FrozenVLM) -> None:
    assert vlm.prefix([""]).lengths.item() < vlm.prefix(["a bear"]).lengths.item()


def test_prefix_rows_and_joins_agree(vlm: FrozenVLM) -> None:
    a, b = vlm.prefix(["a bear"], 16), vlm.prefix(["a cat on a beach"], 16)
    joined = type(a).join([a, b])
    both = vlm.prefix(["a bear", "a cat on a beach"], 16)
    for mine, theirs in zip(joined.keys, both.keys, strict=True):
        visible = both.mask[:, None, :, None]
        assert torch.allclose(mine * visible, theirs * visible, atol=1e-5)
    assert torch.equal(joined.rows(torch.tensor([1])).mask, b.mask)


def test_a_prompt_longer_than_the_model_reads_is_refused(vlm: FrozenVLM) -> None:
    with pytest.raises(VugenError, match="too long"):
        vlm.prompts.tokens("bear " * 5000)


def test_the_fingerprint_is_of_the_weights_alone(vlm: FrozenVLM, vlm_path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(vlm_path, tmp_path / "moved"))
    assert load_vlm(str(copy)).fingerprint == vlm.fingerprint
    assert load_vlm(str(save_random_vlm(tmp_path / "other", seed=1))).fingerprint != vlm.fingerprint


def test_another_vlm_is_refused_with_both_names(vlm: FrozenVLM, tmp_path: Path) -> None:
    other = load_vlm(str(save_random_vlm(tmp_path / "other", seed=1)))
    card = make_card(vlm={"name": "the-first-vlm", "fingerprint": vlm.fingerprint})
    with pytest.raises(VugenError, match="the-first-vlm .* but this is .*other"):
        other.check(card, "x.safetensors")


def test_the_model_still_answers(vlm: FrozenVLM) -> None:
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert len(ask(vlm.model, vlm.processor, images, "describe the picture", tokens=4)) == 2


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/vlm", "nowhere"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(name: str) -> None:
    started = time.perf_counter()
    with pytest.raises(VugenError, match="no VLM at"):
        load_vlm(name)
    assert time.perf_counter() - started < 2


def test_directories_that_are_no_vlm_are_refused(tmp_path: Path, vlm_path: Path) -> None:
    with pytest.raises(VugenError, match=r"no config\.json"):
        load_vlm(str(tmp_path))
    broken = Path(shutil.copytree(vlm_path, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(VugenError, match="could not be loaded"):
        load_vlm(str(broken))


def test_an_unreachable_hub_id_fails_within_seconds(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    started = time.perf_counter()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never says a word
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        result = vugen("train-reducer", "--vlm", "nobody/nothing", "--data", scenes, cwd=tmp_path)
    assert result.returncode == 1
    assert "hub cannot be reached" in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert time.perf_counter() - started < 60  # 5 s of waiting; the rest is importing on a busy machine


def test_a_vlm_with_a_weight_missing_is_refused_and_not_made_up(vlm_path: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(vlm_path, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file({n: t for n, t in tensors.items() if n != name}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(VugenError, match=r"1 of its weights are not .*q_proj.weight.* be random"):
        load_vlm(str(copy))


@pytest.mark.parametrize(("said", "both"), [(True, True), ("all", True), ("vision", False), (None, False)])
def test_a_decoder_that_reads_pictures_alone_both_ways_reads_texts_forwards(
    vlm: FrozenVLM, said: object, both: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vlm.decoder.config, "use_bidirectional_attention", said, raising=False)
    seen: list[dict[str, object]] = []
    hook = vlm.decoder.register_forward_pre_hook(lambda _m, _a, given: seen.append(given), with_kwargs=True)
    vlm.prefix(["a bear"])
    hook.remove()
    assert ("attention_mask" in seen[0]) == both


@pytest.mark.parametrize("batch", [2, 3])
def test_of_streams_side_by_side_the_one_that_layers_read_is_taken(
    vlm: FrozenVLM, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3n's three here are no rows of a batch of three."""
    monkeypatch.setattr(vlm.decoder.config, "altup_active_idx", 1, raising=False)
    streams = torch.randn(3, batch, 5, vlm.decoder.config.hidden_size)
    assert torch.equal(one_stream(streams, vlm.decoder.config), streams[1])
