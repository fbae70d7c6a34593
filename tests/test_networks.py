"""Reducer, pixel decoder and generation expert: shapes, invariances, gradients."""

import copy

import pytest
import torch
from torch import nn

from vugen_cli.card import LatentsCard
from vugen_cli.errors import VugenError
from vugen_cli.models.embeddings import grid_positions, sinusoid
from vugen_cli.models.generation_expert import GenerationExpert, PrefixCache
from vugen_cli.models.pixel_decoder import PixelDecoder, relative_position_bias, to_pixels, to_uint8
from vugen_cli.models.reducer import Reducer
from vugen_cli.recipe import Decoder as DecoderRecipe
from vugen_cli.recipe import Expert
from vugen_cli.recipe import Reducer as ReducerRecipe
from vugen_cli.sampling.trained import new_expert, try_expert
from vugen_cli.vlm.frozen import FrozenVLM

SMALL = DecoderRecipe(channels=[8, 16], heads=2, middle_layers=2)


def wake(module: nn.Module) -> nn.Module:
    """Give the layers that start at zero random weights, so that everything has an effect."""
    torch.manual_seed(5)
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return module.eval()


@pytest.fixture(scope="module")
def decoder() -> PixelDecoder:
    torch.manual_seed(0)
    return wake(PixelDecoder(SMALL, 4))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def expert(vlm: FrozenVLM) -> GenerationExpert:
    torch.manual_seed(0)
    return wake(GenerationExpert(vlm.decoder, 4, (8, 8)))  # type: ignore[return-value]


# --- reducer ---


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_reduced_latents_have_unit_statistics_once_fitted(kind: str) -> None:
    torch.manual_seed(0)
    reducer = Reducer(ReducerRecipe(kind=kind, channels=4), 32)  # type: ignore[arg-type]
    z = 3 + 2 * torch.randn(50, 8, 8, 32)
    reducer.fit_statistics(z.split(7))
    latents = reducer.eval()(z)
    assert latents.shape == (50, 8, 8, 4)
    assert torch.allclose(latents.mean((0, 1, 2)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(latents.std((0, 1, 2)), torch.ones(4), atol=1e-3)


def test_statistics_do_not_depend_on_how_the_images_are_batched() -> None:
    torch.manual_seed(0)
    reducer = Reducer(ReducerRecipe(channels=4), 32)
    z = 100 + torch.randn(60, 2, 2, 32)
    found = []
    for size in (1, 13, 60):
        reducer.fit_statistics(z.split(size))
        found.append(torch.cat([reducer.mean, reducer.std]))
    assert torch.allclose(found[0], found[1], rtol=1e-6) and torch.allclose(found[0], found[2], rtol=1e-6)


def test_the_scale_of_the_reducer_does_not_matter_in_training() -> None:
    torch.manual_seed(0)
    reducer = Reducer(ReducerRecipe(channels=4), 32)
    z = torch.randn(9, 4, 4, 32)
    before = reducer(z)
    with torch.no_grad():
        reducer.net.weight.mul_(10)
        reducer.net.bias.mul_(10)
    assert torch.allclose(before, reducer(z), atol=1e-4)


# --- pixel decoder ---


@pytest.mark.parametrize(("size", "grid"), [(64, 8), (32, 8), (96, 12), (64, 5)])
def test_the_decoder_makes_any_size_from_any_grid(decoder: PixelDecoder, size: int, grid: int) -> None:
    noised = torch.randn(2, 3, size, size)
    assert decoder(noised, torch.rand(2), torch.randn(2, grid, grid, 4)).shape == noised.shape


def test_decoding_is_invariant_to_the_batch_and_repeatable(decoder: PixelDecoder) -> None:
    noise, latents = torch.randn(5, 3, 32, 32), torch.randn(5, 4, 4, 4)
    together = decoder.decode(latents, noise, steps=3)
    alone = torch.cat(
        [decoder.decode(a[None], b[None], steps=3) for a, b in zip(latents, noise, strict=True)]
    )
    assert (together.int() - alone.int()).abs().max() <= 1
    assert torch.equal(together, decoder.decode(latents, noise, steps=3))


def test_gradients_reach_every_weight_of_decoder_and_reducer(decoder: PixelDecoder) -> None:
    reducer = Reducer(ReducerRecipe(channels=4), 16)
    latents = reducer(torch.randn(3, 8, 8, 16))
    decoder(torch.randn(3, 3, 64, 64), torch.rand(3), latents).square().mean().backward()
    for module in (reducer, decoder):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), name
    decoder.zero_grad()


def test_a_latent_changes_the_picture_most_where_it_lies() -> None:
    torch.manual_seed(0)
    decoder = wake(PixelDecoder(SMALL.model_copy(update={"middle_layers": 0}), 4))
    latents = torch.randn(1, 8, 8, 4)
    moved = latents.clone()
    moved[0, 1, 6] += 3
    noise = torch.randn(1, 3, 64, 64)
    change = (
        (decoder(noise, torch.ones(1) / 2, moved) - decoder(noise, torch.ones(1) / 2, latents))
        .abs()
        .mean(1)[0]
    )
    cells = change.unflatten(0, (8, 8)).unflatten(-1, (8, 8)).mean((1, 3))
    near = cells[0:3, 5:8].mean()
    assert near > 2 * (cells.sum() - 9 * near) / (64 - 9)


def test_relative_positions_look_no_further_than_the_window(decoder: PixelDecoder) -> None:
    table = decoder.mid[0].relative_position_bias_table
    bias = relative_position_bias(table, 1, 20)[0, 0]  # type: ignore[arg-type]
    assert torch.isfinite(bias[0, :9]).all() and torch.isinf(bias[0, 9:]).all()
    assert torch.equal(bias[3, 5], bias[10, 12])


def test_pixels_survive_the_round_trip() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[None, :, :, None]
    assert torch.equal(to_uint8(to_pixels(images)), images)
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


# --- generation expert ---


def test_image_tokens_see_the_prompt_and_each_other_both_ways(
    expert: GenerationExpert, vlm: FrozenVLM
) -> None:
    x, t = torch.randn(1, 8, 8, 4), torch.full((1,), 0.5)
    prefix = vlm.prefix(["a bear in a forest"])
    base = expert(x, t, prefix)
    for place, other in (((0, 0), (7, 7)), ((7, 7), (0, 0))):
        moved = x.clone()
        moved[0, *place] += 1
        assert (expert(moved, t, prefix) - base)[0, *other].abs().max() > 1e-6
    assert (expert(x, t, vlm.prefix(["a cat on a beach"])) - base).abs().max() > 1e-6
    assert (expert(x, t + 0.3, prefix) - base).abs().max() > 1e-6


def test_velocities_do_not_depend_on_padding_or_company(expert: GenerationExpert, vlm: FrozenVLM) -> None:
    prompts = ["a bear", "two apples to the left of a red car in a city at night", ""]
    x, t = torch.randn(3, 8, 8, 4), torch.tensor([0.1, 0.5, 0.9])
    together = expert(x, t, vlm.prefix(prompts))
    wide = expert(x, t, vlm.prefix(prompts, 64))
    assert torch.isfinite(together).all()
    assert torch.allclose(together, wide, atol=1e-5)
    for i, prompt in enumerate(prompts):
        assert torch.allclose(
            together[i], expert(x[i : i + 1], t[i : i + 1], vlm.prefix([prompt]))[0], atol=1e-5
        )


def test_the_prefix_is_read_and_never_written(expert: GenerationExpert, vlm: FrozenVLM) -> None:
    prefix = vlm.prefix(["a bear in a forest"])
    before = [k.clone() for k in prefix.keys]
    x, t = torch.randn(1, 8, 8, 4), torch.rand(1)
    assert torch.equal(expert(x, t, prefix), expert(x, t, prefix))
    assert all(torch.equal(a, b) for a, b in zip(before, prefix.keys, strict=True))
    assert PrefixCache(prefix).get_seq_length() == prefix.mask.shape[1]


def test_the_cached_prompt_gives_what_one_joint_sequence_gives(vlm: FrozenVLM) -> None:
    """With the VLM's own weights, prompt and image tokens in one pass must match prefix plus expert."""
    torch.manual_seed(0)
    expert = GenerationExpert(vlm.decoder, 4, (8, 8)).eval()
    prompt = "a bear in a forest"
    ids = vlm.processor.tokenizer(vlm.prompts.text(prompt), add_special_tokens=False, return_tensors="pt")[
        "input_ids"
    ]
    x, t = torch.randn(1, 8, 8, 4), torch.full((1,), 0.4)
    tokens = expert.proj_in(x.flatten(1, 2)) + expert.pos_embed + expert.time_embed(t)[:, None]
    text, image = ids.shape[1], tokens.shape[1]
    mask = torch.zeros(text + image, text + image)
    mask[:text].masked_fill_(torch.ones(text, text + image).triu(1).bool(), torch.finfo(torch.float32).min)
    joint = vlm.decoder(
        inputs_embeds=torch.cat([vlm.decoder.embed_tokens(ids), tokens], 1),
        attention_mask=mask[None, None],
        use_cache=False,
    ).last_hidden_state[:, text:]
    caught = []
    hook = expert.proj_out.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    expert(x, t, vlm.prefix([prompt]))
    hook.remove()
    assert torch.allclose(joint, caught[0], atol=1e-5)


def test_the_expert_is_a_copy_and_leaves_the_vlm_alone(vlm: FrozenVLM) -> None:
    expert = GenerationExpert(vlm.decoder, 4, (8, 8))
    copied = dict(expert.decoder.named_parameters())
    for name, parameter in vlm.decoder.named_parameters():
        if "embed_tokens" not in name:
            assert torch.equal(copied[name], parameter) and copied[name].data_ptr() != parameter.data_ptr()
            assert copied[name].requires_grad and not parameter.requires_grad
    assert not any("embed_tokens" in name for name in copied)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.int32])
def test_codes_of_quantised_weights_are_no_start_for_an_expert(vlm: FrozenVLM, dtype: torch.dtype) -> None:
    decoder = copy.deepcopy(vlm.decoder)
    weight = decoder.layers[0].self_attn.q_proj.weight
    decoder.layers[0].self_attn.q_proj.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    with pytest.raises(VugenError, match=r"quantised.*expert\.init=fresh or expert\.kind=dit"):
        GenerationExpert(decoder, 4, (8, 8))
    GenerationExpert(decoder, 4, (8, 8), fresh=True)


def test_codes_that_are_buffers_are_no_start_either(vlm: FrozenVLM) -> None:
    """As of AWQ and GPTQ, whose layers have no parameter; a buffer of positions is none."""
    decoder = copy.deepcopy(vlm.decoder)
    decoder.register_buffer("position_ids", torch.arange(8))
    GenerationExpert(decoder, 4, (8, 8))
    decoder.layers[0].self_attn.register_buffer("qweight", torch.zeros(8, 8, dtype=torch.int32))
    with pytest.raises(VugenError, match=r"quantised.*expert\.init=fresh or expert\.kind=dit"):
        GenerationExpert(decoder, 4, (8, 8))


def test_what_of_a_copy_no_gradient_reaches_is_left_alone(vlm: FrozenVLM) -> None:
    latents = LatentsCard(channels=4, grid=(8, 8), width=32)
    copied = new_expert(vlm, latents, Expert(adaptive_norms=True, reference=True))
    copied.decoder.idle = torch.nn.Linear(2, 2)  # as an image encoder of the decoder's own
    try_expert(copied, vlm, latents)
    resting = {name for name, weight in copied.named_parameters() if not weight.requires_grad}
    assert resting == {"decoder.idle.weight", "decoder.idle.bias"}
    assert all(weight.grad is None for weight in copied.parameters())


def test_the_copy_has_no_dropout_whatever_its_original_has(vlm: FrozenVLM) -> None:
    original = copy.deepcopy(vlm.decoder)
    original.config.attention_dropout = 0.5
    for module in original.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    expert = wake(GenerationExpert(original, 4, (8, 8))).train()
    prefix = vlm.prefix(["a bear", "a cat"])
    noised, t = torch.randn(2, 8, 8, 4), torch.tensor([0.2, 0.7])
    state = torch.get_rng_state()
    assert torch.equal(expert(noised, t, prefix), expert(noised, t, prefix))
    assert torch.equal(torch.get_rng_state(), state), "nothing draws from the global generator"
    assert original.config.attention_dropout == 0.5


# --- embeddings ---


def test_positions_are_all_different() -> None:
    positions = grid_positions(8, 8, 64)
    distances = torch.cdist(positions, positions) + 10 * torch.eye(64)
    assert positions.shape == (64, 64) and distances.min() > 0.1


def test_sinusoids_match_a_float64_reference() -> None:
    t = torch.tensor([0.0, 0.3, 17.0])
    frequencies = 10_000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    angles = t.double()[:, None] * frequencies
    assert torch.allclose(sinusoid(t, 16).double(), torch.cat([angles.cos(), angles.sin()], -1), atol=1e-5)
