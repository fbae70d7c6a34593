"""torch.compile: the same losses, one graph for all layers and all lengths of prompts, and a way back."""

from functools import partial
from pathlib import Path

import pytest
import tiny_vlms
import torch
from conftest import TINY
from functorch.compile import nop
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from vugen_cli.engine.compiling import STEPS_THAT_PAY, compile_forward, compile_layers, wants_compile
from vugen_cli.engine.distributed import blocks, recompute
from vugen_cli.errors import VugenError
from vugen_cli.flow import flow_matching_loss
from vugen_cli.models.generation_expert import GenerationExpert
from vugen_cli.models.pixel_decoder import PixelDecoder
from vugen_cli.recipe import Engine, Recipe
from vugen_cli.sampling.trained import load_sampler
from vugen_cli.vlm.frozen import FrozenVLM, load_vlm

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PROMPTS = ["a bear", "two red apples and a very small cat on a beach", "a dog in the snow"]


def expert_of(vlm: FrozenVLM) -> GenerationExpert:
    torch.manual_seed(0)
    expert = GenerationExpert(vlm.decoder, 4, (4, 4))
    torch.nn.init.normal_(expert.proj_out.weight, std=0.02)
    return expert.train()


def losses_and_gradients(expert: GenerationExpert, vlm: FrozenVLM) -> list[torch.Tensor]:
    """Losses for prompts of several lengths, and the sum of their gradients."""
    generator, losses = torch.Generator().manual_seed(0), []
    expert.zero_grad()
    for prompt in PROMPTS:
        prefix = vlm.prefix([prompt] * 4)
        target, t = torch.randn(4, 4, 4, 4, generator=generator), torch.rand(4, generator=generator)
        loss = flow_matching_loss(lambda x, t: expert(x, t, prefix), target, t, generator)  # noqa: B023
        loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in expert.parameters())]


def test_auto_compiles_on_gpus_and_where_a_cpu_gains_by_it() -> None:
    auto = Engine()
    assert wants_compile(auto, GPU, 1, on_cpu=False)
    assert wants_compile(auto, CPU, STEPS_THAT_PAY, on_cpu=True)
    assert not wants_compile(auto, CPU, STEPS_THAT_PAY - 1, on_cpu=True)
    assert not wants_compile(auto, CPU, STEPS_THAT_PAY, on_cpu=False)
    assert wants_compile(Engine(compile=True), CPU, 1, on_cpu=False)
    assert not wants_compile(Engine(compile=False), GPU, 9999, on_cpu=True)


@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True])
def test_one_graph_serves_all_layers_and_all_lengths_of_prompts(vlm: FrozenVLM, twice: bool) -> None:
    plain = losses_and_gradients(expert_of(vlm), vlm)
    torch.compiler.reset()
    counters.clear()
    expert = expert_of(vlm)
    layers = blocks(expert)
    assert len(layers) == TINY.layers > 1
    compile_layers(layers, must=True)
    if twice:
        recompute(layers)
    compiled = losses_and_gradients(expert, vlm)
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    with torch.no_grad():  # a preview: other rows, no gradients, no compiling
        expert(torch.randn(2, 4, 4, 4), torch.rand(2), vlm.prefix(["a bear"] * 2))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"] and not counters["recompile_limit"]


def test_a_compiled_sampler_draws_the_same_pictures(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    prompts = ["a bear", "two red apples and a very small cat on a beach beside a big house with a red roof"]
    plain, compiled = (load_sampler(trained / "sampler.safetensors") for _ in range(2))
    torch.compiler.reset()
    counters.clear()
    compiled.compile()
    pairs = zip(plain.sample(prompts, guidance=2), compiled.sample(prompts, guidance=2), strict=True)
    for (*one, expected), (*other, found) in pairs:
        assert one == other
        torch.testing.assert_close(found.float(), expected.float(), atol=1, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("model_type", ["llama4", "git"])
def test_layers_that_ask_the_cache_or_are_called_by_position_are_compiled_too(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    tiny_vlms.build(model_type, tmp_path)
    vlm = load_vlm(str(tmp_path), "cpu")
    expert, prefix = expert_of(vlm), vlm.prefix(["a bear"])
    x, t = torch.randn(1, 4, 4, 4), torch.rand(1)
    plain = expert(x, t, prefix)
    counters.clear()
    compile_layers(blocks(expert), must=True)
    torch.testing.assert_close(expert(x, t, prefix), plain, atol=1e-5, rtol=1e-4)
    assert counters["stats"]["unique_graphs"]


def test_the_pixel_decoder_is_one_graph_with_its_middle_features(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what is tested is the tracing; generating C++ for it takes half a minute
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    decoder = PixelDecoder(tiny_recipe.decoder, 4)
    torch.nn.init.normal_(decoder.conv_out.weight, std=0.02)
    x, t, z = torch.randn(2, 3, 32, 32), torch.rand(2), torch.randn(2, 4, 4, 4)
    middle: list[torch.Tensor] = []
    expected = decoder(x, t, z, middle)
    counters.clear()
    compile_forward([decoder], must=True)
    for _ in range(2):
        found: list[torch.Tensor] = []
        torch.testing.assert_close(decoder(x, t, z, found), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[0], middle[0], atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("must", [False, True])
def test_without_a_compiler_a_run_goes_on_or_says_what_is_missing(
    must: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch._inductor import config

    torch.compiler.reset()
    layers = [torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.GELU()) for _ in range(2)]
    x = torch.randn(2, 3)
    expected = [layer(x) for layer in layers]
    compile_forward(layers, must)
    with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        if must:
            with pytest.raises(VugenError, match="torch.compile fails here .* needs a C\\+\\+ compiler"):
                layers[0](x)
            return
        assert all(torch.equal(layer(x), y) for layer, y in zip(layers, expected, strict=True))
    assert capsys.readouterr().out.count("going on without it") == 1


def test_a_backward_pass_that_cannot_be_compiled_is_noticed_before_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("file too short")  # as of what a killed compilation stored

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=nop, bw_compiler=fails)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    layer = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.GELU())
    compile_forward([layer], must=False)
    layer(torch.randn(2, 3)).sum().backward()
    assert layer[0].weight.grad is not None
    assert "file too short" in (said := capsys.readouterr().out) and "going on without it" in said
