"""All that only a GPU can show, in one command of under ten minutes that needs no network; writes a table.

    python benchmarks/gpu.py --out gpu.md
    python benchmarks/gpu.py --out rehearsal.md --rehearse --device cpu     # the same, tiny

Each stage is trained, killed and taken up again, and its losses stand beside those of the CPU in float32; a
1 B expert (256 image and 128 prompt tokens) is trained by AdamW and Muon, as memory allows; pictures are
drawn one and eight at a time, as they are and compiled. What fails is a line of the table, not the end of it.
Goals on one H100: MFU 45%, data-wait under 2%, a step that saves at most 1.1 times one that does not.
"""

import argparse
import gc
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from vugen_cli.recipe import NanoVLM, Recipe, load_recipe
from vugen_cli.seeds import BatchGenerator, random_rows
from vugen_cli.version import __version__

FILLER = "in a forest " * 39  # with a caption, about 128 tokens of the nano tokenizer


def main() -> None:
    """Run every part and write what it found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu.md"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no GPU here; --rehearse --device cpu goes through the same steps")
    os.environ["HF_HUB_OFFLINE"] = "1"
    began = time.perf_counter()
    rows: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for title, part in PARTS.items():
            begun = time.perf_counter()
            try:
                for what, found in part(device, options.rehearse):
                    rows.append((what, found))
                    print(f"{what}: {found}", flush=True)
            except Exception as error:  # the next part may still work, and GPU time is dear
                rows.append((title, f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"))
                print(f"{title}: {rows[-1][1]}", flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            print(f"[{title}: {time.perf_counter() - begun:.0f} s]", flush=True)
        os.chdir("/")
    lines = [f"{hardware(device)}. In all {time.perf_counter() - began:.0f} s.", "", "| what | found |"]
    lines += ["|---|---|", *(f"| {what} | {found} |" for what, found in rows)]
    options.out.write_text("\n".join(lines) + "\n")
    print(f"wrote {options.out}")
    sys.exit(any("FAILED" in found for _, found in rows))


def hardware(device: torch.device) -> str:
    """One line on machine and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    import transformers

    return (
        f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, vugen {__version__}"
    )


def vugen(*words: object) -> "subprocess.Popen[bytes]":
    """Start a command of its own process; what it says goes to `log`."""
    log = open("log", "ab")  # noqa: SIM115 - the process closes it
    return subprocess.Popen([sys.executable, "-m", "vugen_cli", *map(str, words)], stdout=log, stderr=log)


def finish(*words: object) -> None:
    """Run a command to its end, in this process: a failure is an exception."""
    from vugen_cli.app import app

    app([str(word) for word in words], standalone_mode=False)


def metrics(run: Path) -> list[dict[str, float]]:
    """The rows of a run so far."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


Found = Iterator[tuple[str, str]]
TINY = ["decoder.channels=[8,16]", "decoder.heads=2", "decoder.middle_layers=1", "reducer.channels=4"]


def stages(device: torch.device, rehearse: bool) -> Found:
    """Both stages on scenes: killed with -9 and taken up again, and losses beside the CPU's."""
    alone = ["--workers", 1] if rehearse else []
    finish("prepare", "--dataset", "openmoji", "--count", 64 if rehearse else 2000, "--out", "scenes", *alone)
    steps, batch = (8, 8) if rehearse else (400, 64)
    tiny = [*TINY, "expert.kind=dit", "expert.depth=1", "expert.width=64"]
    sizes = [w for key in tiny for w in ("--set", key)] if rehearse else []
    brief = ["--set", "data.workers=0", "--set", "sampling.steps=1"] if rehearse else []
    for stage, before in (("reducer", "--data scenes"), ("sampler", "--reducer reducer.safetensors")):
        command = [
            f"train-{stage}",
            *before.split(),
            "--out",
            f"{stage}.safetensors",
            "--device",
            str(device),
        ]
        command += ["--steps", str(steps), "--batch-size", str(batch), *sizes]
        command += ["--set", f"train_{stage}.checkpoint_every={steps // 4}", *brief]
        run, killed = Path(f"{stage}.run"), False
        if stage == "reducer" or not rehearse:  # starting another process takes longer than all of its steps
            job = vugen(*command)
            while job.poll() is None and not list(run.glob("state-*.safetensors")):
                time.sleep(0.02)
            killed = job.poll() is None
            job.send_signal(signal.SIGKILL)
            job.wait()
        finish(*command)
        rows = metrics(run)
        missing = "" if [row["step"] for row in rows] == list(range(steps)) else "FAILED: steps are missing, "
        later = rows[len(rows) // 2 :]
        rate, wait = (median(row[key] for row in later) for key in ("images_per_s", "data_wait"))
        taken_up = "killed and taken up again" if killed else "too quick to kill"
        yield (
            f"{stage} of the nano line, batch {batch}, {taken_up}",
            f"{missing}{rate:.0f} images/s, data-wait {wait:.1%}, loss {rows[0]['loss']:.3f} to "
            f"{rows[-1]['loss']:.3f}, {rows[-1]['memory_gb']:.2f} GB",
        )
        yield f"{stage}: a step that saves", saving(rows, steps // 4)
    yield from losses(device, sizes)


def saving(rows: list[dict[str, float]], every: int) -> str:
    """What the step after a saved one takes, beside the others."""
    seconds = {int(row["step"]): 1 / row["images_per_s"] for row in rows[len(rows) // 4 :]}
    beside = [s for step, s in seconds.items() if step and step % every == 0]
    return f"{median(beside) / median(seconds.values()):.2f} times one that does not"


def losses(device: torch.device, sizes: list[str]) -> Found:
    """The first losses of stage 2 on the device beside the CPU's, of the same noise: a GPU draws its own."""

    def on_host(
        random: Callable[..., Tensor],
        shape: torch.Size,
        generator: BatchGenerator,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        return random_rows(random, shape, generator.host, dtype).to(generator.device)

    found = {}
    for name, where, precision in (
        ("cpu", "cpu", "float32"), ("float32", str(device), "float32"), ("bfloat16", str(device), "bfloat16")
    ):  # fmt: skip
        with patch("vugen_cli.flow.random_rows", on_host):
            finish(
                "train-sampler", "--reducer", "reducer.safetensors", "--out", f"{name}.safetensors",
                "--steps", 6, "--batch-size", 8, "--device", where, "--set", "data.workers=0",
                "--set", f"train_sampler.precision={precision}", "--set", "engine.compile=false",
                "--set", "sampling.steps=1", *sizes,
            )  # fmt: skip
        found[name] = [row["loss"] for row in metrics(Path(f"{name}.run"))]
    for name in ("float32", "bfloat16"):
        gap = max(abs(a - b) for a, b in zip(found[name], found["cpu"], strict=True))
        yield f"losses of six steps in {name}", f"at most {gap:.1e} from the CPU's in float32"


def drawing(device: torch.device, rehearse: bool) -> Found:
    """Pictures by the bundled sampler, one and eight at a time, as it is and compiled."""
    from vugen_cli.sampling.trained import load_sampler

    for compiled in (False,) if rehearse else (False, True):
        sampler = load_sampler(device=device)
        if compiled:
            sampler.compile()
        for n in (1, 8):
            settings: dict[str, Any] = {"n": n, "steps": 1 if rehearse else None}
            seconds = []
            for seed in range(2 if rehearse else 6):
                begun = time.perf_counter()
                list(sampler.sample(["a bear in a forest"], seed=seed, **settings))
                seconds.append(time.perf_counter() - begun)
            taken = median(seconds[1:])
            how = "compiled, CUDA graphs" if compiled else "as it is"
            yield (
                f"drawing {n} at a time, {how}",
                f"{1000 * taken:.0f} ms, {n / taken:.1f} images/s (the first {seconds[0]:.1f} s)",
            )
        if device.type == "cuda":
            yield f"memory, {how}", f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB"


def expert(device: torch.device, rehearse: bool) -> Found:
    """Training steps of a 1 B expert from a latent cache, with the real loader, by both optimisers."""
    from vugen_cli.engine.stage import RunOptions
    from vugen_cli.nano.vlm import build, save_vlm
    from vugen_cli.stages.latent_cache import write_latents
    from vugen_cli.stages.train_reducer import train_reducer
    from vugen_cli.stages.train_sampler import train_sampler
    from vugen_cli.vlm.frozen import load_model

    grid = 4 if rehearse else 16
    finish("prepare", "--dataset", "openmoji", "--size", 8 * grid, "--count", 32 if rehearse else 2000,
           "--out", "large", *(["--workers", 1] if rehearse else []))  # fmt: skip
    sizes = {"width": 64, "mlp": 128, "layers": 2, "heads": 2} if rehearse else {
        "width": 2048, "mlp": 8192, "layers": 16, "heads": 32
    }  # fmt: skip
    tokenizer = load_model("nano")[1].tokenizer
    torch.manual_seed(0)
    with torch.device(device):  # random weights are made where they are quick to make
        model, processor = build(NanoVLM(**sizes), 8 * grid, tokenizer)
    save_vlm(model.to("cpu"), processor, "vlm")
    parameters = sum(p.numel() for p in model.model.language_model.layers.parameters())
    del model
    brief = ["steps=2", "batch_size=8", "preview_every=1000", "checkpoint_every=1000", "warmup=1"]
    stage = [f"train_{s}.{key}" for s in ("reducer", "sampler") for key in brief]
    workers = ["data.workers=0"] if rehearse else []
    common = [
        *workers,
        "vlm=vlm",
        "vlm_dtype=bfloat16",
        f"instruction={FILLER}{{prompt}}",
        "prompt_tokens=512",
        *TINY,
    ]
    reducer = train_reducer(recipe([*common, *stage]), "large", Path("r.safetensors"), device)
    write_latents(reducer, Path("large"), Path("latents"), device, flip=False)
    for optimizer, batch in (("adamw", 8),) if rehearse else (("adamw", 32), ("adamw", 64), ("muon", 64)):
        keys = "steps=20", f"batch_size={batch}", f"optimizer={optimizer}"
        run = Path(f"{optimizer}-{batch}.run")
        settings = recipe([*common, *stage, *(f"train_sampler.{key}" for key in keys), "data.flip=false"])
        try:
            with said() as lines:
                train_sampler(settings, reducer, "latents", run.with_suffix(".safetensors"), device,
                              options=RunOptions(profile=True))  # fmt: skip
        except torch.cuda.OutOfMemoryError:
            yield f"{parameters / 1e9:.2f} B expert, batch {batch}, {optimizer}", "does not fit"
            return
        rows = metrics(run)[5:13]  # the steps that the profile only times
        mfu = re.search(r"MFU (\S+%) ", "\n".join(lines))
        wait = re.search(r"data-wait (\S+);", "\n".join(lines))
        yield (
            f"{parameters / 1e9:.2f} B expert, {grid * grid} image tokens, batch {batch}, {optimizer}",
            f"MFU {mfu.group(1) if mfu else 'unknown'}, "
            f"{median(r['images_per_s'] for r in rows):.0f} images/s, "
            f"data-wait {wait.group(1) if wait else 'unknown'}, {rows[-1]['memory_gb']:.1f} GB",
        )
        run.with_suffix(".safetensors").unlink()
        for state in run.glob("state-*"):
            state.unlink()


def recipe(keys: list[str]) -> Recipe:
    """The nano recipe with other values."""
    return load_recipe("nano", keys)


class said:
    """Within this context what a profile prints is kept as lines too."""

    def __enter__(self) -> list[str]:
        from vugen_cli.engine.profiling import Profile

        self.profile, self.report, lines = Profile, Profile.report, list[str]()

        def report(profile: Profile) -> list[str]:
            lines.extend(self.report(profile))
            return lines

        Profile.report = report  # type: ignore[method-assign, assignment]
        return lines

    def __exit__(self, *_: object) -> None:
        self.profile.report = self.report  # type: ignore[method-assign]


PARTS: dict[str, Callable[[torch.device, bool], Found]] = {
    "stages": stages,
    "drawing": drawing,
    "expert": expert,
}


if __name__ == "__main__":
    main()
