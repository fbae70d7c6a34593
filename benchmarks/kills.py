"""Kills at random times: whether a run of two processes always goes on, and to the same weights.

    python benchmarks/kills.py [--times 20] [--strategies ddp fsdp]

The bundled sampler is trained on, a state saved at every step. Each start is killed (SIGKILL) at a random
time, in turn the whole job and one of its processes, and the same command is given again. Fails where a run
does not go on, has lost more than the state that was being written, ends with other weights than a run that
was never killed, or leaves a file behind.
"""

import argparse
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vugen_cli.engine.state import newest_state
from vugen_cli.files import bundle

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = str(bundle("sampler.safetensors"))


def main() -> None:
    """Train, kill, train on, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        words = f"prepare --dataset openmoji --count 48 --workers 1 --out {data}".split()
        val = f"prepare --dataset openmoji --split val --count 16 --workers 1 --out {data}".split()
        for command in (words, val):
            subprocess.run([sys.executable, "-m", "vugen_cli", *command], check=True, env=environment())
        for strategy in options.strategies:
            hold(strategy, data, Path(folder) / strategy, options.times, options.steps)


def hold(strategy: str, data: Path, folder: Path, times: int, steps: int) -> None:
    """Kill runs of one strategy and say what was seen."""
    folder.mkdir()
    whole, killed = folder / "whole.safetensors", folder / "killed.safetensors"
    finish(strategy, data, whole, steps)
    run, done, finished = killed.with_suffix(".run"), 0, 0
    for kill in range(times):
        job = start(strategy, data, killed, steps)
        while step_of(run) <= done and job.poll() is None and kill % 4:  # every fourth at any time at all
            time.sleep(0.02)
        limit = time.monotonic() + random.uniform(0, 8 if kill % 4 == 0 else 3)
        while time.monotonic() < limit and job.poll() is None:
            time.sleep(0.01)
        halves = len(list(run.glob(".*")))
        if job.poll() is None:
            kill_job(job.pid, all_of_it=kill % 2 == 1)
        status = job.wait()
        now = step_of(run)
        print(
            f"{strategy}: kill {kill + 1} at step {now}, {halves} half-written, status {status}", flush=True
        )
        assert now >= done, f"had reached step {done}"
        done = now
        if status == 0:  # it ended first: once more from the start
            finished += 1
            check(whole, killed)
            subprocess.run(["rm", "-r", str(run), str(killed)], check=True)
            done = 0
    finish(strategy, data, killed, steps)
    check(whole, killed)
    print(f"{strategy}: {times - finished} kills, always went on, same weights, no file left behind")


def finish(strategy: str, data: Path, out: Path, steps: int) -> None:
    """Run to the end, without a kill."""
    said = out.with_suffix(".log")
    status = start(strategy, data, out, steps).wait()
    assert status == 0, said.read_text()[-5000:]


def check(whole: Path, killed: Path) -> None:
    """Same bytes, two states, nothing hidden."""
    assert whole.read_bytes() == killed.read_bytes(), "other weights than those of a run never killed"
    names = [path.name for path in killed.with_suffix(".run").iterdir()]
    assert not [name for name in names if name.startswith(".")], names
    assert sum(name.startswith("state-") for name in names) == 2, names


def start(strategy: str, data: Path, out: Path, steps: int) -> "subprocess.Popen[bytes]":
    """A job in a process group of its own."""
    sets = [
        f"engine.strategy={strategy}",
        "data.workers=0",
        "sampling.steps=1",
        "train_sampler.checkpoint_every=1",
        "train_sampler.preview_every=100000",
        "train_sampler.precision=float32",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "vugen_cli", "train-sampler", "--init", BUNDLED, "--data", str(data)]
    command += ["--out", str(out), "--steps", str(steps), "--batch-size", "2"]
    command += [word for setting in sets for word in ("--set", setting)]
    with open(out.with_suffix(".log"), "wb") as log:
        return subprocess.Popen(command, env=environment(), start_new_session=True, stdout=log, stderr=log)


def environment() -> dict[str, str]:
    """One thread a process, and this tree's package."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def step_of(run: Path) -> int:
    """The step of the newest whole state; 0: there is none."""
    try:
        path = newest_state(run)
    except OSError:  # one was being replaced
        return 0
    return int(path.stem.removeprefix("state-")) if path else 0


def kill_job(launcher: int, all_of_it: bool) -> None:
    """Kill all of a job's processes, or one of the two; torchrun then ends the other."""
    workers = list(map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()))
    for process in [launcher, *workers] if all_of_it or not workers else [random.choice(workers)]:
        os.kill(process, signal.SIGKILL)
    limit = time.monotonic() + 60
    while any(map(lives, workers)):  # a lock goes with its process
        assert time.monotonic() < limit
        time.sleep(0.05)


def lives(process: int) -> bool:
    """Whether a process runs still, and does not only wait to be noticed."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


if __name__ == "__main__":
    main()
