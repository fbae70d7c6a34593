"""What a plan says beside what the real networks are and do; and that it allocates none of them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
import transformers
from conftest import tiny_overrides
from pydantic import TypeAdapter
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from vugen_cli.app import app
from vugen_cli.card import LatentsCard
from vugen_cli.errors import VugenError
from vugen_cli.flow import draw_times, flow_matching_loss
from vugen_cli.models.autoencoder import Autoencoder
from vugen_cli.recipe import RECIPES, Recipe, load_recipe, parse_recipe
from vugen_cli.sampling.sampler import for_vlm, read_prompts
from vugen_cli.sampling.trained import load_sampler, new_expert
from vugen_cli.stages.losses import reducer_loss
from vugen_cli.studies.fake_networks import FakeNetworks
from vugen_cli.studies.fake_step import MODE, FakeTensor, cost, flops_of
from vugen_cli.studies.plan import (
    GPUS,
    RESERVED,
    Machine,
    Plan,
    as_lines,
    call_times,
    data_of,
    latent_bytes,
    make_plan,
)
from vugen_cli.vlm.configured import configured_vlm
from vugen_cli.vlm.frozen import FrozenVLM, load_vlm
from vugen_cli.vlm.prompts import Prompt

IMAGES, TOKENS, SIZE = 4, 24, 64
H100 = Machine("h100", 1, 1, 0.35)


class Real:
    """The networks of a recipe with weights, on the CPU, and steps of both stages."""

    def __init__(self, recipe: Recipe, vlm: FrozenVLM):
        self.recipe, self.vlm, self.generator = recipe, vlm, torch.Generator()
        _, height, width, d = vlm.encode(images(1)).shape
        self.autoencoder = Autoencoder(recipe, d)
        channels = self.autoencoder.reducer.channels
        self.expert = new_expert(
            vlm, LatentsCard(channels=channels, grid=(height, width), width=d), recipe.expert
        )
        self.expert.decoder.set_attn_implementation("eager")  # which torch's counter sees on a CPU

    def reducer(self, count: int) -> Tensor:
        z = self.autoencoder.z(self.vlm, images(count))
        return reducer_loss(self.autoencoder, z, images(count), self.recipe, self.generator, {})[0]

    def sampler(self, count: int, prompt: list[int] | Prompt = [0] * TOKENS) -> Tensor:
        prefix = read_prompts(self.vlm, self.expert, self.autoencoder.eval(), [prompt] * count)
        with torch.no_grad():
            target = self.autoencoder.eval().encode(self.vlm, images(count))
        t = draw_times(count, "uniform", 1.0, self.generator)
        return flow_matching_loss(lambda x, t: self.expert(x, t, prefix), target, t, self.generator)


def images(count: int) -> Tensor:
    return torch.zeros(count, 3, SIZE, SIZE, dtype=torch.uint8)


@pytest.fixture(scope="module")
def recipe(vlm_path: Path) -> Recipe:
    return load_recipe(None, tiny_overrides(vlm_path))


@pytest.fixture(scope="module")
def real(recipe: Recipe, vlm_path: Path) -> Real:
    vlm = load_vlm(str(vlm_path))
    vlm.model.set_attn_implementation("eager")
    return Real(recipe, vlm)


@pytest.fixture(scope="module")
def fake(recipe: Recipe) -> FakeNetworks:
    return FakeNetworks(recipe, SIZE, TOKENS)


def test_parameters_of_the_bundled_line_are_exact() -> None:
    sampler = load_sampler()
    fake = FakeNetworks(parse_recipe(sampler.card.recipe, "its card"), SIZE, TOKENS)
    parts = [
        (sampler.vlm.model, fake.vlm.model),
        (sampler.vlm.decoder, fake.vlm.decoder),
        (sampler.autoencoder.reducer, fake.autoencoder.reducer),
        (sampler.autoencoder.decoder, fake.autoencoder.decoder),
        (sampler.expert, fake.expert),
    ]
    for built, planned in parts:
        shapes = [tuple(p.shape) for p in built.parameters()]
        assert shapes == [tuple(p.shape) for p in planned.parameters()]
    assert fake.latents == [*sampler.card.latents.grid, sampler.card.latents.channels]


def test_no_network_has_memory(fake: FakeNetworks) -> None:
    for network in (fake.vlm.model, fake.autoencoder, fake.expert):
        assert all(isinstance(tensor, FakeTensor) for tensor in network.state_dict(keep_vars=True).values())


def test_a_model_of_a_trillion_weights_is_planned_from_its_config_file(tmp_path: Path) -> None:
    words = families.tokenizer()
    config = transformers.LlavaConfig(
        vision_config=families.siglip(),
        text_config=families.text_config(
            "LlamaConfig", words, hidden_size=2**17, intermediate_size=2**20, num_attention_heads=1024
        ),
        image_token_id=families.image_id(words),
    )
    file = tmp_path / "huge.json"
    file.write_text(config.to_json_string())
    model = configured_vlm(str(file), Recipe()).model
    assert sum(p.numel() for p in model.parameters()) > 8e11
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("stage", ["reducer", "sampler"])
def test_flops_are_those_of_torchs_counter_on_a_real_step(stage: str, real: Real, fake: FakeNetworks) -> None:
    with FlopCounterMode(display=False) as counter:
        getattr(real, stage)(IMAGES).backward()
    planned = getattr(fake, f"{stage}_cost")()
    assert planned.flops == pytest.approx(counter.get_total_flops() / IMAGES, rel=0.05)


@pytest.mark.parametrize("stage", ["reducer", "sampler"])
def test_memory_of_a_step_is_what_the_allocator_gave(
    stage: str, real: Real, recipe: Recipe, tmp_path: Path
) -> None:
    network = real.autoencoder.train() if stage == "reducer" else real.expert.train()
    real.vlm.model.set_attn_implementation("sdpa")  # as the loop has it on a CPU
    network.zero_grad(set_to_none=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        getattr(real, stage)(IMAGES).backward()
    real.vlm.model.set_attn_implementation("eager")
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    peak = held = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    planned = getattr(FakeNetworks(recipe, SIZE, TOKENS, gpu=False), f"{stage}_cost")()
    assert planned.peak(IMAGES, gradients=True) == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("reference", [True, "only"])
def test_pictures_of_edits_are_counted_as_a_real_step_reads_them(
    reference: bool | str, recipe: Recipe, real: Real
) -> None:
    mine = recipe.model_copy(update={"expert": recipe.expert.model_copy(update={"reference": reference})})
    step = Real(mine, real.vlm)
    edit = Prompt("put it in the snow", tuple(images(2)))
    text = step.vlm.prompt_length(for_vlm(edit, step.expert))
    fake = FakeNetworks(mine, SIZE, TOKENS)
    fake.prompt_tokens = text - (0 if reference == "only" else 2 * fake.picture_tokens)
    step.vlm.prefix([edit] * 2)  # tries out once whether a batch is read together
    with FlopCounterMode(display=False) as counter:
        read_prompts(step.vlm, step.expert, step.autoencoder, [edit] * IMAGES)
    read = flops_of(lambda count: fake.prefix(count, 2))
    assert read == pytest.approx(counter.get_total_flops() / IMAGES, rel=0.02)
    with FlopCounterMode(display=False) as counter:
        step.sampler(IMAGES, edit).backward()
    planned = fake.sampler_cost(2)  # fused attention computes some of it again going back
    assert planned.flops == pytest.approx(counter.get_total_flops() / IMAGES, rel=0.1)
    assert planned.flops > 1.2 * fake.sampler_cost().flops


def test_a_mixture_with_edits_is_planned_with_their_pictures(
    scenes: Path, edits: Path, recipe: Recipe
) -> None:
    mixture = [{"path": str(scenes), "weight": 1.0}, {"path": str(edits), "weight": 3.0}]
    plan = make_plan(Recipe.model_validate(recipe.model_dump() | {"data": {"mixture": mixture}}), H100)
    fake = FakeNetworks(recipe, SIZE, recipe.prompt_tokens)
    (planned,) = (stage for stage in plan.stages if stage.name == "train-sampler")
    texts, edited = fake.sampler_cost(), fake.sampler_cost(1)
    assert planned.flops == pytest.approx(texts.flops / 4 + 3 * edited.flops / 4)
    held = planned.memory["ddp"]
    assert held.activations + held.gradients == pytest.approx(edited.peak(planned.micro_batch, True))
    assert (plan.sources, plan.picture_tokens) == (1, 64)
    assert any("75% of the samples are edits, taken to have 1 source pictures of 64" in n for n in plan.notes)


def test_the_largest_batch_fits_and_one_more_does_not(fake: FakeNetworks) -> None:
    step = fake.sampler_cost()
    room = 50e6
    most = step.most_images(room, gradients=True)
    assert step.peak(most, True) <= room < step.peak(most + 1, True)
    assert step.most_images(1e3, gradients=True) == 0


def test_autocasts_copies_of_weights_are_known_apart(vlm_path: Path) -> None:
    half = load_recipe(None, [*tiny_overrides(vlm_path), "train_sampler.precision=bfloat16"])
    networks = FakeNetworks(half, SIZE, TOKENS)
    step = networks.sampler_cost()
    linear = [m for m in networks.expert.modules() if isinstance(m, torch.nn.Linear)]
    converted = 2 * sum(p.numel() for layer in linear for p in layer.parameters())
    assert step.casts.max() == pytest.approx(converted, rel=0.05)
    assert step.peak(1, False, casts=False) < step.peak(1, False)


def test_work_that_depends_on_values_is_refused_in_one_line() -> None:
    def step(count: int) -> Any:
        with MODE:
            tensor = torch.zeros(count)
        return tensor + float(tensor.sum())

    with pytest.raises(VugenError, match="cannot be planned"):
        cost(step)


@pytest.mark.parametrize("family", ["llava_clip", "qwen2_5_vl", "smolvlm"])
def test_z_of_a_family_has_its_shape_without_weights(family: str, tmp_path: Path) -> None:
    path = families.build(family, tmp_path / family)
    real = load_vlm(str(path))
    want = real.encode(images(1)).shape[1:]
    weights = sum(p.numel() for p in real.model.parameters())
    for file in [*path.glob("*.safetensors"), *path.glob("tokenizer*")]:
        file.unlink()
    fake = FakeNetworks(Recipe(vlm=str(path)), SIZE, TOKENS)
    assert fake.z == list(want)
    assert sum(p.numel() for p in fake.vlm.model.parameters()) == weights
    for file in path.glob("*processor*"):
        file.unlink()
    assert FakeNetworks(Recipe(vlm=str(path)), SIZE, TOKENS).z == list(want)  # as its family usually has it


def test_times_follow_from_flops_and_memory_from_shares(recipe: Recipe) -> None:
    one, many = make_plan(recipe, H100), make_plan(recipe, Machine("h100", 16, 2, 0.35), images=1000)
    assert json.loads(json.dumps(many.disk))["latents"] == 1000 * latent_bytes([8, 8, 4], False)
    for alone, shared in zip(one.stages, many.stages, strict=True):
        assert alone.flops == shared.flops
        assert alone.images_per_s == pytest.approx(GPUS["h100"][1] * 0.35 / alone.flops)
        assert alone.days * 86400 == pytest.approx(4 * 4 / alone.images_per_s)
        assert shared.days == pytest.approx(alone.days / 16)
        assert shared.gpu_hours == pytest.approx(alone.gpu_hours)
    memory = next(stage for stage in many.stages if stage.name == "train-sampler").memory
    assert memory["fsdp"].optimiser == memory["hsdp"].optimiser / 2 == memory["ddp"].optimiser / 16
    assert "cannot be shared out evenly over 16 GPUs: take a multiple of 16" in many.problems[0]
    assert many.stages[-1].name == "train-sampler, from latents"
    assert many.stages[-1].flops < many.stages[-2].flops
    assert any(line.startswith("Will not work: train_reducer.batch_size=4") for line in as_lines(many))


def test_what_is_too_large_is_said_with_a_mend(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make_plan(recipe, H100).stages[0].memory["ddp"]
    fixed = memory.total - memory.activations
    for room, said in ((0.5 * fixed, "not even one fits"), (fixed + 0.6 * memory.activations, "accumulate=")):
        monkeypatch.setitem(GPUS, "small", ((RESERVED + room) / 1e9, 1e12))
        problems = make_plan(recipe, Machine("small", 1, 1, 0.35)).problems
        assert any(said in problem and "train-reducer" in problem for problem in problems), problems


def test_a_mesh_says_how_many_share_weights_and_muon_takes_no_shares(vlm_path: Path) -> None:
    settings = [*tiny_overrides(vlm_path), "engine.strategy=fsdp", "train_sampler.optimizer=muon"]
    sixteen = Machine("h100", 16, 2, 0.35)

    plan = make_plan(load_recipe(None, [*settings, "engine.mesh=[4,4]"]), sixteen)
    memory = next(stage for stage in plan.stages if stage.name == "train-sampler").memory
    assert memory["hsdp"].weights == 4 * memory["fsdp"].weights
    assert any("train_sampler.optimizer=muon orthogonalises" in problem for problem in plan.problems)
    assert not any("mesh" in problem for problem in plan.problems)
    alone = make_plan(load_recipe(None, [*settings, "engine.mesh=[3,4]"]), H100).problems
    assert any("is for 12 GPUs, not 1" in problem and "[1,1]" in problem for problem in alone)
    assert not any("muon" in problem for problem in alone), "one GPU shares nothing"


def test_an_image_size_that_the_decoder_cannot_take_is_a_problem(vlm_path: Path) -> None:
    plan = make_plan(load_recipe(None, [*tiny_overrides(vlm_path), "decoder.image_size=100"]), H100)
    assert plan.problems[0] == ("images of 100 px: the decoder needs a multiple of 8; planned at 96 px")


def test_every_way_through_a_recipe_has_its_stages(vlm_path: Path) -> None:
    ways = {
        "decoder.kind=ldm": ["train-vae", "train-reducer", "train-sampler", "train-sampler, from latents"],
        "reducer.kind=vae": ["train-vae", "train-sampler", "train-sampler, from latents"],
    }
    for way, stages in ways.items():
        small = ["decoder.vae=vae", "vae.widths=[8,16,16]", "decoder.channels=[16,32]", way]
        plan = make_plan(load_recipe(None, [*tiny_overrides(vlm_path), *small]), H100)
        assert [stage.name for stage in plan.stages] == stages


def test_a_decoder_that_ends_in_a_vae_calls_it_once_a_picture(vlm_path: Path) -> None:
    small = ["decoder.kind=ldm", "decoder.vae=vae", "vae.widths=[8,16,16]", "decoder.channels=[16,32]"]
    flops = [
        FakeNetworks(
            load_recipe(None, [*tiny_overrides(vlm_path), *small, f"decoder.steps={steps}"]), SIZE, TOKENS
        ).decode_flops()
        for steps in (1, 2, 5)
    ]
    step = flops[1] - flops[0]
    assert flops[2] == pytest.approx(flops[0] + 4 * step) and flops[0] > 1.5 * step


def test_losses_on_pictures_and_alignment_cost_something(recipe: Recipe, vlm_path: Path) -> None:
    losses = [f"decoder.losses.{name}=0.1" for name in ("perceptual", "lpips", "repa")]
    rich = FakeNetworks(load_recipe(None, [*tiny_overrides(vlm_path), *losses]), SIZE, TOKENS)
    plain = FakeNetworks(recipe, SIZE, TOKENS)
    # VGG16's convolutions of a 224 px image are 15.3 G products (torchvision); two
    # images go forward, and gradients for both come back.
    vgg = 2 * 15.3e9 * (SIZE / 224) ** 2
    assert rich.reducer_cost().flops - plain.reducer_cost().flops == pytest.approx(4 * vgg, rel=0.1)


def test_losses_on_a_vaes_pictures_cost_something(vlm_path: Path) -> None:
    small = [*tiny_overrides(vlm_path), "reducer.kind=vae", "decoder.vae=vae", "vae.widths=[8,16,16]"]
    plain, rich = (
        make_plan(load_recipe(None, [*small, *losses]), H100).stages[0]
        for losses in ([], ["vae.losses.lpips=0.1", "vae.losses.perceptual=0.1"])
    )
    vgg = 2 * 15.3e9 * (SIZE / 224) ** 2
    assert plain.name == "train-vae" and rich.flops - plain.flops > 4 * vgg


def test_telling_z_costs_the_expert_a_head_and_no_run_from_latents_is_planned(
    recipe: Recipe, vlm_path: Path
) -> None:
    taught = load_recipe(None, [*tiny_overrides(vlm_path), "train_sampler.repa=0.5"])
    networks, plain = FakeNetworks(taught, SIZE, TOKENS), FakeNetworks(recipe, SIZE, TOKENS)
    width, z = networks.expert.width, networks.z
    head = 6 * z[0] * z[1] * (width * 2 * width + 2 * width * 2 * width + 2 * width * z[2])
    more = networks.sampler_cost().flops - plain.sampler_cost().flops
    assert more == pytest.approx(head, rel=0.01)
    assert networks.velocity_flops() == plain.velocity_flops()
    assert [stage.name for stage in make_plan(taught, H100).stages] == ["train-reducer", "train-sampler"]


def test_a_mixture_that_is_here_says_how_many_images(scenes: Path, recipe: Recipe) -> None:
    mixed = recipe.model_copy(deep=True)
    mixed.data.mixture = [{"path": str(scenes), "weight": 1.0}]  # type: ignore[list-item]
    mixed = Recipe.model_validate(mixed.model_dump())
    known = data_of(mixed)
    assert (known.size, known.images, known.sources) == (64, 96, 0)
    assert known.bytes == pytest.approx(sum(f.stat().st_size for f in scenes.glob("train-*.tar")) / 96)


def test_a_mixture_of_held_out_images_alone_is_refused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "vugen_cli.studies.plan.read_manifest", lambda _: SimpleNamespace(splits={"val": None})
    )
    mixed = Recipe.model_validate(recipe.model_dump() | {"data": {"mixture": [{"path": str(tmp_path)}]}})
    with pytest.raises(VugenError, match="has no train split: prepare it, or leave it out"):
        data_of(mixed)


def test_call_times_are_those_of_the_solver() -> None:
    assert call_times(2, "euler") == [0, 0.5]
    assert call_times(2, "heun") == [0, 0.5, 0.5]
    assert call_times(1, "midpoint", 2.0) == [0, 0.5]


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_shipped_recipe_can_be_planned(name: str) -> None:
    result = CliRunner().invoke(app, ["plan", name, "--gpus", "8", "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert TypeAdapter(Plan).dump_python(TypeAdapter(Plan).validate_python(plan), mode="json") == plan
    assert plan["problems"] == [] and plan["machine"]["gpus"] == 8
    assert {stage["name"] for stage in plan["stages"]} >= {"train-reducer", "train-sampler"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "k80"], "--gpu k80: known are b200"),
        (["--gpus", "9", "--nodes", "2"], "9 GPUs cannot be shared out evenly over 2 nodes"),
        (["--vlm", "./none"], "no VLM at none"),
        (["--vlm", "owner/name"], "the hub cannot be reached"),
        (["--vlm", "{folder}"], "has no config.json"),
        (["--vlm", "{folder}/bad.json"], "is not the config of a vision-language model"),
        (["none.yaml"], "no recipe at none.yaml"),
        (["--set", "decoder.vae=owner/name", "--set", "decoder.kind=ldm"], "decoder.vae: owner/name"),
    ],
)
def test_bad_input_is_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"model_type": "llama"}')
    result = CliRunner().invoke(app, ["plan", *(o.format(folder=tmp_path) for o in options)])
    assert isinstance(result.exception, VugenError)
    assert message in str(result.exception) and "\n" not in str(result.exception)
