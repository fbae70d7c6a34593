"""Whether two commits compute the same weights, losses, pictures, shards and scores, byte for byte.

    python benchmarks/same_bytes.py main              # beside the working tree, uncommitted changes too
    python benchmarks/same_bytes.py main my-branch --keep outcomes

Both run a tiny line by the command line alone, wherever their modules are, at once and on one thread each.
Prints a line for each file that they wrote, then SAME or DIFFERENT, and exits with 0 or 1. Weights under
another name are the same weights; times, paths and wording are not compared.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from operator import ne
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, uint8

ROOT = Path(__file__).resolve().parent.parent
TRAINING = (
    "--steps 4 --batch-size 4 --set data.workers=0 --set sampling.steps=2 --set decoder.channels=[8,16] "
    "--set decoder.heads=2 --set decoder.middle_layers=1 --set decoder.steps=1 --set reducer.channels=4 "
) + " ".join(
    # One step of warm-up, or the learning rates of so short a run would hardly move a weight.
    f"--set train_{stage}.warmup=1 --set train_{stage}.precision=float32"
    for stage in ("reducer", "sampler", "vae")
)
# The bundled sampler draws as well: four steps of training make no picture that a change would show in.
LINE = f"""
sample bear -n 2 --steps 4 --seed 7 --sampler bundled.safetensors --out bundled
prepare --dataset openmoji --count 96 --shard-size 24 --workers 1
prepare --dataset openmoji --split val --count 24 --workers 1
train-reducer {TRAINING} --set decoder.losses.repa=0.1
prepare --latents reducer.safetensors --out latents
train-sampler --data latents {TRAINING}
sample bear cat -n 2 --steps 3 --solver heun --seed 7 --sampler sampler.safetensors
score --fid --features vlm --images bundled --reference data/openmoji
reconstruct --images data/openmoji --count 4
train-vae {TRAINING} --set vae.widths=[8,8,8,16]
train-reducer {TRAINING} --set reducer.kind=attention --set reducer.hidden=16 --set reducer.heads=2 \
--set decoder.kind=ldm --set decoder.vae=vae --set decoder.denoiser=dit --out latent.safetensors
""".strip().splitlines()
CLOCKS = {"images_per_s", "samples_per_s", "seconds", "data_wait", "memory_gb"}  # differ from run to run


def main() -> None:
    """Run the line at both commits, compare and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="commit, branch or tag")
    parser.add_argument("head", nargs="?", help="another; default: the working tree as it is")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new folder for what both wrote")
    options = parser.parse_args()
    given = [options.base, options.head] if options.head else [options.base]
    commits = [commit_id(name) for name in given]
    names = [f"{name} ({commit[:9]})" for name, commit in zip(given, commits, strict=True)]
    if options.keep and options.keep.exists():
        sys.exit(f"error: --keep {options.keep} is there: what it holds would be taken up; name a new folder")
    with ExitStack() as stack:
        out = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trees = [stack.enter_context(worktree(commit)) for commit in commits]
        if not options.head:
            trees.append(ROOT)
            names.append("the working tree as it is")
        print(f"base: {names[0]}; head: {names[1]}", flush=True)
        with ThreadPoolExecutor() as pool:
            failed = Event()
            list(pool.map(run_line, trees, [out / "base", out / "head"], names, [failed] * 2))
        verdicts = compare(out / "base", out / "head")
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict}")
    same = all(verdict.startswith("SAME") for verdict in verdicts.values())
    print("SAME" if same else "DIFFERENT")
    sys.exit(not same)


def commit_id(name: str) -> str:
    """The full id of a commit of this repository; ends the program where there is none."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", name + "^{commit}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or sys.exit(f"error: there is no commit {name} in {ROOT}")


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A checkout of its own, for as long as the context lasts."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*git, "add", "--quiet", "--detach", f"{folder}/code", commit], check=True)
        try:
            yield Path(folder) / "code"
        finally:
            subprocess.run([*git, "remove", "--force", f"{folder}/code"], check=True)


def run_line(code: Path, out: Path, name: str, failed: Event) -> None:
    """Every command of `LINE` with the package in `code`, in the folder `out`; a failure ends both lines."""
    out.mkdir(parents=True)
    for bundled in (code / "vugen_cli").rglob("sampler.safetensors"):
        shutil.copy(bundled, out / "bundled.safetensors")  # one name for both: pictures say what drew them
    environment = os.environ | {
        "PYTHONPATH": str(code), "VUGEN_CACHE": str(out.resolve() / ".cache"), "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
    }  # fmt: skip
    log = out / ".log"

    def python(*arguments: str) -> str:
        """The last line it printed."""
        with log.open("a") as file:
            command = [sys.executable, *arguments]
            done = subprocess.run(command, cwd=out, env=environment, stdout=file, stderr=file, check=False)
        last = (log.read_text().splitlines() or [""])[-1]
        if done.returncode:
            failed.set()
            sys.exit(f"error: {name}: python {' '.join(arguments)}: {last}")
        return last

    found = python("-c", "import vugen_cli; print(vugen_cli.__file__)")
    if not found.startswith(f"{code}{os.sep}"):  # an installed package would be compared with itself
        failed.set()
        sys.exit(f"error: {name}: python imports {found}, not what is in {code}")
    for line in LINE:
        if not failed.is_set():
            python("-m", "vugen_cli", *line.split())


def compare(base: Path, head: Path) -> dict[str, str]:
    """A verdict on every file of either folder: `SAME, ...`, or `DIFFERENT: ` what and by how much."""
    old, new = outcomes(base), outcomes(head)
    verdicts = {name: "DIFFERENT: only in " + ("base" if name in old else "head") for name in old ^ new}
    verdicts |= {name: KINDS[Path(name).suffix](base / name, head / name) for name in old & new}
    return dict(sorted(verdicts.items()))


def outcomes(folder: Path) -> set[str]:
    """Names of the files to compare, relative to the folder."""
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix in KINDS]
    # Curves are drawn over times too; what starts with a dot is cache, progress and log.
    return {n.as_posix() for n in names if n.name != "curves.png" and not f"/{n.as_posix()}".count("/.")}


def verdict(what: str, differences: list[str]) -> str:
    """One line on a file that holds `what`, with the first few of its differences."""
    more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
    return f"DIFFERENT: {'; '.join(differences[:3])}{more}" if differences else f"SAME, {what}"


def compare_tensors(base: Path, head: Path) -> str:
    """Tensors by name; where the names are not the same, by what is in them."""
    old, new = load_file(base), load_file(head)
    differences = []
    if old.keys() != new.keys():
        lost, added = Counter(map(content, old.values())), Counter(map(content, new.values()))
        if lost == added:
            return f"SAME, {len(new)} tensors, {len(old.keys() - new.keys())} keys renamed"
        counts = (lost - added).total(), (added - lost).total()
        differences.append(f"{counts[0]} of {len(old)} tensors only in base, {counts[1]} only in head")
    for name in sorted(old.keys() & new.keys()):
        a, b = old[name], new[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            differences.append(f"{name} {a.dtype} {tuple(a.shape)} -> {b.dtype} {tuple(b.shape)}")
        elif content(a) != content(b):
            gap = (a.double() - b.double()).abs().max()
            differences.append(f"{name} by up to {gap:.2g}, its largest is {a.double().abs().max():.2g}")
    return verdict(f"{len(new)} tensors", differences)


def content(tensor: Tensor) -> tuple[Any, ...]:
    """Type, shape and bytes."""
    return tensor.dtype, tensor.shape, tensor.reshape(-1).view(uint8).numpy().tobytes()


def compare_numbers(base: Path, head: Path) -> str:
    """Every number of a JSON file, or of one with an object a line, but times; as written, not rounded."""
    old, new = dict(numbers(read_json(base))), dict(numbers(read_json(head)))
    names = sorted(n for n in old.keys() | new.keys() if repr(old.get(n)) != repr(new.get(n)))
    return verdict(f"{len(new)} numbers", [f"{n} {old.get(n)} -> {new.get(n)}" for n in names])


def read_json(path: Path) -> Any:
    """What a `.json` file holds, or the list of what the lines of a `.jsonl` file hold."""
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Where a number is in nested lists and dictionaries, and the number."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if key not in CLOCKS:
                yield from numbers(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, int | float):
        yield name, value


def compare_pictures(base: Path, head: Path) -> str:
    """Pixels, then the file around them, which also holds the prompt."""
    old, new = (np.asarray(Image.open(path)).astype(int) for path in (base, head))
    if old.shape != new.shape:
        return f"DIFFERENT: shape {old.shape} -> {new.shape}"
    if (gap := abs(old - new)).any():
        return f"DIFFERENT: {np.count_nonzero(gap)} of {gap.size} values by up to {gap.max()} of 255"
    same = base.read_bytes() == head.read_bytes()
    return "SAME, pixels and bytes" if same else "DIFFERENT: bytes of the file; its pixels are the same"


def compare_bytes(base: Path, head: Path) -> str:
    """Whole files."""
    old, new = base.read_bytes(), head.read_bytes()
    if old == new:
        return f"SAME, {len(new)} bytes"
    return f"DIFFERENT: {sum(map(ne, old, new))} bytes, {len(old)} -> {len(new)} long"


KINDS = {
    ".safetensors": compare_tensors,
    ".json": compare_numbers,
    ".jsonl": compare_numbers,
    ".png": compare_pictures,
    ".tar": compare_bytes,
}

if __name__ == "__main__":
    main()
