"""Every family of VLMs goes through the same code: latents, prefix, expert, both stages, sampling."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from conftest import tiny_overrides, vugen_here
from safetensors import safe_open
from tokenizers.processors import TemplateProcessing

from vugen_cli.checkpoint import read_card
from vugen_cli.errors import VugenError
from vugen_cli.models.dit_expert import DiTExpert
from vugen_cli.models.generation_expert import GenerationExpert, image_positions
from vugen_cli.recipe import Recipe, load_recipe
from vugen_cli.sampling.trained import load_sampler
from vugen_cli.stages.train_reducer import train_reducer
from vugen_cli.stages.train_sampler import train_sampler
from vugen_cli.studies.understanding import weight_hash
from vugen_cli.vlm.chat import ask
from vugen_cli.vlm.frozen import FrozenVLM, load_vlm
from vugen_cli.vlm.latents import check_grid, on_device_of, raster_index
from vugen_cli.vlm.prompts import Prompt

PROMPTS = ["a bear", "two apples to the left of a red car in a city at night", ""]
# What each model's projector reads of a 64 px image: (rows, columns, width).
GRIDS = {
    "llava_clip": (4, 4, 32),
    "llava_siglip": (4, 4, 32),
    "llava_pixtral": (8, 8, 32),
    "llava_onevision": (4, 4, 32),
    "internvl": (4, 4, 128),
    "qwen2_5_vl": (10, 10, 32),
    "qwen3_vl": (8, 8, 32),
    "paligemma": (4, 4, 32),
    "gemma3": (8, 8, 32),
    "idefics3": (8, 8, 32),
    "smolvlm": (8, 8, 32),
    "perception_lm": (8, 8, 32),
    "mistral3": (8, 8, 32),
}


@pytest.fixture(scope="module", params=list(families.FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FrozenVLM:
    path = families.build(request.param, tmp_path_factory.mktemp("family") / request.param)
    return load_vlm(str(path))


def name_of(vlm: FrozenVLM) -> str:
    return Path(vlm.name).name


def flat_images(count: int) -> torch.Tensor:
    return torch.full((count, 3, 64, 64), 127, dtype=torch.uint8)


def noise(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=generator)


def awake(expert: GenerationExpert) -> GenerationExpert:
    torch.nn.init.normal_(expert.proj_out.weight)  # zero at the start, which would hide everything
    return expert.eval()


def test_latents_are_a_grid_in_the_order_of_the_picture(family: FrozenVLM) -> None:
    """A change in one quarter of the picture moves that quarter of z most, and no other image."""
    images = flat_images(3)
    z = family.encode(images)
    _, height, width, _ = z.shape
    assert z.shape[1:] == GRIDS[name_of(family)] and z.dtype == torch.float32
    generator = torch.Generator().manual_seed(0)
    for row in (0, 1):
        for column in (0, 1):
            moved = images.clone()
            noise = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=generator)
            moved[1, :, row * 32 + 8 : row * 32 + 24, column * 32 + 8 : column * 32 + 24] = noise
            change = (family.encode(moved) - z).norm(dim=-1)
            assert change[[0, 2]].max() < 1e-4
            rows, columns = (
                slice(row * height // 2, (row + 1) * height // 2),
                slice(column * width // 2, (column + 1) * width // 2),
            )
            share = change[1, rows, columns].sum() / change[1].sum()
            assert share > 0.28  # a quarter if the change were everywhere


def test_a_batch_of_prompts_gives_what_each_gives_alone(family: FrozenVLM) -> None:
    _, height, width, _ = family.encode(flat_images(1)).shape
    torch.manual_seed(0)
    expert = awake(GenerationExpert(family.decoder, 4, (height, width)))
    x, t = torch.randn(3, height, width, 4), torch.tensor([0.1, 0.5, 0.9])
    batch = family.prefix(PROMPTS, 40)
    with torch.no_grad():
        together = expert(x, t, batch)
        for i, prompt in enumerate(PROMPTS):
            alone = family.prefix([prompt])
            length = int(alone.lengths)
            for mine, theirs in zip(batch.keys + batch.values, alone.keys + alone.values, strict=True):
                assert torch.allclose(mine[i, :, :length], theirs[0], atol=1e-5)
            assert torch.allclose(together[i], expert(x[i : i + 1], t[i : i + 1], alone)[0], atol=2e-5)
        # Image tokens read the prompt, and each other both ways.
        assert (expert(x, t, family.prefix(["a cat on a beach"] * 3)) - together).abs().max() > 1e-6
        for place, other in (((0, 0), (-1, -1)), ((-1, -1), (0, 0))):
            moved = x.clone()
            moved[:, *place] += 1
            assert (expert(moved, t, batch) - together)[:, *other].abs().max() > 1e-7


def test_pictures_in_prompts_give_alone_what_they_give_in_a_batch(family: FrozenVLM) -> None:
    one, two, three = noise(3)
    prompts = [
        Prompt("put it in the snow", (one,)),
        "a bear",
        Prompt("two apples to the left of a red car", (two,)),
        Prompt("{image} with the hat of {image}", (one, three)),
        Prompt("", (three,)),
    ]
    if name_of(family) == "smolvlm":
        with pytest.raises(VugenError, match="num2words"):
            family.prefix(prompts)
        return
    torch.manual_seed(0)
    expert = awake(GenerationExpert(family.decoder, 4, (4, 4)))
    x, t = torch.randn(1, 4, 4, 4).expand(5, -1, -1, -1), torch.full((5,), 0.5)
    batch = family.prefix(prompts)
    with torch.no_grad():
        together = expert(x, t, batch)
        for i, prompt in enumerate(prompts):
            alone = family.prefix([prompt])
            length = int(alone.lengths)
            assert length == family.prompt_length(prompt)
            for mine, theirs in zip(batch.keys + batch.values, alone.keys + alone.values, strict=True):
                assert torch.allclose(mine[i, :, :length], theirs[0], atol=1e-5)
            # Of numbers up to 16, which each processor rounds in its own way.
            assert torch.allclose(together[i], expert(x[:1], t[:1], alone)[0], atol=5e-5)
        other = family.prefix([Prompt("put it in the snow", (three,))])
        assert (expert(x[:1], t[:1], other)[0] - together[0]).abs().max() > 1e-6  # pictures are read


# Both stages of every type are run by `python tests/matrix.py`.
@pytest.mark.parametrize("family", ["llava_siglip", "qwen2_5_vl", "smolvlm", "gemma3"], indirect=True)
def test_both_stages_train_and_a_sampler_draws(family: FrozenVLM, scenes: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        None,
        [
            *tiny_overrides(Path(family.name)),
            "train_reducer.steps=1",
            "train_sampler.steps=1",
            "expert.kind=dit",
            "expert.width=32",
            "expert.heads=2",
            "expert.mlp=48",
            "instruction=Draw {prompt}.",
        ],
    )
    before = weight_hash(family.model)
    device = torch.device("cpu")
    reducer = train_reducer(recipe, scenes, tmp_path / "r.safetensors", device)
    out = train_sampler(recipe, reducer, scenes, tmp_path / "s.safetensors", device)
    sampler = load_sampler(out)
    assert isinstance(sampler.expert, DiTExpert) and sampler.expert.proj_in.out_features == 32
    images = [image for _, _, image in sampler.sample(["a bear"])]
    assert images[0].shape == (3, 64, 64)
    with safe_open(out, "pt") as file:
        assert {key.split(".")[0] for key in file.keys()} == {"autoencoder", "expert"}  # noqa: SIM118
        assert not any("embed_tokens" in key for key in file.keys())  # noqa: SIM118
    assert read_card(out).latents.grid == GRIDS[name_of(family)][:2]
    assert weight_hash(load_vlm(family.name).model) == before == weight_hash(sampler.vlm.model)


def test_a_family_still_answers(family: FrozenVLM) -> None:
    if name_of(family) == "smolvlm":
        with pytest.raises(VugenError, match="num2words"):
            ask(family.model, family.processor, flat_images(1), "what is it?", 2)
    else:
        assert len(ask(family.model, family.processor, flat_images(2), "what is it?", 2)) == 2


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.build("llava_siglip", tmp_path_factory.mktemp("llava") / "llava")


def test_the_recipe_says_what_z_is(llava: Path) -> None:
    assert load_vlm(str(llava), recipe=Recipe(latents="projector")).encode(flat_images(1)).shape[-1] == 64
    assert load_vlm(str(llava), recipe=Recipe(vlm_size=112)).encode(flat_images(1)).shape[1:3] == (8, 8)
    half = load_vlm(str(llava), recipe=Recipe(vlm_dtype="bfloat16"))
    whole = load_vlm(str(llava))
    assert half.model.dtype == torch.bfloat16 and half.fingerprint == whole.fingerprint
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    assert torch.allclose(half.encode(images), whole.encode(images), atol=0.1)


def test_a_size_the_model_cannot_see_is_refused_in_one_line(tmp_path: Path) -> None:
    path = families.build("qwen3_vl", tmp_path / "qwen")
    with pytest.raises(VugenError, match=r"cannot read images at 50 px \(recipe key vlm_size\)"):
        load_vlm(str(path), recipe=Recipe(vlm_size=50)).encode(flat_images(1))


def test_processors_written_with_pillow_are_given_images_on_the_cpu() -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device="meta")  # stands for a GPU
    plain = on_device_of(SimpleNamespace(backend="torchvision"), images, images.device)
    assert [image.device.type for image in plain] == ["meta", "meta"]
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        on_device_of(SimpleNamespace(backend="pil"), images, images.device)


def test_a_size_that_the_processor_overrides_is_refused(tmp_path: Path) -> None:
    path = families.build("llava_onevision", tmp_path / "model")
    with pytest.raises(VugenError, match=r"vlm_size=84 does nothing here: .* makes 56 pixels of any picture"):
        load_vlm(str(path), recipe=Recipe(vlm_size=84)).encode(flat_images(1))


@pytest.mark.parametrize("of", ["tokenizer", "processor"])
def test_texts_begin_as_the_model_was_taught_where_the_template_leaves_it_to_the_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    words = families.tokenizer()
    start = words.bos_token
    words._tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A $B", special_tokens=[(start, words.bos_token_id)]
    )
    monkeypatch.setattr(families, "tokenizer", lambda: words)
    template = families.TEMPLATE.replace("{{ bos_token }}", "")
    monkeypatch.setattr(families, "TEMPLATE", template)
    path = families.build("llava_siglip", tmp_path / "model")
    if of == "processor":  # as files of some years ago have it
        (path / "chat_template.jinja").unlink()
        (path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    vlm = load_vlm(str(path))
    asked = [{"role": "user", "content": [{"type": "text", "text": "a bear"}]}]
    theirs = vlm.processor.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert vlm.prompts.tokens("a bear") == theirs["input_ids"][0]
    assert vlm.processor.tokenizer.decode(vlm.prompts.tokens("a bear")).startswith(f"{start} user: a bear")


def test_the_instruction_wraps_the_prompt_but_not_the_empty_one(llava: Path) -> None:
    plain, told = load_vlm(str(llava)), load_vlm(str(llava), recipe=Recipe(instruction="Draw {prompt}."))
    assert "Draw a bear." in told.prompts.text("a bear")
    assert told.prompts.text("") == plain.prompts.text("")
    with pytest.raises(VugenError, match="instruction"):
        load_recipe(None, ["instruction=Draw it"])


def test_a_mismatched_vlm_is_taken_only_when_asked_for(trained: Path, tmp_path: Path) -> None:
    from conftest import save_random_vlm

    other = save_random_vlm(tmp_path / "other", seed=1)
    with pytest.raises(VugenError, match="--allow-vlm-mismatch"):
        load_sampler(trained / "sampler.safetensors", str(other))
    assert load_sampler(trained / "sampler.safetensors", str(other), allow_vlm_mismatch=True).vlm.name


def test_tokens_listed_by_blocks_and_windows_come_back_row_by_row() -> None:
    # 4 x 6 tokens in blocks of 2 x 2: the first block holds 0 1 / 6 7, the next 2 3 / 8 9.
    listed = torch.tensor(
        [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, 12, 13, 18, 19, 14, 15, 20, 21, 16, 17, 22, 23]
    )
    assert listed[raster_index(4, 6, 2, None)].tolist() == list(range(24))
    # Windows of one block a side change nothing; windows of two blocks take the third block of a row later.
    assert listed[raster_index(4, 6, 2, 1)].tolist() == list(range(24))
    windows = listed.view(6, 4)[[0, 1, 3, 4, 2, 5]].flatten()
    assert windows[raster_index(4, 6, 2, 2)].tolist() == list(range(24))


def test_window_order_is_that_of_the_library() -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

    for height, width in ((10, 10), (8, 12), (4, 6)):
        grid = torch.tensor([[1, height, width]])
        units, _ = get_vision_window_index(grid, spatial_merge_size=2, window_size=28, patch_size=7)
        expected = torch.argsort(units)
        assert torch.equal(raster_index(height // 2, width // 2, 1, 2), expected)


def test_positions_follow_the_prompt_and_know_rows_and_columns() -> None:
    start = torch.tensor([5, 9])
    assert image_positions(start, 2, 3, sections=False)[1].tolist() == [9, 10, 11, 12, 13, 14]
    time, row, column = image_positions(start, 2, 3, sections=True)[:, 0].tolist()
    assert time == [5] * 6 and row == [5, 5, 5, 6, 6, 6] and column == [5, 6, 7, 5, 6, 7]


def test_chat_asks_the_vlm_of_a_sampler(trained: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (80, 60), "green").save(tmp_path / "a.png")
    alone = vugen_here(
        "chat",
        "a.png",
        "what is it?",
        "--tokens",
        4,
        "--vlm",
        read_card(trained / "sampler.safetensors").vlm.name,
        cwd=tmp_path,
    )
    beside = vugen_here(
        "chat",
        "a.png",
        "what is it?",
        "--tokens",
        4,
        "--sampler",
        trained / "sampler.safetensors",
        cwd=tmp_path,
    )
    assert alone.returncode == 0 and beside.stdout == alone.stdout
    assert vugen_here("chat", "none.png", cwd=tmp_path).stderr.startswith("error: no picture at none.png")
    long = vugen_here("chat", "a.png", "what " * 2000, cwd=tmp_path)
    assert long.returncode == 1 and "tokens is too long: the VLM reads 1,024" in long.stderr


def test_understanding_is_shown_to_be_preserved(trained: Path, tmp_path: Path) -> None:
    import json

    result = vugen_here("study", "understanding", "--sampler", trained / "sampler.safetensors", cwd=tmp_path)
    assert result.returncode == 0 and "preserved, bit for bit" in result.stdout
    (score,) = json.loads((tmp_path / "understanding.json").read_text())["scores"]
    assert score["preserved"] and score["logits_that_differ"] == 0 < score["logits_compared"]
    assert score["weights_before"] == score["weights_after"]


def test_understanding_of_no_pictures_is_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"no picture")
    command = ("study", "understanding", "--sampler", trained / "sampler.safetensors", "--images", "photos")
    result = vugen_here(*command, cwd=tmp_path)
    assert result.returncode == 1 and "photos holds no picture that can be read (a.png" in result.stderr


def test_a_changed_weight_changes_the_hash_and_the_logits(vlm_path: Path) -> None:
    from vugen_cli.studies.understanding import _understand

    before = load_vlm(str(vlm_path))
    after = load_vlm(str(vlm_path))
    with torch.no_grad():
        next(after.decoder.parameters()).view(-1)[:64] += 1
    images = [torch.zeros(3, 64, 64, dtype=torch.uint8)]
    assert weight_hash(before.model) != weight_hash(after.model)
    assert not torch.equal(_understand(before, images)[0][0], _understand(after, images)[0][0])


@pytest.mark.parametrize(("latents", "shape"), [("encoder", (1, 16, 16, 64)), ("projector", (1, 8, 8, 64))])
def test_a_tower_as_wide_as_the_language_model_is_read_before_or_after_its_merger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, latents: str, shape: tuple[int, ...]
) -> None:
    """Its table of positions, which is as wide too and is given numbers alone, is no projector."""

    def wide(words: Any) -> tuple[Any, Any]:
        config, processor = families.qwen3_vl(words)
        config.vision_config.hidden_size = 64
        return config, processor

    monkeypatch.setitem(families.FAMILIES, "wide", wide)
    vlm = load_vlm(str(families.build("wide", tmp_path)), "cpu", Recipe(latents=latents))
    assert vlm.encode(torch.zeros(1, 3, 128, 128, dtype=torch.uint8)).shape == shape
    check_grid(vlm, 128)
