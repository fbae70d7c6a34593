"""The cached prompt beside joint mixture-of-transformers code, in training and sampling; and both experts.

    python benchmarks/expert.py [--width 512] [--layers 8] [--batch 8] [--device cuda]

The peer runs prompt and image tokens in one sequence through two sets of weights, as joint code does (BAGEL
trains both; here also with the prompt's weights frozen). Each variant runs in a process of its own, so that
its peak memory is its own: added by the step to what the models take. Goals at 128 prompt and 256 image
tokens: training 1.25x joint code with both streams trainable and never slower than joint code with the
prompt frozen, at lower peak memory than both; sampling in 25 steps 1.4x; velocities agree to 1e-4.
`dit` is the other expert, of as many parameters, reading hidden states: goal, no slower than `cached`.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from vugen_cli.models.dit_expert import DiTExpert, spread
from vugen_cli.models.generation_expert import GenerationExpert
from vugen_cli.vlm.prefix import Prefix

TRAINING = ("cached", "joint", "joint, prompt frozen", "cached, prompt under autograd", "dit")
SAMPLING = ("sample cached", "sample joint", "sample dit")
PROMPT, GRID, CHANNELS, STEPS = 128, (16, 16), 16, 25


def main() -> None:
    """Run every variant, then print times, memory, ratios and the agreement of the velocities."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options)))
        return
    cuda = options.device.startswith("cuda")
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    tokens = f"{PROMPT} prompt and {GRID[0] * GRID[1]} image tokens"
    sizes = f"{options.layers} layers of {options.width}, batch {options.batch}, {tokens}"
    print(f"{name}, {os.cpu_count()} cores, torch {torch.__version__}; {sizes}")
    found = {}
    for variant in TRAINING + SAMPLING:
        command = [sys.executable, *sys.argv, "--variant", variant]
        found[variant] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        print(f"{variant:32} {found[variant]['seconds']:7.3f} s  {found[variant]['memory']:6.0f} MB")
    cached, sampled = found["cached"]["seconds"], found["sample cached"]["seconds"]
    for variant in TRAINING[1:]:
        print(f"training, cached against {variant}: {found[variant]['seconds'] / cached:.2f}x the speed")
    print(f"sampling, cached against joint: {found['sample joint']['seconds'] / sampled:.2f}x the speed")
    print(f"sampling, cached against dit: {found['sample dit']['seconds'] / sampled:.2f}x the speed")
    copied, dit = (sum(p.numel() for p in models(options, dit)[1].parameters()) for dit in (False, True))
    print(f"parameters: copy {copied / 1e6:.1f} M, dit {dit / 1e6:.1f} M")
    print(f"largest difference of the velocities: {agreement(options):.1e}")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step (or of one sampling run) and the MB that it adds."""
    kind = options.variant
    language, expert = models(options, "dit" in kind)
    ids, x, t, target = batch_of(options)
    both = kind in ("joint", "cached, prompt under autograd")
    language.requires_grad_(both)
    trained = [*expert.parameters(), *(language.parameters() if kind == "joint" else [])]
    optimiser = torch.optim.AdamW(trained, fused=True)

    def velocity(noised: Tensor, time_: Tensor) -> Tensor:
        if "joint" in kind:
            return joint(language, expert, ids, noised, time_)
        with torch.set_grad_enabled(both):
            prefix = prefix_of(language, ids, expert.reads)
        return expert(noised, time_, prefix)

    def train() -> None:
        (velocity(x, t) - target).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()

    @torch.no_grad()
    def sample() -> None:
        prefix = None if "joint" in kind else prefix_of(language, ids, expert.reads)
        state = x
        for step in range(STEPS):
            now = torch.full_like(t, step / STEPS)
            v = expert(state, now, prefix) if prefix else joint(language, expert, ids, state, now)
            state = state + v / STEPS

    run = sample if kind.startswith("sample") else train
    cuda = x.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else resident()
    seconds = []
    for _ in range(options.repeats):
        started = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = (
        torch.cuda.max_memory_allocated()
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {"seconds": median(seconds[1:]), "memory": (peak - before) / 1e6}


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def models(options: argparse.Namespace, dit: bool = False) -> tuple[Any, Any]:
    """A language model and its expert, a copy or a DiT of as many parameters, the output woken from zero."""
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
    )
    language = LlamaModel(config).to(options.device)
    if dit:
        # As many in 3/4 the depth: the copy has 16 width² weights a layer, a DiT 12 width² + 3 width mlp.
        depth = 3 * options.layers // 4
        mlp = round((16 * options.layers / depth - 12) / 3 * options.width)
        reads = spread(options.layers, depth)
        other = DiTExpert(CHANNELS, reads, options.width, options.width, options.width // 64, mlp)
        nn.init.normal_(other.proj_out.weight, std=0.02)
        return language, other.to(options.device)
    expert = GenerationExpert(language, CHANNELS, GRID).to(options.device)
    nn.init.normal_(expert.proj_out.weight, std=0.02)
    return language, expert


def batch_of(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids, noised latents, times and target."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, *GRID, CHANNELS)
    tensors = (
        torch.randint(0, 1000, (options.batch, PROMPT), generator=generator),
        torch.randn(shape, generator=generator),
        torch.rand(options.batch, generator=generator),
        torch.randn(shape, generator=generator),
    )
    ids, x, t, target = (tensor.to(options.device) for tensor in tensors)
    return ids, x, t, target


def prefix_of(language: Any, ids: Tensor, hidden: list[int] | None = None) -> Prefix:
    """The prompt's keys and values, or hidden states, as `FrozenVLM.prefix` takes them."""
    from transformers import DynamicCache

    mask = torch.ones_like(ids, dtype=torch.bool)
    if hidden is not None:
        states = language(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        return Prefix([], [], mask, False, [states[number] for number in hidden])
    cache = DynamicCache()
    language(input_ids=ids, past_key_values=cache, use_cache=True)
    return Prefix(
        [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers], mask, False
    )


def joint(language: Any, expert: GenerationExpert, ids: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The same velocity from one sequence: each stream through its own weights, attention over both."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    text = language.embed_tokens(ids)
    image = expert.proj_in(x.flatten(1, 2)) + expert.pos_embed + expert.time_embed(t)[:, None]
    split = [text.shape[1], image.shape[1]]
    total = sum(split)
    cos, sin = language.rotary_emb(text, torch.arange(total, device=x.device)[None])
    mask = torch.ones(total, total, dtype=torch.bool, device=x.device).tril()
    mask[split[0] :] = True
    for ours, theirs in zip(language.layers, expert.decoder.layers, strict=True):
        pair = ((ours, text), (theirs, image))
        heads = []
        for name in ("q_proj", "k_proj", "v_proj"):
            parts = [getattr(layer.self_attn, name)(layer.input_layernorm(h)) for layer, h in pair]
            heads.append(torch.cat(parts, 1).unflatten(-1, (-1, ours.self_attn.head_dim)).transpose(1, 2))
        query, key = apply_rotary_pos_emb(heads[0], heads[1], cos, sin)
        seen = nn.functional.scaled_dot_product_attention(query, key, heads[2], attn_mask=mask)
        outs = seen.transpose(1, 2).flatten(2).split(split, 1)
        text, image = (h + layer.self_attn.o_proj(out) for (layer, h), out in zip(pair, outs, strict=True))
        text = text + ours.mlp(ours.post_attention_layernorm(text))
        image = image + theirs.mlp(theirs.post_attention_layernorm(image))
    return expert.proj_out(expert.decoder.norm(image)).unflatten(1, GRID)


@torch.no_grad()
def agreement(options: argparse.Namespace) -> float:
    """Largest difference between the two ways to the velocity."""
    language, expert = models(options)
    ids, x, t, _ = batch_of(options)
    return float((expert(x, t, prefix_of(language, ids)) - joint(language, expert, ids, x, t)).abs().max())


if __name__ == "__main__":
    main()
