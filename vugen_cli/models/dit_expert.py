"""An expert of our own: a diffusion transformer that reads the prompt from the VLM's hidden states.

Beside the copy of the decoder (`generation_expert`), for VLMs whose layers do not all keep keys and values
(linear attention, convolutions, shared keys), and for any depth and width. Plain blocks: norms modulated and
branches gated by the time (adaLN-zero, DiT, arXiv 2212.09748), normalised queries and keys (arXiv
2302.05442), SwiGLU (arXiv 2002.05202), rotary positions of row and column (arXiv 2104.09864, 2403.13298), and
one attention over what a block projects of the prompt and the image tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from vugen_cli.errors import VugenError
from vugen_cli.models.embeddings import ReferenceEmbedding, TimeEmbedding, visible, zeroed
from vugen_cli.vlm.prefix import Prefix

HEAD = 64  # head size where the recipe does not say how many heads


class DiTExpert(nn.Module):
    """The velocity field v(z̃_t, t | prompt); zero before its first step.

    Args:
        channels: of z̃.
        reads: which of the VLM's hidden states each block reads, one number a block; see `spread`.
        prompt_width: of those states.
        width: of the blocks.
        heads: default one for every 64 of the width.
        mlp: inner width of the SwiGLU; default 8/3 of the width, as many weights as a plain MLP of four times
            the width has.
        reference: read z̃ of a prompt's pictures too; see `Expert.reference`.

    Attributes:
        width: of the blocks.
        alignment: hidden states [B, h, w, width] -> z [B, h, w, d]; only while training with REPA.

    Raises:
        VugenError: the heads do not divide the width into sizes that rows and columns can share.
    """

    def __init__(
        self,
        channels: int,
        reads: list[int],
        prompt_width: int,
        width: int,
        heads: int | None = None,
        mlp: int | None = None,
        reference: bool | str = False,
    ):
        super().__init__()
        self.reference = reference
        heads = heads or max(1, width // HEAD)
        if width % heads or width // heads % 4:
            raise VugenError(
                f"expert.width={width} with expert.heads={heads}: the width must be a multiple of four times "
                "the heads (rotary positions take pairs of rows and of columns)"
            )
        self.reads, self.width, self.head = reads, width, width // heads
        self.alignment: nn.Module | None = None
        self.proj_in = nn.Linear(channels, width)
        self.time_embed = TimeEmbedding(width)
        self.blocks = nn.ModuleList(
            DiTBlock(width, heads, mlp or 8 * width // 3, prompt_width) for _ in reads
        )
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.proj_out = zeroed(nn.Linear(width, channels))
        if reference:
            self.reference_embed = ReferenceEmbedding(width)

    def forward(self, noised: Tensor, t: Tensor, prefix: Prefix) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity [B, h, w, channels], for a grid of any size; in training with an alignment also z as half
        of the blocks tell it.

        Args:
            noised: z̃_t [B, h, w, channels].
            t: [B] in [0, 1].
            prefix: of B prompts, from `FrozenVLM.prefix` with the hidden states that the expert `reads`.
        """
        _, height, width, _ = noised.shape
        count, references = height * width, prefix.references if self.reference else None
        x = self.proj_in(noised.flatten(1, 2)).float()  # [B, N, width]; the residual stream stays float32
        condition = functional.silu(self.time_embed(t))[:, None]  # [B, 1, width]
        cos, sin = rotary_2d(height, width, self.head, x.device)
        if references is not None:  # R N clean tokens, each turned as its noised one is
            clean = self.reference_embed(self.proj_in(references.flatten(2, 3)))
            x = torch.cat([x, clean.float()], 1)  # [B, N + R N, width]
            cos, sin = (each.repeat(1 + references.shape[1], 1) for each in (cos, sin))
        elif self.reference and torch.is_grad_enabled():
            x = self.reference_embed.unused(x)
        seen = visible(prefix, count, x.shape[1] // count - 1)[:, None, None]
        halfway = x
        for number, (block, prompt) in enumerate(zip(self.blocks, prefix.hidden, strict=True)):
            halfway = x if number == len(self.blocks) // 2 else halfway
            x = block(x, condition, prompt=prompt, attention_mask=seen, cos=cos, sin=sin)
        scale, bias = self.modulation(condition).chunk(2, -1)
        velocity = self.proj_out(modulate(x[:, :count], scale, bias)).unflatten(1, (height, width))
        if self.alignment and self.training:
            return velocity, self.alignment(halfway[:, :count].unflatten(1, (height, width)))
        return velocity


class DiTBlock(nn.Module):
    """Attention over prompt and image tokens, then SwiGLU, each modulated and gated by the time."""

    def __init__(self, width: int, heads: int, mlp: int, prompt_width: int):
        super().__init__()
        self.heads = heads
        self.modulation = zeroed(nn.Linear(width, 6 * width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.prompt_norm = nn.RMSNorm(prompt_width, eps=1e-6)
        self.prompt_kv = nn.Linear(prompt_width, 2 * width, bias=False)
        self.q_norm, self.k_norm, self.prompt_k_norm = (
            nn.RMSNorm(width // heads, eps=1e-6) for _ in range(3)
        )
        self.proj = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * mlp, bias=False)
        self.down = nn.Linear(mlp, width, bias=False)

    def forward(
        self, x: Tensor, condition: Tensor, prompt: Tensor, attention_mask: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """[B, N, width] -> [B, N, width].

        Args:
            x: image tokens.
            condition: of the time, [B, 1, width].
            prompt: hidden states of the VLM, [B, T, prompt_width].
            attention_mask: bool [B, 1, 1, T + N], False at padding.
            cos, sin: from `rotary_2d`.
        """
        scale1, bias1, gate1, scale2, bias2, gate2 = self.modulation(condition).chunk(6, -1)
        q, k, v = self.split(self.qkv(modulate(x, scale1, bias1)), 3)  # [B, heads, N, head] each
        prompt_k, prompt_v = self.split(self.prompt_kv(self.prompt_norm(prompt.float())), 2)
        # The prompt's keys are not turned: how a place reads a word may depend on where the place is.
        k = torch.cat([self.prompt_k_norm(prompt_k.float()), rotate(self.k_norm(k.float()), cos, sin)], 2)
        v = torch.cat([prompt_v, v], 2)
        q = rotate(self.q_norm(q.float()), cos, sin)
        h = attend(q.to(v.dtype), k.to(v.dtype), v, attention_mask)
        x = torch.addcmul(x, gate1.to(x.dtype), self.proj(h.transpose(1, 2).flatten(2)).to(x.dtype))
        gate, up = self.gate_up(modulate(x, scale2, bias2)).chunk(2, -1)
        return torch.addcmul(x, gate2.to(x.dtype), self.down(functional.silu(gate) * up).to(x.dtype))

    def split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[B, N, parts * width] -> `parts` tensors [B, heads, N, head]."""
        return x.unflatten(-1, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention of q [B, heads, N, head] over k and v [B, heads, S, head]; `seen` is bool [B, 1, 1, S]."""
    if q.device.type == "cpu" and torch.is_grad_enabled():
        # Step by step: the fused kernel's backward pass takes three times as long on CPUs in bfloat16.
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        return scores.masked_fill(~seen, float("-inf")).softmax(-1).to(v.dtype) @ v
    return functional.scaled_dot_product_attention(q, k, v, seen)


def modulate(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """RMSNorm(x) (1 + scale) + bias, in the dtype of the modulation."""
    return torch.addcmul(bias, functional.rms_norm(x, x.shape[-1:], eps=1e-6).to(bias.dtype), 1 + scale)


def rotary_2d(height: int, width: int, head: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each place's angles, float32 [height * width, head / 2] each.

    The first half of the angles turns with the row, the second with the column.
    """
    count = head // 4
    frequencies = 100.0 ** (-torch.arange(count, device=device) / count)  # grids have tens of places a side
    rows, columns = (torch.arange(n, device=device)[:, None] * frequencies for n in (height, width))
    angles = torch.cat(
        [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], -1
    ).flatten(0, 1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + head / 2}) of [B, heads, N, head] by its place's angle."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def spread(layers: int, depth: int) -> list[int]:
    """Which hidden states `depth` blocks read of a decoder of some layers: 0 is the first layer's input.

    Evenly from the first layer's input on: of as many blocks as layers, each reads what the copy's would.
    """
    return [number * layers // depth for number in range(depth)]
