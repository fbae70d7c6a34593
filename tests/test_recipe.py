"""Recipes: overrides, and errors that name the fix."""

from pathlib import Path

import pytest
from conftest import make_card

from vugen_cli.commands.options import on_vlm
from vugen_cli.errors import VugenError
from vugen_cli.recipe import Flow, Recipe, find_recipe, load_recipe, parse_recipe


@pytest.mark.parametrize("name", ["nano", "imagenet-256", "stockmix-256"])
def test_shipped_recipes_load(name: str) -> None:
    assert load_recipe(name).name == name


def test_overrides_reach_nested_values_and_read_numbers() -> None:
    recipe = load_recipe(
        None, ["train_sampler.lr=1e-4", "decoder.channels=[8, 16]", "decoder.heads=2", "data.flip=true"]
    )
    assert recipe.train_sampler.lr == 1e-4
    assert recipe.decoder.channels == [8, 16]
    assert recipe.data.flip is True


def test_a_recipe_survives_its_own_card() -> None:
    recipe = load_recipe("nano")
    assert parse_recipe(recipe.model_dump(mode="json"), "card") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.shard_vlm=true", "engine.shard_vlm is for shares of weights: set engine.strategy=fsdp"),
        ("train_sampler.prompt_dropout=0.95", "together leave no whole prompt"),
        (
            "train_sampler.learning_rat=1",
            r"unknown recipe key `train_sampler.learning_rat`; did you mean `train_sampler\.",
        ),
        ("redcer.channels=4", "did you mean `reducer`"),
        ("train_reducer.prompt_dropout=0.1", "did you mean `train_sampler.prompt_dropout`"),
        ("train_sampler.steps=-3", "train_sampler.steps"),
        ("sampling.solver=rk4", "sampling.solver"),
        ("sampling.guidance=.inf", "`sampling.guidance`: .* finite number"),
        ("train_sampler.clip=.nan", "`train_sampler.clip`: .* finite number"),
        ("sampling.guidance_interval=[0.6, 0.2]", "0 <= first < second <= 1"),
        ("decoder.heads=7", "decoder.heads must divide"),
        (
            "data.mixture=[{path: x, wieght: 2}]",
            "did you mean `data.mixture.0.weight`",
        ),
        ("decoder.channels=[]", "`decoder.channels`: .* at least 1"),
        ("decoder.channels=[12, 160]", "decoder.channels must be multiples of 8"),
        ("vae.widths=[]", "`vae.widths`: .* at least 1"),
        ("vae.widths=[8, 12]", "`vae.widths.1`: .* multiple of 8"),
        ("train_vae.betas=[0.9, 1]", "`train_vae.betas.1`: .* less than 1"),
        ("steps", "expected key=value"),
        ("seed.x=1", "seed is a value, not a section"),
        ("caption.instructions=[what is it?]", "the value is not YAML; put text in quotes"),
        ("train-sampler.steps=5", "unknown recipe key `train-sampler`; did you mean `train_sampler`"),
        ("Seed=1", "unknown recipe key `Seed`; did you mean `seed`"),
        ("data.Flip=1", "unknown recipe key `data.Flip`; did you mean `data.flip`"),
        ("expert.reference=Only", "recipe key `expert.reference`: "),
        ("name=2026-13-01", "the value is not YAML; put text in quotes"),
        ("name=!!int foo", "the value is not YAML; put text in quotes"),
        ("log=" + "[" * 3000, "the value is not YAML; put text in quotes"),
    ],
)
def test_a_wrong_override_is_explained(override: str, message: str) -> None:
    with pytest.raises(VugenError, match=message):
        load_recipe(None, [override])


@pytest.mark.parametrize(
    "override",
    ["train_sampler.steps=yes", "sampling.guidance=off", "vlm_size=true", "train_vlm.lr=on", "seed=no"],
)
def test_truth_is_no_number(override: str) -> None:
    with pytest.raises(VugenError, match="yes, no, on, off, true and false are no numbers"):
        load_recipe(None, [override])


def test_where_truth_is_asked_for_yaml_words_do() -> None:
    recipe = load_recipe(None, ["data.flip=yes", "expert.reference=on", "engine.compile=off"])
    assert (recipe.data.flip, recipe.expert.reference, recipe.engine.compile) == (True, True, False)


@pytest.mark.parametrize("order", [0, 1])
def test_sizes_of_other_overrides_stay_beside_a_preset_in_any_order(order: int) -> None:
    overrides = ["decoder.heads=8", "decoder.preset=B"]
    decoder = load_recipe(None, overrides[:: -1 if order else 1]).decoder
    assert decoder.heads == 8 and decoder.channels == load_recipe(None, ["decoder.preset=B"]).decoder.channels


def test_an_empty_name_is_not_taken_for_nano() -> None:
    with pytest.raises(VugenError, match="no recipe at"):
        load_recipe("")
    with pytest.raises(VugenError, match="--vlm is empty"):
        on_vlm(" ", Recipe())


def test_a_key_that_a_file_says_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("train_sampler: {steps: 5, lr: 0.5}\nseed: 1\ntrain_sampler: {batch_size: 6}\n")
    with pytest.raises(VugenError, match=r"twice.yaml is not valid YAML: the key 'train_sampler' .* line 3"):
        load_recipe(file)
    file.write_text("train_vae: &a {steps: 5}\ntrain_vlm: &b {<<: *a, steps: 6}\ntrain_sampler: {<<: *b}\n")
    assert load_recipe(file).train_sampler.steps == 6, "what is brought in may be said otherwise"
    for wrong in ("seed: {{ seed }}", "? [1, 2]\n: 3", "seed: 2020-13-45", "[" * 3000):
        file.write_text(wrong)
        with pytest.raises(VugenError, match="twice.yaml"):
            load_recipe(file)


def test_an_override_of_one_of_two_sections_that_share_an_anchor_leaves_the_other(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("train_vae: &t {steps: 7}\ntrain_reducer: *t\n")
    recipe = load_recipe(file, ["train_reducer.steps=9"])
    assert (recipe.train_vae.steps, recipe.train_reducer.steps) == (7, 9)


def test_what_an_override_said_is_not_blamed_on_the_file() -> None:
    with pytest.raises(VugenError, match=r"^--set train_sampler.lr=abc: recipe key"):
        load_recipe("nano", ["seed=1", "train_sampler.lr=abc"])
    with pytest.raises(VugenError, match=r"^--set foo=1: unknown recipe key `foo`"):
        load_recipe("nano", ["foo=1"])
    with pytest.raises(VugenError, match=r"^--set decoder={foo: 1}: unknown recipe key `decoder.foo`"):
        load_recipe("nano", ["decoder={foo: 1}"])


def test_files_that_are_not_recipes_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,")
    with pytest.raises(VugenError, match="not valid YAML"):
        load_recipe(broken)
    broken.write_text("- 1\n- 2\n")
    with pytest.raises(VugenError, match="not a recipe"):
        load_recipe(broken)
    with pytest.raises(VugenError, match="shipped recipes .*nano"):
        find_recipe(tmp_path / "none.yaml")


def test_every_recipe_value_is_described_or_plain() -> None:
    schema = Recipe.model_json_schema()
    assert {"vlm", "reducer", "decoder", "expert", "flow", "sampling"} <= set(schema["properties"])


def test_the_automatic_shift_grows_with_the_numbers_of_the_latents() -> None:
    flow = Flow(shift="auto")
    assert flow.shift_of((32, 32), 64) == 4.0 and flow.shift_of((16, 16), 64) == 2.0
    assert flow.shift_of((8, 8), 24) == 1.0, "never towards the data"
    assert Flow(shift=3.0).shift_of((32, 32), 64) == 3.0
    assert {load_recipe(name).flow.shift for name in ("imagenet-256", "stockmix-256")} == {"auto"}
    with pytest.raises(VugenError, match=r"flow\.shift"):
        load_recipe(None, ["flow.shift=0"])


def test_an_old_card_may_hold_keys_that_had_no_effect() -> None:
    stages = ("train_vlm", "train_vae", "train_reducer", "train_sampler")
    old = {stage: {"steps": 3, "prompt_dropout": 0.2} for stage in stages}
    recipe = parse_recipe(make_card(recipe=old).recipe, "card")
    assert recipe.train_sampler.prompt_dropout == 0.2 and recipe.train_reducer.steps == 3
    assert old["train_vae"] == {"steps": 3, "prompt_dropout": 0.2}
