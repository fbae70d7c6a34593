"""PDD, the pixel diffusion decoder: z̃ to an image by flow matching straight in pixel space, without a VAE.

After SSDD (arXiv 2510.04961): a U-Net of residual blocks whose middle is a transformer, conditioned on z̃
both by concatenation to the noised image and, with the time, through adaptive norms. The network predicts
the clean image, from which the velocity follows (JiT, arXiv 2511.13720): pixels lie on a low-dimensional
manifold and noise does not, so a small network learns the first far sooner. The last step of `euler` and
`heun`, however many they take, ends on its clean prediction.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from vugen_cli.errors import VugenError
from vugen_cli.flow import Solver, at, solve
from vugen_cli.models.embeddings import TimeEmbedding, zeroed
from vugen_cli.recipe import NO_MIDPOINT
from vugen_cli.recipe import Decoder as DecoderRecipe

LEAST = 1e-6  # of the 1 - t by which a clean prediction is divided: only so that t = 1 gives a number
RIDGE = 1e-4  # of the mean square of the inputs of a least-squares fit: only so that there is one solution
SMOOTHINGS = 4  # passes; in each a pixel goes a fifth of the way to each of its four neighbours
WINDOW = 8  # reach of the relative positions, in tokens each way: a 17 x 17 window


class PixelDecoder(nn.Module):
    """Velocity of a noised image given the latents.

    Args:
        recipe: widths and depths.
        channels: of z̃.
    """

    def __init__(self, recipe: DecoderRecipe, channels: int):
        super().__init__()
        self.recipe = recipe
        widths, condition = recipe.channels, recipe.channels[-1]
        folded = 3 * recipe.patch**2
        self.time_embed = TimeEmbedding(condition)
        self.latent_embed = nn.Conv2d(channels, condition, 3, padding=1)
        self.conv_in = nn.Conv2d(folded + condition // 4, widths[0], 3, padding=1)
        self.cond_proj = nn.Conv2d(condition, condition // 4, 1)
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        skips = []
        for level, width in enumerate(widths):
            self.downsample.append(nn.Conv2d(widths[level - 1], width, 3, 2, 1) if level else nn.Identity())
            self.down.append(
                nn.ModuleList(ResidualBlock(width, width, condition) for _ in range(recipe.blocks))
            )
            skips += [width] * recipe.blocks
        self.mid = nn.ModuleList(
            TransformerBlock(widths[-1], recipe.heads, condition) for _ in range(recipe.middle_layers)
        )
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            self.up.append(
                nn.ModuleList(
                    ResidualBlock(width + skips.pop(), width, condition) for _ in range(recipe.blocks)
                )
            )
            self.upsample.append(
                nn.Conv2d(width, widths[level - 1], 3, padding=1) if level else nn.Identity()
            )
        self.norm_out = nn.GroupNorm(8, widths[0])
        self.conv_out = nn.Conv2d(widths[0], folded, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types leave it out

    @staticmethod
    def target(images: Tensor) -> Tensor:
        """What decoding ends in, x at t = 1: pixels in [-1, 1] of uint8 images [B, 3, H, W]."""
        return to_pixels(images).contiguous(memory_format=torch.channels_last)

    @property
    def outer(self) -> list[nn.Module]:
        """The first layer and the last ones, which know how large a patch is, and how it looks."""
        return [self.conv_in, self.up[-1], self.norm_out, self.conv_out]

    @property
    def multiple(self) -> int:
        """Image sides must be a multiple of this: the pixels of one middle token."""
        return self.recipe.patch * 2 ** (len(self.recipe.channels) - 1)

    def forward(
        self, noised: Tensor, t: Tensor, latents: Tensor, middle: list[Tensor] | None = None
    ) -> Tensor:
        """Velocity, float [B, 3, H, W].

        Args:
            noised: [B, 3, H, W], pixels in [-1, 1] on the path to noise; H and W multiples of `multiple`.
            t: [B] in [0, 1); at 1 there is no velocity, and x_t + (1 - t) v is x_t instead of x̂.
            latents: z̃ [B, h, w, c]; the grid is stretched over the image whatever its size.
            middle: a list to which the features half through the transformer are added, [B, H', W', width].
        """
        # B images, h x w the grid of z̃, p the patch, d and D the condition's and the outermost width,
        # H' x W' = (H / p) x (W / p), halved again at each level, N = H' W' of the innermost.
        time = self.time_embed(t)[:, :, None, None]  # [B, d, 1, 1]
        condition = functional.silu(self.latent_embed(latents.permute(0, 3, 1, 2)) + time)  # [B, d, h, w]
        x = functional.pixel_unshuffle(noised, self.recipe.patch)  # [B, 3 p², H', W']
        beside = functional.interpolate(self.cond_proj(condition), x.shape[-2:], mode="bilinear")
        x = torch.cat([x, beside.to(x.dtype)], 1)  # [B, 3 p² + d / 4, H', W']
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))  # [B, D, H', W']
        skips = []
        for downsample, blocks in zip(self.downsample, self.down, strict=True):
            x = downsample(x)  # half as high and wide, but for the outermost
            for block in blocks.children():
                x = block(x, condition)
                skips.append(x)
        height, width = x.shape[-2:]
        tokens = x.flatten(2).transpose(1, 2)  # [B, N, width]
        # The condition at each token, [B, N, d].
        seen = functional.interpolate(condition, (height, width), mode="nearest").flatten(2).transpose(1, 2)
        for number, layer in enumerate(self.mid):
            tokens = layer(tokens, seen, height, width)
            if middle is not None and number == (len(self.mid) - 1) // 2:
                middle.append(tokens.unflatten(1, (height, width)))
        x = x + tokens.transpose(1, 2).unflatten(2, (height, width))  # [B, width, H', W'] of the innermost
        for blocks, upsample in zip(self.up, self.upsample, strict=True):
            for block in blocks.children():
                x = block(torch.cat([x, skips.pop()], 1), condition)
            if isinstance(upsample, nn.Conv2d):
                # twice as high and wide
                x = upsample(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = self.conv_out(functional.silu(self.norm_out(x)))  # [B, 3 p², H', W']
        clean = functional.pixel_shuffle(x, self.recipe.patch).float()  # x̂ [B, 3, H, W]
        # u = (x̂ - x_t) / (1 - t)
        return (clean - noised) / (1 - t).clamp_min(LEAST)[:, None, None, None]

    def integrate(self, latents: Tensor, noise: Tensor, steps: int, solver: Solver) -> Tensor:
        """x at t = 1, float [B, 3, H, W]: `decode` before rounding, and with a gradient.

        Raises:
            VugenError: `midpoint`, whose last step goes on past the prediction that it asks for half-way.
        """
        if solver == "midpoint":
            raise VugenError(NO_MIDPOINT)
        return solve(lambda x, t: self(x, at(t, x), latents), noise, steps, solver, self.recipe.shift)

    @torch.no_grad()
    def decode(
        self, latents: Tensor, noise: Tensor, steps: int | None = None, solver: Solver | None = None
    ) -> Tensor:
        """Images of some latents, uint8 [B, 3, H, W].

        Args:
            latents: z̃ [B, h, w, c].
            noise: standard normal [B, 3, H, W]; fixes the picture.
            steps: ODE steps; default from the recipe.
            solver: see `flow.solve`; default from the recipe.

        Raises:
            VugenError: as `integrate`.
        """
        end = self.integrate(latents, noise, steps or self.recipe.steps, solver or self.recipe.solver)
        return to_uint8(smoothed(end, self.recipe.smoothing) if self.recipe.smoothing else end)


def enlarged(weights: dict[str, Tensor], patch: int, factor: int) -> dict[str, Tensor]:
    """A decoder's weights for pictures `factor` times as high and wide, of as many tokens.

    Each of its pixels becomes factor x factor alike ones: it reads their mean, and paints them all.

    Args:
        weights: of a `PixelDecoder`.
        patch: of its recipe; the new one is `factor * patch`.
        factor: at least 1.
    """

    def spread(weight: Tensor, dim: int) -> Tensor:  # 3 p² to 3 (p factor)²
        pixels = weight.unflatten(dim, (3, patch, patch))
        return (
            pixels.repeat_interleave(factor, dim + 1).repeat_interleave(factor, dim + 2).flatten(dim, dim + 2)
        )

    pixels, beside = weights["conv_in.weight"].tensor_split([3 * patch**2], 1)
    return weights | {
        "conv_in.weight": torch.cat([spread(pixels, 1) / factor**2, beside], 1),
        "conv_out.weight": spread(weights["conv_out.weight"], 0),
        "conv_out.bias": spread(weights["conv_out.bias"], 0),
    }


@torch.no_grad()
def fit_last_layer(decoder: PixelDecoder, batches: Iterable[tuple[Tensor, Tensor]], seed: int) -> None:
    """Set the last layer to the least squares of the pixels given its input, at t = 0, where z̃ tells all.

    It is linear, so with all before it kept its best weights have a closed form.

    Args:
        decoder: the others of whose layers stay as they are.
        batches: z̃ [B, h, w, c] and the images, uint8 [B, 3, H, W].
        seed: of the noise.
    """
    layer, generator, given = decoder.conv_out, torch.Generator().manual_seed(seed), []
    hook = layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    inputs = layer.in_channels * 9 + 1  # 3 x 3 places, and 1 for the bias
    products = torch.zeros(inputs, inputs + layer.out_channels, dtype=torch.float64)
    for latents, images in batches:
        target = decoder.target(images.to(latents.device))
        noise = torch.randn(target.shape, generator=generator).to(latents.device)
        decoder(noise, target.new_zeros(len(target)), latents)
        asked = functional.pixel_unshuffle(target, decoder.recipe.patch).flatten(2)  # [B, 3 p², N]
        # One by one: nine times the features of a batch may be gigabytes.
        for features, pixels in zip(given.pop().float(), asked, strict=True):
            seen = functional.unfold(features, 3, padding=1)  # [inputs - 1, N]
            columns = torch.cat([seen, torch.ones_like(seen[:1]), pixels])
            products += (columns[:inputs] @ columns.T).cpu().double()
    hook.remove()
    gram, moments = products.split([inputs, layer.out_channels], 1)
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    weights = torch.linalg.solve(gram + ridge, moments).T
    layer.weight.copy_(weights[:, :-1].reshape(layer.weight.shape))
    assert layer.bias is not None
    layer.bias.copy_(weights[:, -1])


def smoothed(pixels: Tensor, levels: float) -> Tensor:
    """Even out small differences of neighbouring pixels and keep the others (Perona and Malik, 1990).

    What a decoder wavers by in a flat area may be a part of a level; rounded, it is grain of whole ones. A
    difference d flows off by exp(-(d / levels)²): one of 0.3 levels nearly whole, one of 3 times levels not.

    Args:
        pixels: [B, 3, H, W] in [-1, 1].
        levels: over 0, of the 255 from -1 to 1; of the three colours the one that differs most counts.
    """
    for _ in range(SMOOTHINGS):
        flows = []
        for dim in (-2, -1):
            difference = pixels.diff(dim=dim)
            size = difference.abs().amax(1, keepdim=True) * 127.5 / levels
            flow = difference * torch.exp(-size.square())
            edge = torch.zeros_like(pixels.narrow(dim, 0, 1))
            flows.append(torch.cat([edge, flow, edge], dim).diff(dim=dim))
        pixels = pixels + (flows[0] + flows[1]) / 5
    return pixels


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] to uint8, rounded and clipped."""
    return (pixels.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pixels(images: Tensor) -> Tensor:
    """uint8 images to float32 pixels in [-1, 1]."""
    return images.float() / 127.5 - 1


def modulate(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """x (1 + scale) + bias in the modulation's dtype: norms come back in float32 under autocast, and mixed
    products convert their operands slowly.
    """
    return torch.addcmul(bias, x.to(bias.dtype), 1 + scale)


class ResidualBlock(nn.Module):
    """Two convolutions; the first norm is modulated by the condition at each place (AdaGN)."""

    def __init__(self, width_in: int, width: int, condition: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width_in), nn.GroupNorm(8, width)
        self.modulation = nn.Conv2d(condition, 2 * width_in, 1)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)
        for parameter in (*self.modulation.parameters(), self.conv2.weight):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, width_in, H, W] and the condition [B, condition, h, w] -> [B, width, H, W]."""
        modulation = functional.interpolate(self.modulation(condition), x.shape[-2:], mode="nearest")
        scale, bias = modulation.chunk(2, 1)
        h = self.conv1(functional.silu(modulate(self.norm1(x), scale, bias)))
        h = self.conv2(functional.silu(self.norm2(h)))
        return self.skip(x) + h


class TransformerBlock(nn.Module):
    """Attention with a learned table of relative positions, then GEGLU; both norms are adaptive (AdaLN)."""

    def __init__(self, width: int, heads: int, condition: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(condition, 6 * width))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(heads, (2 * WINDOW + 1) ** 2))
        self.ff_in = nn.Linear(width, 8 * width)
        self.ff_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, condition: Tensor, height: int, width: int) -> Tensor:
        """x and condition [B, height * width, ...] -> [B, height * width, ...]."""
        scale1, bias1, gate1, scale2, bias2, gate2 = self.modulation(condition).chunk(6, -1)  # [B, N, width]
        h = modulate(self.norm(x), scale1, bias1)
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, -1]
        bias = relative_position_bias(self.relative_position_bias_table, height, width)  # [1, heads, N, N]
        h = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        x = x + gate1 * self.proj(h.transpose(1, 2).flatten(2))
        h = modulate(self.norm(x), scale2, bias2)
        value, gate = self.ff_in(h).chunk(2, -1)  # [B, N, 4 width]
        return x + gate2 * self.ff_out(value * functional.gelu(gate))


def relative_position_bias(table: Tensor, height: int, width: int) -> Tensor:
    """Attention bias of a grid from a learned table; -inf outside the 17 x 17 window.

    Args:
        table: [heads, 17 * 17], of the offsets (dy, dx) of a query from its key, each from -8 to 8.
        height, width: of the grid, N = height * width.

    Returns:
        [1, heads, N, N], a view of every window of the table, copied once on its device: no index is built.
    """
    table = table.unflatten(1, (2 * WINDOW + 1, 2 * WINDOW + 1))
    sides = 2 * (width - 1 - WINDOW,) + 2 * (height - 1 - WINDOW,)  # what is negative is cut off
    offsets = functional.pad(table, sides, value=float("-inf"))  # [heads, 2 height - 1, 2 width - 1]
    # bias[y, x, y', x'] = offsets[y - y' + height - 1, x - x' + width - 1]
    bias = offsets.flip(1, 2).unfold(1, height, 1).unfold(2, width, 1).flip(1, 2)
    return bias.flatten(1, 2).flatten(2)[None]
