"""The job files as Slurm runs them: warned, saved, queued again, gone on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import tiny_overrides
from test_training import metrics, wait_for

JOBS = sorted((Path(__file__).parent.parent / "recipes/slurm").glob("*.sbatch"))


def play_slurm(folder: Path, job: Path, torchrun: str) -> "subprocess.Popen[str]":
    """Start a job file with stand-ins for the commands of Slurm, and for torchrun with its eight GPUs."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    scripts = {
        "srun": '#!/bin/sh\nexec "$@"\n',
        "scontrol": f'#!/bin/sh\n[ "$1" = show ] && echo node1 || echo "$@" >> {folder}/scontrol\n',
        "torchrun": f"#!/bin/sh\necho $$ > {folder}/launcher\n{torchrun}\n",
    }
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "vugen", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "n"}
    log = open(folder / "vugen-7.log", "a")  # noqa: SIM115 - as `--open-mode=append` has it
    return subprocess.Popen(
        ["bash", str(job)], cwd=folder, stdout=log, stderr=log, text=True,
        env={**os.environ, **slurm, "PATH": f"{tools}:{os.environ['PATH']}"},
    )  # fmt: skip


@pytest.mark.skipif(not shutil.which("bash"), reason="job files are for bash")
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_a_job_that_fails_after_one_that_was_stopped_is_not_queued_again(job: Path, tmp_path: Path) -> None:
    (tmp_path / "vugen-7.log").write_text("error: stopped at step 3 of 9; run the same command again\n")
    assert play_slurm(tmp_path, job, "echo error: the loss is not finite\nexit 1").wait(timeout=20) == 1
    assert not (tmp_path / "scontrol").exists()
    assert play_slurm(tmp_path, job, "echo error: stopped at step 4 of 9\nexit 1").wait(timeout=20) == 1
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"


@pytest.mark.skipif(not shutil.which("bash"), reason="job files are for bash")
def test_a_warned_job_saves_is_queued_again_and_goes_on(scenes: Path, vlm_path: Path, tmp_path: Path) -> None:
    run = tmp_path / "r.run"
    small = ["--data", str(scenes), "--out", "r.safetensors", "--batch-size", "8"]
    small += [word for override in tiny_overrides(vlm_path) for word in ("--set", f"'{override}'")]
    launcher = f"exec {sys.executable} -m torch.distributed.run --standalone --nproc-per-node 1"
    training = f"{launcher} -m vugen_cli train-reducer {' '.join(small)} --steps"
    job = play_slurm(tmp_path, JOBS[-1], f"{training} 100000")
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) > 2, job)
    torchrun = int((tmp_path / "launcher").read_text())
    os.kill(torchrun, signal.SIGUSR1)
    time.sleep(0.1)
    os.kill(torchrun, signal.SIGUSR1)  # Slurm repeats itself
    assert job.wait(timeout=90) != 0
    log = (tmp_path / "vugen-7.log").read_text()
    assert log.count("stopped at step") == 1, log[-2000:]
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    done = len(metrics(run))
    assert [p.name for p in run.glob("state-*")] == [f"state-{done:07d}.safetensors"]
    (tmp_path / "scontrol").unlink()
    plain = training.replace(launcher, f"exec {sys.executable}")  # without torchrun, which takes seconds
    again = play_slurm(tmp_path, JOBS[-1], f"{plain} {done + 2}")
    assert again.wait(timeout=120) == 0, (tmp_path / "vugen-7.log").read_text()[-2000:]
    assert [row["step"] for row in metrics(run)] == list(range(done + 2))
    assert not (tmp_path / "scontrol").exists(), "a job that has ended is not queued again"


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_a_mistake_in_the_command_is_not_tried_again(job: Path, tmp_path: Path) -> None:
    assert play_slurm(tmp_path, job, "echo error: no such data set; exit 1").wait(timeout=90) == 1
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_the_warning_comes_before_the_launcher_loses_patience(job: Path) -> None:
    text = job.read_text()
    ahead = int(text.split("--signal=USR1@")[1].split()[0])
    patience = int(text.split("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=")[1].split()[0])
    assert 120 <= patience < ahead and "SIGUSR1" in text
