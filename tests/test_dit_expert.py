"""The diffusion transformer as expert: beside any decoder and of any size; and the copy's adaptive norms."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import tiny_overrides
from torch import Tensor, nn
from torch._dynamo.utils import counters

from vugen_cli.card import LatentsCard
from vugen_cli.checkpoint import read_card
from vugen_cli.engine.compiling import compile_layers
from vugen_cli.engine.distributed import blocks, recompute
from vugen_cli.errors import VugenError
from vugen_cli.models.dit_expert import DiTBlock, DiTExpert, attend, rotary_2d, rotate, spread
from vugen_cli.models.generation_expert import GenerationExpert
from vugen_cli.recipe import Expert, load_recipe
from vugen_cli.sampling.trained import load_sampler, new_expert
from vugen_cli.stages.train_sampler import train_sampler
from vugen_cli.studies.understanding import weight_hash
from vugen_cli.vlm.frozen import FrozenVLM

PROMPTS = ["a bear", "two apples to the left of a red car in a city at night", ""]
SIZES = {"width": 48, "depth": 3, "heads": 2, "mlp": 40}  # nothing like the VLM's: 64 wide, 2 layers


def wake(module: nn.Module) -> Any:
    """Give the layers that start at zero random weights, so that everything has an effect."""
    torch.manual_seed(5)
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return module


def dit(vlm: FrozenVLM) -> DiTExpert:
    torch.manual_seed(0)
    latents = LatentsCard(channels=4, grid=(8, 8), width=32)
    expert = new_expert(vlm, latents, Expert(kind="dit", **SIZES))  # type: ignore[arg-type]
    assert isinstance(expert, DiTExpert)
    return expert.eval()


@pytest.fixture(scope="module")
def expert(vlm: FrozenVLM) -> DiTExpert:
    return wake(dit(vlm)).requires_grad_(False)


def test_it_starts_from_zero_velocity_and_every_weight_then_gets_a_gradient(vlm: FrozenVLM) -> None:
    expert, prefix = dit(vlm), vlm.prefix(PROMPTS, hidden=[0, 0, 1])
    x, t = torch.randn(3, 8, 8, 4), torch.rand(3)
    assert not expert(x, t, prefix).any()
    wake(expert)(x, t, prefix).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in expert.parameters())


def test_image_tokens_see_prompt_time_and_each_other_both_ways(expert: DiTExpert, vlm: FrozenVLM) -> None:
    x, t = torch.randn(1, 8, 8, 4), torch.full((1,), 0.5)
    prefix = vlm.prefix(["a bear in a forest"], hidden=expert.reads)
    base = expert(x, t, prefix)
    for place, other in (((0, 0), (7, 7)), ((7, 7), (0, 0))):
        moved = x.clone()
        moved[0, *place] += 1
        assert (expert(moved, t, prefix) - base)[0, *other].abs().max() > 1e-6
    assert (expert(x, t, vlm.prefix(["a cat on a beach"], hidden=expert.reads)) - base).abs().max() > 1e-6
    assert (expert(x, t + 0.3, prefix) - base).abs().max() > 1e-6


def test_places_are_told_apart_and_any_grid_is_drawn(expert: DiTExpert, vlm: FrozenVLM) -> None:
    prefix = vlm.prefix(["a bear"], hidden=expert.reads)
    flat = expert(torch.ones(1, 4, 6, 4), torch.rand(1), prefix)[0].flatten(0, 1)
    assert flat.shape == (24, 4)
    assert (torch.cdist(flat, flat) + torch.eye(24)).min() > 1e-5  # equal tokens, different places


def test_queries_and_keys_meet_by_how_far_apart_their_places_are() -> None:
    """Rotary positions: q·k depends on the difference of rows and of columns alone, not on the place."""
    cos, sin = rotary_2d(6, 6, 16, torch.device("cpu"))
    q, k = (rotate(torch.randn(16).expand(1, 1, 36, 16), cos, sin)[0, 0] for _ in range(2))
    scores = (q @ k.T).view(6, 6, 6, 6)
    assert torch.allclose(
        scores[:4, :5, 2:, 1:].diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).std(),
        torch.tensor(0.0),
        atol=1e-5,
    )
    assert abs(scores[0, 0, 2, 1] - scores[0, 0, 1, 2]) > 1e-3  # rows are not columns


def test_attention_step_by_step_is_the_fused_one() -> None:
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    seen = torch.rand(2, 1, 1, 7) > 0.3
    with torch.no_grad():
        fused = attend(q, k, v, seen)
    assert torch.allclose(attend(q, k, v, seen), fused, atol=1e-6)


def test_velocities_do_not_depend_on_padding_or_company(expert: DiTExpert, vlm: FrozenVLM) -> None:
    check_padding(expert, vlm)


def check_padding(expert: DiTExpert, vlm: FrozenVLM) -> None:
    x, t = torch.randn(3, 8, 8, 4), torch.tensor([0.1, 0.5, 0.9])
    together = expert(x, t, vlm.prefix(PROMPTS, 64, hidden=expert.reads))
    for i, prompt in enumerate(PROMPTS):
        alone = expert(x[i : i + 1], t[i : i + 1], vlm.prefix([prompt], hidden=expert.reads))
        assert torch.allclose(together[i], alone[0], atol=1e-5)


TEXT = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}


def linear_attention() -> nn.Module:
    kinds = ["linear_attention", "full_attention"] * 2
    config = transformers.Qwen3_5TextConfig(**TEXT, **HEADS, head_dim=16, layer_types=kinds)
    return transformers.Qwen3_5TextModel(config)


def convolutions() -> nn.Module:
    config = transformers.Lfm2Config(**TEXT, **HEADS, layer_types=["conv", "full_attention"] * 2)
    return transformers.Lfm2Model(config)


def shared_keys() -> nn.Module:
    config = transformers.Gemma3nTextConfig(
        **TEXT, **HEADS, head_dim=16, num_kv_shared_layers=2, sliding_window=4, laurel_rank=8,
        layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * 4,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=512,
    )  # fmt: skip
    return transformers.Gemma3nTextModel(config)


@pytest.mark.parametrize("decoder", [linear_attention, convolutions, shared_keys])
def test_decoders_without_keys_of_their_own_have_a_dit_and_no_copy(
    vlm: FrozenVLM, decoder: Callable[[], nn.Module]
) -> None:
    """Qwen3.5's, LFM2's and Gemma 3n's language models in the place of the VLM's."""
    torch.manual_seed(0)
    hybrid = copy.copy(vlm)
    hybrid.decoder = decoder().eval().requires_grad_(False)
    with pytest.raises(VugenError, match=r"keys and values .* set expert\.kind=dit"):
        hybrid.prefix(["a bear"])
    expert = wake(dit(hybrid)).requires_grad_(False)
    check_padding(expert, hybrid)
    x, t = torch.randn(1, 8, 8, 4), torch.rand(1)
    bear, cat = (expert(x, t, hybrid.prefix([p], hidden=expert.reads)) for p in ("a bear", "a cat"))
    assert (bear - cat).abs().max() > 1e-6


def test_blocks_read_a_spread_of_the_decoders_layers() -> None:
    assert spread(6, 6) == [0, 1, 2, 3, 4, 5]
    assert spread(36, 4) == [0, 9, 18, 27] and spread(2, 4) == [0, 0, 1, 1]


def test_a_dit_trains_and_its_checkpoint_draws(
    trained: Path, scenes: Path, tmp_path: Path, vlm: FrozenVLM
) -> None:
    sizes = [f"expert.{name}={value}" for name, value in SIZES.items()]
    recipe = load_recipe(None, [*tiny_overrides(Path(vlm.name)), "expert.kind=dit", *sizes])
    before = weight_hash(vlm.model)
    out = train_sampler(
        recipe, trained / "reducer.safetensors", scenes, tmp_path / "s.safetensors", torch.device("cpu")
    )
    assert read_card(out).recipe["expert"]["kind"] == "dit"
    sampler = load_sampler(out)
    assert isinstance(sampler.expert, DiTExpert) and len(blocks(sampler.expert)) == 3
    assert any(p.any() for p in sampler.expert.proj_out.parameters())
    one, other = (next(sampler.sample(["a bear"], seed=seed))[2] for seed in (0, 1))
    assert one.shape == (3, 64, 64) and not torch.equal(one, other)
    assert weight_hash(sampler.vlm.model) == before


@pytest.mark.parametrize("kind", ["dit", "copy"])
def test_one_graph_serves_all_blocks_and_all_lengths_of_prompts(
    vlm: FrozenVLM, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what is tested is the tracing; generating C++ for it takes half a minute
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))

    def losses_and_gradients(compiled: bool) -> list[Tensor]:
        torch.manual_seed(0)
        expert = dit(vlm) if kind == "dit" else GenerationExpert(vlm.decoder, 4, (8, 8), adaptive_norms=True)
        wake(expert).train()
        if compiled:
            compile_layers(blocks(expert), must=True)
            recompute(blocks(expert))
        generator, losses = torch.Generator().manual_seed(0), []
        for prompt in PROMPTS:
            x, t = torch.randn(2, 8, 8, 4, generator=generator), torch.rand(2, generator=generator)
            loss = expert(x, t, vlm.prefix([prompt] * 2, hidden=expert.reads)).square().mean()
            loss.backward()
            losses.append(loss.detach())
        return [*losses, *(p.grad for p in expert.parameters() if p.grad is not None)]

    plain = losses_and_gradients(False)
    torch.compiler.reset()
    counters.clear()
    for ours, theirs in zip(losses_and_gradients(True), plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_adaptive_norms_of_a_copy_change_nothing_before_their_first_step(vlm: FrozenVLM) -> None:
    plain, adaptive = (
        GenerationExpert(vlm.decoder, 4, (8, 8), adaptive_norms=flag).eval() for flag in (False, True)
    )
    adaptive.load_state_dict(wake(plain).state_dict(), strict=False)
    prefix, x, t = vlm.prefix(PROMPTS), torch.randn(3, 8, 8, 4), torch.rand(3)
    assert torch.equal(adaptive(x, t, prefix), plain(x, t, prefix))
    assert len(adaptive.norms) == 5  # two a layer and the last one
    adaptive(x, t, prefix).square().sum().backward()
    (gradient,) = (p.grad for name, p in adaptive.named_parameters() if name == "modulation.weight")
    assert gradient is not None and all(part.any() for part in gradient.chunk(10))
    nn.init.normal_(adaptive.modulation.weight, std=0.1)
    assert (adaptive(x, t, prefix) - plain(x, t, prefix)).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["expert.width=32"], "expert.kind=dit"),
        (["expert.kind=dit", "expert.adaptive_norms=true"], "leave it out"),
    ],
)
def test_sizes_are_of_the_dit_and_adaptive_norms_of_the_copy(settings: list[str], message: str) -> None:
    with pytest.raises(VugenError, match=message):
        load_recipe(None, settings)


def test_a_width_that_the_heads_cannot_share_is_refused() -> None:
    with pytest.raises(VugenError, match=r"expert\.width=50 with expert\.heads=4"):
        DiTExpert(4, [0], 64, width=50, heads=4)
    assert DiTBlock(48, 2, 40, 64).heads == 2
