"""Pictures in the prompt: read as when the VLM is asked about them, and drawn from."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_overrides, vugen_here
from PIL import Image
from torch import Tensor

from vugen_cli import VugenPipeline
from vugen_cli.checkpoint import combined_digest, weight_digests
from vugen_cli.data.loader import Batch, ShardedImages
from vugen_cli.errors import VugenError
from vugen_cli.recipe import Expert, MixtureSource, Recipe, SamplerTraining, Sampling, load_recipe
from vugen_cli.sampling.draw import draw
from vugen_cli.sampling.sampler import Sampler, for_vlm, open_picture, read_prompts
from vugen_cli.sampling.trained import load_sampler, new_expert
from vugen_cli.stages.latent_cache import write_latents
from vugen_cli.stages.train_sampler import (
    by_pictures,
    cut_prompt,
    held_out_prompts,
    prompts_of,
    train_sampler,
    velocity_of,
)
from vugen_cli.vlm.chat import ask, processed, question_inputs
from vugen_cli.vlm.frozen import FrozenVLM
from vugen_cli.vlm.prefix import Prefix
from vugen_cli.vlm.prompts import Prompt, Prompts

CPU = torch.device("cpu")


def noise(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=generator))


def test_the_prefix_is_what_the_vlm_keeps_when_it_answers(vlm: FrozenVLM) -> None:
    (picture,) = noise(1)
    before = combined_digest(weight_digests(vlm.model))
    inputs = question_inputs(vlm.model, vlm.processor, picture[None], "put it in the snow")
    answer = vlm.model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    prefix = vlm.prefix([Prompt("put it in the snow", (picture,))])
    for mine, layer in zip(prefix.keys, answer.past_key_values.layers, strict=True):
        assert torch.equal(mine, layer.keys)
    assert len(ask(vlm.model, vlm.processor, picture[None], "what is it?", 2)) == 1
    assert combined_digest(weight_digests(vlm.model)) == before


def test_pictures_stand_where_the_text_says_and_before_it_otherwise() -> None:
    one, two = noise(2)
    assert Prompt("make it red", (one, two)).parts() == [None, None, "make it red"]
    assert Prompt("{image} beside {image} in snow", (one, two)).parts() == [
        None,
        " beside ",
        None,
        " in snow",
    ]
    assert Prompt("", (one,)).parts("Draw {prompt}.") == [None]
    assert Prompt("it", (one,)).parts("Draw {prompt}.") == [None, "Draw it."]
    assert Prompt("a {image}").parts() == ["a {image}"], "text alone is left as it is"
    assert Prompt("a {prompt}").parts("{prompt}, {prompt}") == ["a {prompt}, a {prompt}"]
    twice = Prompt("on {image}", (one,)).parts("{prompt} {prompt}")
    assert twice == ["on ", None, " on "], "a prompt said twice shows its picture once"
    with pytest.raises(VugenError, match="places 1 pictures by {image}, and 2 are given"):
        Prompt("on {image}", (one, two)).parts()


def test_a_text_that_spells_the_picture_token_asks_for_no_picture_more(vlm: FrozenVLM) -> None:
    (picture,) = noise(1)
    spelt = vlm.prefix([Prompt("<image> a bear", (picture,))])
    assert torch.equal(spelt.keys[-1], vlm.prefix([Prompt(" a bear", (picture,))]).keys[-1])


def test_a_prompt_of_text_alone_keeps_its_bytes(vlm: FrozenVLM, lively_sampler: Sampler) -> None:
    for mine, theirs in zip(vlm.prefix(["a bear"]).keys, vlm.prefix([Prompt("a bear")]).keys, strict=True):
        assert torch.equal(mine, theirs)
    assert Prompt("a bear").key == "a bear"
    (one,) = [image for _, _, image in lively_sampler.sample(["a bear"])]
    beside = {p: image for p, _, image in lively_sampler.sample([Prompt("it", tuple(noise(1))), "a bear"])}
    assert torch.equal(one, beside[1])


def test_a_picture_prompt_is_drawn_alone_as_in_a_batch(lively_sampler: Sampler) -> None:
    prompts = [Prompt(text, (picture,)) for text, picture in zip(["", "a bear", "it"], noise(3), strict=True)]
    together = {p: image for p, _, image in lively_sampler.sample(prompts)}
    for p, prompt in enumerate(prompts):
        (alone,) = [image for _, _, image in lively_sampler.sample([prompt])]
        assert (alone.int() - together[p].int()).abs().max() <= 1
    assert not torch.equal(together[0], together[2])


def test_text_and_pictures_are_guided_by_scales_of_their_own(lively_sampler: Sampler) -> None:
    """With a velocity that is constant for each prefix, z̃ ends at the noise plus the guided velocity."""

    def of(value: float) -> Prefix:
        return Prefix([], [], torch.ones(1, 1, dtype=torch.bool), False, [torch.tensor([value])])

    fake = Sampler.__new__(Sampler)
    fake.__dict__ |= lively_sampler.__dict__
    seen: list[float] = []

    def expert(x: Tensor, _t: Tensor, prefix: Prefix) -> Tensor:
        seen.append(prefix.hidden[0].item())
        return torch.full_like(x, prefix.hidden[0].item())

    fake.__dict__ |= {"expert": expert, "unconditional": of(1.0)}
    settings = Sampling(steps=2, guidance=4.0, image_guidance=1.5)
    keys = [(0, "it", 0)]
    start = fake.latents(of(0.0), keys, settings.model_copy(update={"guidance": 1.0}))
    end = fake.latents(of(7.0), keys, settings, of(3.0))
    # 1 + 1.5 (3 - 1) + 4 (7 - 3)
    torch.testing.assert_close(end - start, torch.full_like(end, 20.0))
    half = fake.latents(of(7.0), keys, settings.model_copy(update={"guidance_interval": (0.0, 0.5)}), of(3.0))
    torch.testing.assert_close(half - start, torch.full_like(end, (20.0 + 7.0) / 2))
    seen.clear()
    fake.latents(of(7.0), keys, settings.model_copy(update={"image_guidance": 1.0}), of(3.0))
    assert set(seen) == {7.0, 3.0}, "a scale of 1 spares the pass without pictures"


def test_variations_follow_the_pictures_scale_alone(lively_sampler: Sampler) -> None:
    def drawn(**scales: float) -> Tensor:
        (image,) = [image for _, _, image in lively_sampler.sample([Prompt("", tuple(noise(1)))], **scales)]
        return image

    assert torch.equal(drawn(guidance=1.0), drawn(guidance=9.0))
    assert not torch.equal(drawn(image_guidance=1.0), drawn(image_guidance=9.0))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("one.png", "too small: 1x1 pixels"),
        ("words.png", "not an image file"),
        ("large.png", "too large"),
        ("cut.jpg", "corrupt JPEG|unreadable image"),
        ("missing.png", "cannot be read: No such file"),
    ],
)
def test_a_picture_that_cannot_be_used_is_named_in_one_line(tmp_path: Path, name: str, said: str) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    (tmp_path / "words.png").write_text("a bear")
    if name == "large.png":  # 196 megapixels in 24 kB
        Image.new("1", (14_000, 14_000)).save(tmp_path / name)
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    with pytest.raises(VugenError, match=f"{name}.*({said})"):
        open_picture(tmp_path / name, 64)


def test_pictures_of_every_kind_come_as_prepare_has_them(tmp_path: Path) -> None:
    red = Image.new("RGB", (100, 80), "red")
    red.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (100, 80), "blue")])
    Image.new("CMYK", (100, 80), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    Image.new("RGBA", (100, 80), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    colours = {
        "moving.gif": (254, 0, 0),
        "print.jpg": (254, 0, 0),
        "clear.png": (255, 255, 255),
    }
    for name, colour in colours.items():
        picture = open_picture(tmp_path / name, 32)
        assert picture.shape == (3, 32, 32) and picture.dtype == torch.uint8
        assert (picture.int() - torch.tensor(colour)[:, None, None]).abs().max() <= 3, name
    assert torch.equal(open_picture(red, 32), open_picture(red.convert("RGBA"), 32))


def test_the_command_draws_from_a_picture_with_and_without_words(trained: Path, tmp_path: Path) -> None:
    Image.new("RGB", (80, 60), "green").save(tmp_path / "a.png")
    common = ("--sampler", trained / "sampler.safetensors", "--image", "a.png")
    told = vugen_here(
        "sample", "put it in the snow", *common, "--image-guidance", 2, "--out", "e", cwd=tmp_path
    )
    assert told.returncode == 0, told.stderr
    (row,) = map(json.loads, (tmp_path / "e" / "samples.jsonl").read_text().splitlines())
    assert row["prompt"] == "put it in the snow" and row["image_guidance"] == 2
    assert Image.open(tmp_path / "e" / row["sources"][0]).size == (64, 64)
    varied = vugen_here("sample", *common, "--image", "a.png", "-n", 2, "--out", "v", cwd=tmp_path)
    assert varied.returncode == 0, varied.stderr
    rows = [json.loads(line) for line in (tmp_path / "v" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["prompt"] == "" and len(rows[0]["sources"]) == 2
    assert rows[0]["file"].startswith("variation-")
    wrong = vugen_here("sample", "x", *common, "--image", "none.png", cwd=tmp_path)
    assert wrong.returncode == 1 and wrong.stderr.strip().splitlines()[-1].startswith("error: none.png")
    assert "which holds no edits of pictures" in told.stdout, "this sampler learned from captions"


def test_a_place_for_a_picture_that_is_not_given_is_refused(tmp_path: Path) -> None:
    done = vugen_here("sample", "a hat on {image}", "--out", "e", cwd=tmp_path)
    said = "error: a prompt says {image}, and no picture is given: add --image FILE (a hat on {image})"
    assert done.returncode == 1 and done.stderr.strip().endswith(said) and not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    "given",
    [
        {"guidance": float("nan")},
        {"image_guidance": float("inf")},
        {"guidance": -1.0},
        {"steps": 0},
        {"solver": "rk4"},
    ],
    ids=str,
)
def test_a_setting_that_there_is_not_is_refused_before_anything_is_drawn(
    lively_sampler: Sampler, given: dict[str, Any], tmp_path: Path
) -> None:
    (name,) = given
    with pytest.raises(VugenError, match=rf"recipe key `sampling.{name}`: Input should be .* \(got "):
        draw(lively_sampler, ["a bear"], 1, tmp_path / "drawn", **given)
    assert not (tmp_path / "drawn").exists()


def test_more_pictures_than_are_told_apart_are_refused(
    lively_sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lively_sampler.expert, "reference", True)
    with pytest.raises(VugenError, match="a prompt has 17 pictures: give at most 16"):
        lively_sampler.sample([Prompt("it", noise(17))])


def test_a_start_token_that_the_template_has_is_not_added_again() -> None:
    told: list[dict[str, Any]] = []

    def processor(**given: Any) -> None:
        told.append(given)

    processor.tokenizer = SimpleNamespace(bos_token="<s>")  # type: ignore[attr-defined]
    for text in ("<s>User: a bear", "User: a bear"):
        processed(processor, [text], [noise(1)])
    assert [given.get("add_special_tokens") for given in told] == [False, None]


@pytest.mark.parametrize(
    ("names", "reference", "learned"),
    [
        ("openmoji", False, False),
        ("edits", False, True),
        ("openmoji-edits + openmoji", False, True),
        ("openmoji", True, True),
    ],
)
def test_a_sampler_tells_from_its_card_whether_it_learned_edits(
    lively_sampler: Sampler, names: str, reference: bool, learned: bool
) -> None:
    card = lively_sampler.card.model_copy(deep=True)
    card.data.dataset = names
    fake = Sampler.__new__(Sampler)
    fake.__dict__ |= {"card": card, "expert": SimpleNamespace(reference=reference)}
    assert fake.learned_edits is learned


def test_previews_cut_long_captions_as_training_does(edits: Path, vlm: FrozenVLM) -> None:
    images = ShardedImages(edits)
    told = [meta["captions"][0] for _, meta in images.held_out().in_order(16)]
    assert [prompt.text for prompt in held_out_prompts(images, vlm.prompts)] == told, "short ones stay"
    short = Prompts(vlm.prompts.tokenizer, "tiny", "{prompt}", 3)
    assert max(map(len, told)) > 12
    for prompt in held_out_prompts(images, short):
        assert prompt.pictures and short.tokens(prompt.text)  # which refuses longer ones
    places = cut_prompt("{image} " + "very " * 300, tuple(noise(2)), vlm.prompts)
    assert places.parts()[:2] == [None, None], "a place too few is none"


def test_the_pipeline_takes_pictures(lively_sampler: Sampler) -> None:
    pipe = VugenPipeline(lively_sampler)
    pipe.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (80, 60), "green")
    told = pipe("put it in the snow", image=picture, seed=0, output_type="pt").images
    cut = open_picture(picture, 64)
    (drawn,) = [image for _, _, image in lively_sampler.sample([Prompt("put it in the snow", (cut,))])]
    assert torch.equal((told[0] * 255).round().to(torch.uint8), drawn)
    assert len(pipe(image=[picture, picture], num_images_per_prompt=2, seed=0).images) == 2
    with pytest.raises(VugenError, match="cannot be used in a prompt"):
        pipe("x", image=b"no picture")
    with pytest.raises(VugenError, match="cannot be used in a prompt: empty file"):
        pipe("x", image=b"")
    with pytest.raises(
        VugenError, match="a picture is given as ndarray: give a file, its bytes or a PIL image"
    ):
        pipe("x", image=np.zeros((64, 64, 3), dtype=np.uint8))
    with pytest.raises(VugenError, match=r"a prompt says {image}, and no picture is given: add image=\.\.\."):
        pipe(["x", "a hat on {image}"])


def test_text_and_pictures_are_left_out_apart(vlm: FrozenVLM) -> None:
    pictures = noise(1)
    settings = SamplerTraining(prompt_dropout=0.1, text_dropout=0.2, picture_dropout=0.3)
    chances = torch.tensor([0.05, 0.15, 0.45, 0.65, 0.05, 0.15, 0.45])
    captions = ["make it red"] * 4 + ["a bear"] * 3
    tokens = [vlm.prompts.tokens(caption) for caption in captions]
    batch = Batch(torch.empty(7), captions, [], 0, tokens, 0, [pictures] * 4 + [[]] * 3)
    asked = prompts_of(batch, chances, settings, vlm.prompts)
    assert [p.parts() if isinstance(p, Prompt) else p for p in asked] == [
        "",
        [None],
        tokens[2],
        [None, "make it red"],
        "",
        tokens[5],
        tokens[6],
    ]


def test_an_instruction_that_is_cut_places_no_picture_that_is_gone(vlm: FrozenVLM) -> None:
    caption = "put it on {image} " + "very " * 300 + " with {image}"
    batch = Batch(torch.empty(1), [caption], [], 0, [[1]], 0, [noise(2)])
    (prompt,) = prompts_of(batch, torch.tensor([0.9]), SamplerTraining(), vlm.prompts)
    assert isinstance(prompt, Prompt) and prompt.parts()[:2] == [None, None]
    assert vlm.prompt_length(prompt) > 0


def losses(out: Path) -> list[float]:
    lines = (out.with_suffix(".run") / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_a_process_of_a_job_that_has_no_pictures_of_its_own_draws_all_the_same(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = load_sampler(trained / "sampler.safetensors")
    prompts = [Prompt("put it in the snow", (torch.zeros(3, 64, 64, dtype=torch.uint8),)), "a bear"]
    for name, value in (("rank", 1), ("world_size", 2)):
        monkeypatch.setattr(f"vugen_cli.sampling.draw.{name}", lambda value=value: value)
    draw(sampler, prompts, 1, tmp_path / "drawn", image_guidance=2.0)
    (row,) = map(json.loads, (tmp_path / "drawn/samples.jsonl").read_text().splitlines())
    assert row["prompt"] == "a bear" and "sources" not in row
    with pytest.raises(VugenError, match="none is given"):
        draw(sampler, ["a tree", "a bear"], 1, tmp_path / "drawn", image_guidance=2.0)


def test_a_sampler_learns_from_edits_and_captioned_images_live_and_cached(
    trained: Path, edits: Path, scenes: Path, vlm_path: Path, tmp_path: Path
) -> None:
    for name, path in (("edits", edits), ("scenes", scenes)):
        write_latents(trained / "reducer.safetensors", path, tmp_path / name, CPU)
    found = []
    for kind, paths in (("live", (edits, scenes)), ("cached", (tmp_path / "edits", tmp_path / "scenes"))):
        recipe = load_recipe(
            None, [*tiny_overrides(vlm_path), "train_sampler.batch_size=8", "train_sampler.steps=2"]
        )
        recipe.data.mixture = [MixtureSource(path=str(path)) for path in paths]
        out = train_sampler(
            recipe, trained / "reducer.safetensors", None, tmp_path / f"{kind}.safetensors", CPU
        )
        found.append(losses(out))
        assert (out.with_suffix(".run") / "preview-0000002.png").is_file()
    assert len(found[0]) == 2 and found[0] == pytest.approx(found[1], rel=2e-3)
    sampler = load_sampler(tmp_path / "live.safetensors")
    assert sampler.defaults.image_guidance == 1.5 and sampler.card.data.mixture


def test_texts_and_edits_of_a_batch_train_recomputed_layers_that_know_the_time(
    trained: Path, edits: Path, vlm_path: Path, tmp_path: Path
) -> None:
    """Read one after the other, the first would be recomputed with the times of the second."""
    found = []
    for recomputed in (False, True):
        more = [f"engine.recompute={recomputed}", "expert.adaptive_norms=true", "train_sampler.steps=2"]
        more += ["train_sampler.picture_dropout=0.5", "train_sampler.batch_size=8"]
        recipe = load_recipe(None, [*tiny_overrides(vlm_path), *more])
        out = tmp_path / f"{recomputed}.safetensors"
        train_sampler(recipe, trained / "reducer.safetensors", edits, out, CPU)
        found.append(losses(out))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_edits_and_a_shared_out_vlm_are_refused(
    trained: Path, edits: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vugen_cli.stages.train_sampler.shards_vlm", lambda _engine: True)
    with pytest.raises(VugenError, match=r"holds edits, which engine\.shard_vlm cannot read"):
        train_sampler(tiny_recipe, trained / "reducer.safetensors", edits, tmp_path / "x.safetensors", CPU)


KINDS = [Expert(reference=True), Expert(reference=True, kind="dit", width=32, heads=2, depth=2)]


@pytest.mark.parametrize("recipe", KINDS, ids=lambda recipe: recipe.kind)
def test_an_expert_reads_reference_latents_alone_as_in_a_batch(
    vlm: FrozenVLM, lively_sampler: Sampler, recipe: Expert
) -> None:
    torch.manual_seed(0)
    expert = new_expert(vlm, lively_sampler.card.latents, recipe).eval()
    for parameter in expert.parameters():
        if not parameter.any():  # zero at the start, which would hide what lies before
            torch.nn.init.normal_(parameter, std=0.3)
    one, two, three = noise(3)
    prompts = [Prompt("it", (one,)), Prompt("a bear"), Prompt("both", (two, three)), Prompt("", (three,))]
    read = partial(read_prompts, vlm, expert, lively_sampler.autoencoder)
    x, t = torch.randn(4, 8, 8, 4), torch.tensor([0.1, 0.4, 0.6, 0.9])
    with torch.no_grad():
        together = expert(x, t, read(prompts))
        for i, prompt in enumerate(prompts):
            alone = expert(x[i : i + 1], t[i : i + 1], read([prompt]))
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)
            parts = Prefix.join([read([p], 192) for p in prompts[i:]])
            torch.testing.assert_close(together[i:], expert(x[i:], t[i:], parts), atol=1e-5, rtol=1e-5)
        kinds = by_pictures(prompts)
        assert kinds == [[1], [0, 2, 3]]
        apart = velocity_of(expert, kinds, [read([prompts[i] for i in rows]) for rows in kinds], x, t, [])
        torch.testing.assert_close(apart, together, atol=1e-5, rtol=1e-5)
        prefix = read(prompts)
        assert prefix.references is not None
        moved = expert(x, t, replace(prefix, references=prefix.references + 1))
    assert torch.equal(moved[1], together[1]) and (moved - together).abs().amax((1, 2, 3))[0] > 1e-4


@pytest.mark.parametrize("recipe", KINDS, ids=lambda recipe: recipe.kind)
def test_a_part_of_a_batch_without_pictures_has_every_gradient_that_the_others_have(
    vlm: FrozenVLM, lively_sampler: Sampler, recipe: Expert
) -> None:
    """A process that has none to average would leave the others waiting."""
    expert = new_expert(vlm, lively_sampler.card.latents, recipe)
    prefix = read_prompts(vlm, expert, lively_sampler.autoencoder, ["a bear"])
    x, t = torch.randn(1, 8, 8, 4), torch.tensor([0.4])
    expert(x, t, prefix).sum().backward()
    assert all(parameter.grad is not None for parameter in expert.parameters())
    assert not expert.get_parameter("reference_embed.weight").grad.any()  # type: ignore[union-attr]


def test_a_plain_expert_has_no_weights_for_references(vlm: FrozenVLM, lively_sampler: Sampler) -> None:
    names = {
        bool(reference): set(
            new_expert(vlm, lively_sampler.card.latents, Expert(reference=reference)).state_dict()
        )
        for reference in (False, "only")
    }
    assert names[True] - names[False] == {"reference_embed.weight"} and not names[False] - names[True]


def test_a_sampler_of_texts_is_trained_further_to_read_references_alone(
    trained: Path, edits: Path, vlm_path: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(None, [*tiny_overrides(vlm_path), "expert.reference=only", "train_sampler.steps=1"])
    out, init = tmp_path / "e.safetensors", trained / "sampler.safetensors"
    train_sampler(recipe, init, edits, out, CPU, init=init)
    sampler = load_sampler(out)
    asked = Prompt("put {image} in the snow", tuple(noise(1)))
    assert for_vlm(asked, sampler.expert).text == "put  in the snow"
    assert sampler.vlm.prompt_length(for_vlm(asked, sampler.expert)) < sampler.vlm.prompt_length(asked)
    (drawn,) = [image for _, _, image in sampler.sample([asked], steps=1)]
    assert drawn.shape == (3, 64, 64)
    with pytest.raises(VugenError, match="places 2 pictures"):
        sampler.kind(Prompt("put {image} beside {image}", tuple(noise(1))))
