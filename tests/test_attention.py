"""Attention of expert and pixel decoder, held against its definition in float64."""

import math

import pytest
import torch
from torch import Tensor, nn

from vugen_cli.models.generation_expert import FUSED, GenerationExpert, attend
from vugen_cli.models.pixel_decoder import WINDOW, TransformerBlock, relative_position_bias
from vugen_cli.vlm.frozen import FrozenVLM


def definition(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(d) + bias) v in float64, each head of queries with its own head of keys."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = query.double(), *(x.double().repeat_interleave(groups, 1) for x in (key, value))
    weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
    return weights @ v


def window_bias(table: Tensor, height: int, width: int) -> Tensor:
    """The bias of every query and key, one by one: [heads, N, N]."""
    places = [(y, x) for y in range(height) for x in range(width)]
    side, rows = 2 * WINDOW + 1, []
    for y, x in places:
        for ky, kx in places:
            dy, dx = y - ky, x - kx
            near = abs(dy) <= WINDOW and abs(dx) <= WINDOW
            rows.append(
                table[:, (dy + WINDOW) * side + dx + WINDOW]
                if near
                else torch.full((len(table),), -math.inf, dtype=table.dtype)
            )
    return torch.stack(rows, 1).unflatten(1, (len(places), len(places)))


@pytest.mark.parametrize("grid", [(3, 2), (1, 20), (11, 4)])
def test_the_bias_and_its_gradient_are_those_of_the_table(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    table = torch.randn(2, (2 * WINDOW + 1) ** 2, requires_grad=True)
    bias, exact = relative_position_bias(table, *grid)[0], window_bias(table.double(), *grid)
    assert torch.equal(bias.double(), exact)
    weight = torch.randn(bias.shape)
    (mine,) = torch.autograd.grad((bias.softmax(-1) * weight).sum(), table)
    (theirs,) = torch.autograd.grad((exact.softmax(-1) * weight).sum(), table)
    assert mine.any() and torch.allclose(mine, theirs, atol=1e-5)


def test_a_block_of_the_decoder_computes_the_definition() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(16, 2, 8)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, condition, seen = torch.randn(2, 30, 16), torch.randn(2, 30, 8), []
    block.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    qkv: list[Tensor] = []
    block.qkv.register_forward_hook(lambda _, __, out: qkv.append(out))
    block(x, condition, 3, 10)
    q, k, v = qkv[0].unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    exact = definition(q, k, v, window_bias(block.relative_position_bias_table.double(), 3, 10))
    assert torch.allclose(seen[0].double(), exact.transpose(1, 2).flatten(2), atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_image_tokens_see_all_but_the_padding(kv_heads: int, padded: bool) -> None:
    torch.manual_seed(0)
    query, (key, value) = torch.randn(3, 4, 6, 8), torch.randn(2, 3, kv_heads, 11, 8)
    visible = torch.ones(3, 1, 1, 11, dtype=torch.bool)
    if padded:
        visible[1, ..., 2:5] = False
        visible[2, ..., 4] = False
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 4 // kv_heads, True  # type: ignore[assignment]
    out, _ = attend(module, query, key, value, visible if padded else None, scaling=8**-0.5)
    bias = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -math.inf)
    exact = definition(query, key, value, bias)
    assert torch.allclose(out.double(), exact.transpose(1, 2), atol=1e-6)


def test_a_mask_is_made_of_bools_where_there_is_padding_and_not_at_all_elsewhere(vlm: FrozenVLM) -> None:
    torch.manual_seed(0)
    expert = GenerationExpert(vlm.decoder, 4, (4, 4)).eval()
    nn.init.normal_(expert.proj_out.weight)
    assert expert.decoder.config._attn_implementation == FUSED != vlm.decoder.config._attn_implementation
    masks: list[Tensor | None] = []
    expert.decoder.layers[0].register_forward_pre_hook(
        lambda _, __, inputs: masks.append(inputs["attention_mask"]), with_kwargs=True
    )
    x, t, prompts = torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.7]), ["a bear", "a cat"]
    plain, wide = vlm.prefix(["a bear"] * 2), vlm.prefix(prompts, 32)
    assert not plain.padded and wide.padded and wide.rows(torch.tensor([1])).padded
    fused = [expert(x, t, prefix) for prefix in (plain, wide)]
    assert masks[0] is None and masks[1] is not None and masks[1].dtype == torch.bool
    expert.decoder.set_attn_implementation("eager")  # as on CPUs in training: a mask that is added
    for mine, prefix in zip(fused, (plain, wide), strict=True):
        torch.testing.assert_close(mine, expert(x, t, prefix), atol=1e-5, rtol=1e-5)
