"""PDD-B beside diffusers' KL-VAE decoder at 256 px: images/s and peak memory, same machine, same run.

    python benchmarks/decoder_speed.py

The peer is the decoder of Stable Diffusion's `AutoencoderKL` (49.5 M parameters, latents of 4 x 32 x 32) with
random weights, which cost the same as trained ones. PDD-B decodes z̃ of 16 x 16 x 16 in one step, as it does
once distilled; its line says what one more step costs. Each is measured in a process of its own, because peak
memory is that of a process. Then: the same picture in float32, bfloat16 and torch.compile, and how far apart.
"""

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vugen_cli.engine.device import pick_device
from vugen_cli.engine.precision import wants_bfloat16
from vugen_cli.models.pixel_decoder import PixelDecoder
from vugen_cli.recipe import Decoder

SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def main() -> None:
    """Measure both, then how far the fast paths' pictures are from float32's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--preset", default="B")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device")
    parser.add_argument("--compile", action="store_true", help="also check torch.compile; needs a C compiler")
    options = parser.parse_args()
    device = pick_device(options.device)
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    )
    print(f"{name}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{options.size} px, batches of {options.batch_size}")
    found = {}
    for what in ("kl-vae", "pdd"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[what] = pool.apply(measured, (what, vars(options)))
        print(what, json.dumps(found[what]))
    speed, memory = (found["pdd"][key] / found["kl-vae"][key] for key in ("images_per_s", "peak_mib"))
    print(f"PDD-{options.preset} in one step: {speed:.2f} x the images/s, {memory:.2f} x the peak memory")
    print(json.dumps(fast_paths(options.size, options.preset, device, options.compile)))


def measured(what: str, options: dict[str, Any]) -> dict[str, float]:
    """Images/s, peak memory (working memory and float32 weights) and parameters of one decoder."""
    device, size, batch = pick_device(options["device"]), options["size"], options["batch_size"]
    torch.manual_seed(0)
    network, decode = {"pdd": pdd, "kl-vae": kl_vae}[what](size, batch, options["preset"], device)
    parameters = sum(p.numel() for p in network.parameters())
    before = start_peak(device)
    seconds = []
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=wants_bfloat16("auto", device))
    with torch.inference_mode(), autocast:
        for _ in range(options["rounds"] + 1):
            started = time.perf_counter()
            decode().cpu()
            seconds.append(time.perf_counter() - started)
    return {
        "images_per_s": round(batch / median(seconds[1:]), 3),
        "peak_mib": round(peak(device) - before + 4 * parameters / 2**20, 1),
        "million_parameters": round(parameters / 1e6, 2),
    }


def pdd(size: int, batch: int, preset: str, device: torch.device) -> tuple[Any, Callable[[], Tensor]]:
    """The pixel decoder and a call of it."""
    decoder = PixelDecoder(Decoder.model_validate({"preset": preset}), 16).to(device).eval()
    latents = torch.randn(batch, size // 16, size // 16, 16, device=device)
    noise = torch.randn(batch, 3, size, size, device=device)
    return decoder, lambda: decoder.decode(latents, noise, 1)


def kl_vae(size: int, batch: int, _preset: str, device: torch.device) -> tuple[Any, Callable[[], Tensor]]:
    """The peer and a call of it."""
    from diffusers import AutoencoderKL

    import vugen_cli.vlm  # noqa: F401 - its torchvision repair must come before diffusers is imported

    vae = AutoencoderKL(**SD_VAE).to(device).eval()
    vae.encoder = None
    if device.type == "cpu":
        vae = vae.to(memory_format=torch.channels_last)  # as PDD is: the peer gets the faster layout too
    latents = torch.randn(batch, 4, size // 8, size // 8, device=device)
    return vae.decoder, lambda: vae.decode(latents).sample


def start_peak(device: torch.device) -> float:
    """Forget the peak so far; memory in use now, in MiB: on the GPU, or this process's on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak(device: torch.device) -> float:
    """The most memory in use since `start_peak`, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return status("VmHWM")


def status(key: str) -> float:
    """A line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**10


def fast_paths(size: int, preset: str, device: torch.device, compiled: bool) -> dict[str, float]:
    """Largest and mean difference, of 255, between float32 pictures and those of each other path."""
    torch.manual_seed(0)
    decoder, _ = pdd(size, 2, preset, device)
    torch.nn.init.normal_(decoder.conv_out.weight, std=0.02)  # it starts at zero: every path would agree
    latents = torch.randn(2, size // 16, size // 16, 16, device=device)
    noise = torch.randn(2, 3, size, size, device=device)
    reference = decoder.decode(latents, noise, 2).int()
    found = {}

    def compare(name: str, picture: Tensor) -> None:
        difference = (picture.int() - reference).abs().float()
        found[f"{name}_max"], found[f"{name}_mean"] = (
            difference.max().item(),
            round(difference.mean().item(), 4),
        )

    with torch.autocast(device.type, torch.bfloat16):
        compare("bfloat16", decoder.decode(latents, noise, 2))
    compare("channels_first", decoder.to(memory_format=torch.contiguous_format).decode(latents, noise, 2))
    if compiled:
        decoder.forward = torch.compile(decoder.forward)
        compare("compiled", decoder.decode(latents, noise, 2))
    return found


if __name__ == "__main__":
    main()
