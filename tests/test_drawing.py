"""What `vugen sample` does around the sampler: prompts, which sampler, a folder that is whole or has no list.

About two seconds, most of them for the tiny sampler of the suite.
"""

import copy
import hashlib
import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from vugen_cli.checkpoint import load_checkpoint, select
from vugen_cli.errors import VugenError
from vugen_cli.files import locked
from vugen_cli.metrics.image_sets import open_image_set
from vugen_cli.metrics.samples import UNFINISHED
from vugen_cli.models.autoencoder import Autoencoder
from vugen_cli.models.vae import FrozenVAE
from vugen_cli.recipe import parse_recipe
from vugen_cli.sampling import sampler as module
from vugen_cli.sampling.draw import collect_prompts, draw, file_stems, pick_sampler
from vugen_cli.sampling.sampler import WIDTH, Sampler
from vugen_cli.sampling.trained import load_autoencoder, load_sampler, located, merge, save_autoencoder


def killed(*_: Any) -> Iterator[Any]:
    raise KeyboardInterrupt
    yield


def test_an_interrupted_drawing_leaves_no_listing_of_the_one_before(
    lively_sampler: Sampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(lively_sampler, ["a bear"], 1, tmp_path, steps=1)
    for wrong in ({"prompts": ["a bear " * 400]}, {"prompts": ["a bear"], "size": (80, 48)}):
        with pytest.raises(VugenError):  # what cannot be drawn costs nothing
            draw(lively_sampler, n=1, out=tmp_path, **wrong)
    assert (tmp_path / "samples.jsonl").is_file()
    monkeypatch.setattr(lively_sampler, "sample", killed)
    with pytest.raises(KeyboardInterrupt):
        draw(lively_sampler, ["a bear"], 1, tmp_path)
    assert not (tmp_path / "samples.jsonl").exists() and list(tmp_path.glob("a-bear-*.png"))
    with pytest.raises(VugenError, match="did not finish"):  # its old pictures would be scored
        open_image_set(tmp_path)


def test_a_drawing_goes_on_where_it_was_interrupted(
    lively_sampler: Sampler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = ["a bear", "two cats"]
    whole, drawing = draw(lively_sampler, prompts, 2, tmp_path / "whole", steps=1), tmp_path / "drawing"
    sample, calls = lively_sampler.sample, []

    def third_fails(*given: Any) -> Iterator[Any]:
        calls.append(given[-1])
        return chain(
            islice(sample(*given), 3 if len(calls) == 1 else None), killed() if len(calls) == 1 else ()
        )

    monkeypatch.setattr(lively_sampler, "sample", third_fails)
    with pytest.raises(KeyboardInterrupt):
        draw(lively_sampler, prompts, 2, drawing, steps=1)
    with pytest.raises(VugenError, match="did not finish"):  # the first drawing into it, too
        open_image_set(drawing)
    draw(lively_sampler, prompts, 2, drawing, steps=1)
    assert calls == [set(), {(0, 0), (0, 1), (1, 0)}]
    assert "3 pictures of a drawing that did not finish stay" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == {
        p.name: p.read_bytes() for p in drawing.iterdir()
    }


@pytest.mark.parametrize("other", [{"seed": 1}, {"steps": 2}, {"guidance": 2.0}])
def test_what_another_command_drew_is_drawn_anew(
    lively_sampler: Sampler, tmp_path: Path, other: dict[str, Any]
) -> None:
    draw(lively_sampler, ["a bear"], 1, tmp_path, **({"steps": 1} | other))
    (tmp_path / "samples.jsonl").replace(tmp_path / UNFINISHED)
    draw(lively_sampler, ["a bear"], 1, tmp_path, steps=1)
    whole = draw(lively_sampler, ["a bear"], 1, tmp_path / "whole", steps=1)
    (name,) = (path.name for path in whole.glob("a-bear-*.png"))
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_of_folders_of_samples_the_samples_alone_are_a_set(lively_sampler: Sampler, tmp_path: Path) -> None:
    for name in ("bears", "cats"):
        draw(lively_sampler, [name], 2, tmp_path / name, steps=1)
        (tmp_path / name / "sources").mkdir()
        (tmp_path / name / "grid.png").replace(tmp_path / name / "sources" / "one.png")
        (tmp_path / name / "grid.png").write_bytes((tmp_path / name / "sources" / "one.png").read_bytes())
    assert open_image_set(tmp_path).total == 4


def test_two_do_not_draw_into_one_folder_at_once(lively_sampler: Sampler, tmp_path: Path) -> None:
    with locked(tmp_path, "busy"), pytest.raises(VugenError, match="another process is drawing into"):
        draw(lively_sampler, ["a bear"], 1, tmp_path)


def test_prompts_that_would_share_a_file_name_are_told_apart_by_a_longer_hash() -> None:
    seen: dict[str, str] = {}
    for number in range(100_000):  # two of the first few thousand agree in 24 bits
        prompt = chr(0x4E00 + number // 256) + chr(0x4E00 + number % 256)
        other = seen.setdefault(hashlib.sha256(prompt.encode()).hexdigest()[:6], prompt)
        if other != prompt:
            break
    *long, short, again = file_stems([other, prompt, "a bear", "a bear"])
    assert len(set(long)) == 2 and all(len(stem) == len("prompt-") + 12 for stem in long)
    assert short == again == f"a-bear-{hashlib.sha256(b'a bear').hexdigest()[:6]}"
    assert len(file_stems([prompt])[0]) == len("prompt-") + 6


def test_a_link_to_nothing_and_a_file_that_is_being_written_are_no_samplers(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gone.safetensors").symlink_to("nowhere")
    Path("mine.safetensors").symlink_to(trained / "sampler.safetensors")
    os.link(trained / "sampler.safetensors", ".sampler.safetensors.x1.safetensors")
    assert pick_sampler(None) == Path("mine.safetensors")
    Path("mine.safetensors").unlink()
    assert "bundles" in pick_sampler(None).parts


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    for name in ("prompts.txt", "prompts/1.txt"):
        (tmp_path / name).write_text("a bear\n", encoding="utf-8-sig")
    assert collect_prompts([], tmp_path / "prompts.txt") == ["a bear"]
    assert collect_prompts([], tmp_path / "prompts") == ["a bear"]


def test_prompts_that_are_not_drawn_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "1.txt").write_text("a bear\n")
    (folder / "2.txt").write_text(" a  bear ")
    (folder / "._1.txt").write_bytes(b"\0\xff")  # as macOS leaves them
    assert collect_prompts(["a cat"], folder) == ["a cat", "a bear"]
    assert "1 of 3 prompts are repeats: each is drawn once" in capsys.readouterr().out
    (folder / "3.txt").write_bytes("ein Bär".encode("latin-1"))
    with pytest.raises(VugenError, match=r"3\.txt: no text in UTF-8"):
        collect_prompts([], folder)


def test_the_bundled_sampler_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert located("nano") == located(None) and located("nano")[0].is_file()
    Path("nano").mkdir()
    assert located("nano")[0].parent == Path("nano")


def test_a_sampler_moves_with_its_vae_and_takes_the_precision_of_the_device(
    lively_sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "passes", lambda precision, device: (precision, device))
    moved, here = copy.copy(lively_sampler), torch.device("cpu")
    config = SimpleNamespace(latent_channels=4, block_out_channels=[8], scaling_factor=1.0, shift_factor=0.0)
    vae = nn.Linear(2, 2)
    vae.config = config  # type: ignore[assignment]
    moved.vlm = SimpleNamespace(model=nn.Linear(2, 2), device=here)  # type: ignore[assignment]
    moved.expert = nn.Linear(2, 2)  # type: ignore[assignment]
    moved.autoencoder = copy.deepcopy(lively_sampler.autoencoder)
    moved.autoencoder.vae = FrozenVAE(vae, "a vae")
    away = torch.device("meta")
    moved.to(away)
    networks = (moved.vlm.model, moved.expert, moved.autoencoder, vae)
    assert {weight.device for network in networks for weight in network.parameters()} == {away}
    assert moved.passes == (lively_sampler.defaults.precision, away)


def test_a_template_longer_than_the_padding_of_prompts_is_drawn(trained: Path) -> None:
    sampler = load_sampler(trained / "sampler.safetensors")
    system = "You draw what you are told to. " * 20
    sampler.vlm.processor.tokenizer.chat_template = (
        f"{system}{{% for message in messages %}}{{{{ message.content }}}}{{% endfor %}}"
    )
    assert sampler.vlm.prompt_length("") > WIDTH
    assert next(sampler.sample(["a bear"]))[2].shape == (3, 64, 64)


def test_a_decoder_for_larger_pictures_draws_the_same_latents(trained: Path, tmp_path: Path) -> None:
    tensors, card = load_checkpoint(trained / "reducer.safetensors")
    card.recipe["decoder"]["patch"] *= 2
    torch.manual_seed(0)
    module = Autoencoder(parse_recipe(card.recipe, "large"), card.latents.width)
    module.reducer.load_state_dict(select(tensors, "autoencoder.reducer"))
    large = tmp_path / "large.safetensors"
    data = card.data.model_copy(update={"path": "data/large"})
    save_autoencoder(module, large, card.model_copy(update={"image_size": 128, "data": data}))
    sampler = load_sampler(trained / "sampler.safetensors", decoder=large)
    assert next(sampler.sample(["a bear"]))[2].shape == (3, 128, 128)
    assert (sampler.card.image_size, sampler.card.decoder) == (128, str(large))
    assert sampler.card.data.path == "data/large"
    with pytest.raises(VugenError, match="is one of the files to merge"):
        merge(trained / "sampler.safetensors", [], large, decoder=large)
    merge(trained / "sampler.safetensors", [], tmp_path / "both.safetensors", decoder=large)
    both = load_sampler(tmp_path / "both.safetensors")
    one, other = (next(s.sample(["a bear"]))[2] for s in (sampler, both))
    assert torch.equal(one, other) and both.card.image_size == 128


def test_the_bundled_decoder_of_128_px_draws_the_same_picture_twice_as_large() -> None:
    small, large = load_sampler(), load_sampler(decoder="nano-128")
    one, other = (next(s.sample(["a bear in a forest"], seed=1))[2] for s in (small, large))
    assert one.shape == (3, 64, 64) and other.shape == (3, 128, 128)
    reduced = functional.interpolate(other[None].float(), (64, 64), mode="area")[0]
    assert (reduced - one.float()).abs().mean() < 6
    assert (large.card.image_size, large.card.decoder) == (128, "nano-128")
    assert load_autoencoder("nano-128", torch.device("cpu"))[2].image_size == 128  # `vugen reconstruct`
    assert large.card.data.path == "data/openmoji-128" and small.card.data.path == "data/openmoji"
