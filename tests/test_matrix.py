"""Types of VLMs by kind of vision side: each works or is refused, as docs/vlms.json says."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import full_size
import matrix
import pytest
import tiny_vlms
import torch
from torch import Tensor

from vugen_cli.errors import VugenError
from vugen_cli.models.generation_expert import GenerationExpert
from vugen_cli.recipe import Layers, Recipe, load_recipe
from vugen_cli.vlm.frozen import load_vlm
from vugen_cli.vlm.latents import canvas, check_grid

FOUND = json.loads(matrix.RESULTS.read_text())
# One type for each way in which a vision side takes pictures and gives tokens, or is refused.
KINDS = {
    "a class token": "llava",
    "several views": "llava_next",
    "tiles in the batch": "llama4",
    "overlapping crops": "molmo2",
    "merged before the projector": "internvl",
    "packed, listed by blocks": "qwen3_vl",
    "packed, listed by windows": "qwen2_5_vl",
    "packed, blocks made by the model": "kimi_k25",
    "packed, a convolution over blocks": "glm4v",
    "packed, listed by rows": "paddleocr_vl",
    "packed in one row of pixels": "minicpmv4_6",
    "padded, with positions": "gemma4",
    "padded, with shapes": "lfm2_vl",
    "rows that end in an empty place": "inkling_mm_model",
    "a convolutional tower": "fast_vlm",
    "feature maps": "unlimited_ocr",
    "queries that read the grid": "blip-2",
    "projected one by one": "hunyuan_vl",
    "a projector in parts": "muse_glimmer",
    "soft tokens": "ovis2",
    "pixels under another name": "video_llava",
    "a tower to be run by itself": "instructblip",
    "masks of tiles": "granite_docling",
    "pictures beside the tokens": "git",
    "linear attention": "qwen3_5",
    "an encoder-decoder": "t5gemma2",
    "cross-attention": "mllama",
    "no vision encoder": "fuyu",
    "a processor of its own": "kosmos-2.5",
}


def noise(count: int, size: int = 64) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("model_type", KINDS.values(), ids=KINDS.keys())
def test_a_kind_of_vision_side_comes_to_what_the_page_says(model_type: str, tmp_path: Path) -> None:
    if model_type not in tiny_vlms.TYPES:
        pytest.skip(f"this transformers has no {model_type}")
    expected = {
        k: v for k, v in FOUND["types"][model_type].items() if k not in ("parameters", "expert", "gigabytes")
    }
    assert matrix.examine(model_type, tmp_path) == expected


def test_every_type_of_the_library_was_tried() -> None:
    import transformers

    if transformers.__version__ == FOUND["transformers"]:
        assert list(FOUND["types"]) == list(tiny_vlms.TYPES)
    results = [entry["result"] for entry in FOUND["types"].values()]
    assert sum(result.startswith("works") for result in results) >= 65
    for entry in FOUND["types"].values():
        assert "\n" not in entry.get("reason", "") and ("reason" in entry) == (entry["result"] != "works")
        assert "\n" not in entry.get("pictures", "") and ("pictures" in entry) == (
            entry["result"] != "refused"
        )
    assert sum(entry.get("pictures") == "works" for entry in FOUND["types"].values()) >= 65


def test_the_page_is_up_to_date() -> None:
    writer = runpy.run_path(str(matrix.RESULTS.with_name("write_vlms.py")))
    assert matrix.RESULTS.with_name("vlms.md").read_text() == writer["page"](FOUND)


@pytest.mark.parametrize("name", ["Qwen3-VL 2B", "SmolVLM 256M", "InternVL3 1B"])
def test_published_configs_have_the_published_size(name: str) -> None:
    model_type, config, _, published = full_size.SIZES[name]
    counted = full_size.count(tiny_vlms.CONFIG_MAPPING[model_type](**config))
    assert counted == {key: FOUND["sizes"][name][key] for key in ("parameters", "expert", "gigabytes")}
    for size, (*_, published) in full_size.SIZES.items():
        assert FOUND["sizes"][size]["parameters"] / 1e9 == pytest.approx(published, rel=0.02)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vlms.build("llava", tmp_path_factory.mktemp("llava") / "llava")


def test_a_scrambled_grid_is_refused_in_one_line(llava: Path) -> None:
    vlm = load_vlm(str(llava))
    check_grid(vlm, 64)
    order = torch.arange(64).view(4, 2, 4, 2).transpose(1, 2).flatten()  # blocks of 2 x 2, read as rows

    def scrambled(images: Tensor) -> Tensor:
        return vlm.encode(images).flatten(1, 2)[:, order].unflatten(1, (8, 8))

    with pytest.raises(VugenError, match=r"only \d+ move their own part"):
        check_grid(SimpleNamespace(name="it", encode=scrambled), 64)
    mixed = SimpleNamespace(name="it", encode=lambda images: vlm.encode(images) * len(images))
    with pytest.raises(VugenError, match="depends on the rest of its batch"):
        check_grid(mixed, 64)


def test_z_of_several_layers_is_their_sum_or_their_stack(llava: Path) -> None:
    images = noise(2)
    vlm = load_vlm(str(llava), recipe=Recipe(latents=Layers(layers="last 2")))
    pixels = vlm.vision_inputs(images)["pixel_values"]
    with torch.no_grad():
        hidden = vlm.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[1:]
    first, last = (state[:, 1:].unflatten(1, (8, 8)) for state in hidden)  # without the class token
    torch.testing.assert_close(vlm.encode(images), first + last)
    stacked = load_vlm(str(llava), recipe=Recipe(latents=Layers(layers=[-1, 0], how="stack")))
    torch.testing.assert_close(stacked.encode(images), torch.cat([last, first], -1))
    with pytest.raises(VugenError, match="has 2 layers"):
        load_vlm(str(llava), recipe=Recipe(latents=Layers(layers="last 3"))).encode(images)


def test_layers_are_set_on_the_command_line_and_mistakes_are_named() -> None:
    assert load_recipe(None, ["latents.layers=last 2"]).latents == Layers(layers="last 2")
    assert load_recipe(None, ["latents.layers=[0, -1]", "latents.how=stack"]).latents.how == "stack"
    for override, message in (
        ("latents.layer=2", "did you mean `latents.layers`"),
        ("latents.layers=four", "`latents.layers`"),
        ("latents=both", "`latents`: Input should be 'encoder' or 'projector'"),
    ):
        with pytest.raises(VugenError, match=message):
            load_recipe(None, [override])


def test_a_picture_that_would_be_padded_is_enlarged(tmp_path: Path) -> None:
    vlm = load_vlm(str(tiny_vlms.build("kimi_k25", tmp_path / "kimi")))
    processor = vlm.processor.image_processor
    assert canvas(processor, (60, 60)) == (64, 64) == canvas(processor, (64, 64))
    white = vlm.vision_inputs(torch.full((1, 3, 60, 60), 255, dtype=torch.uint8))["pixel_values"]
    assert (white == white[:1]).all()
    check_grid(vlm, 60)


@pytest.mark.parametrize("recipe", [Recipe(vlm_size=128), Recipe(latents="projector")])
@pytest.mark.parametrize("model_type", ["paddleocr_vl", "qwen2_5_vl"])
def test_patches_and_windows_stay_a_grid_at_another_size_and_after_the_projector(
    model_type: str, recipe: Recipe, tmp_path: Path
) -> None:
    vlm = load_vlm(str(tiny_vlms.build(model_type, tmp_path / "vlm")), recipe=recipe)
    for size in (64, 80):
        check_grid(vlm, size)


def test_an_expert_counts_rows_and_columns_where_its_config_leaves_the_sections_to_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_vlms, "add_sections", lambda *_: None)
    monkeypatch.setitem(tiny_vlms.BOTH, "head_dim", 128)
    vlm = load_vlm(str(tiny_vlms.build("qwen3_vl", tmp_path / "vlm")))
    assert "mrope_section" not in str(vlm.decoder.config.rope_parameters)
    assert GenerationExpert(vlm.decoder, 4, (4, 4)).mrope


def test_adaptive_norms_take_a_decoder_that_flattens_its_tokens(tmp_path: Path) -> None:
    vlm = load_vlm(str(tiny_vlms.build("blip-2", tmp_path / "vlm")))  # OPT's
    expert = GenerationExpert(vlm.decoder, 4, (4, 4), adaptive_norms=True)
    torch.nn.init.normal_(expert.modulation.weight)
    torch.nn.init.normal_(expert.proj_out.weight)
    prefix, noised, t = vlm.prefix(["a bear", "a cat"]), torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.7])
    together = expert(noised, t, prefix)
    alone = [expert(noised[i : i + 1], t[i : i + 1], prefix.rows(torch.tensor([i]))) for i in range(2)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)


def test_a_repository_with_code_of_its_own_is_refused_with_its_remedy(tmp_path: Path) -> None:
    config = {"model_type": "internvl_chat", "auto_map": {"AutoConfig": "configuration.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(VugenError, match=r"vugen runs none; take its conversion to transformers.*-hf"):
        load_vlm(str(tmp_path))
