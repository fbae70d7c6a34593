"""Jobs of two processes under torchrun: the same results as one, one voice, and a way back from a loss."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, tiny_overrides
from test_training import metrics, wait_for

from vugen_cli import processes
from vugen_cli.checkpoint import load_checkpoint, load_tensors
from vugen_cli.engine.sharded_state import Stored
from vugen_cli.seeds import BatchGenerator, random_rows

LAST = "state-0000006*"
PARTS = ["00001-of-00002.safetensors", "00002-of-00002.safetensors"]
# Every command in one job: starting two processes takes longer than all that they do here.
SCRIPT = """
import json
import shutil
import sys
from vugen_cli.app import app, main
from vugen_cli.errors import VugenError
from vugen_cli.processes import barrier, rank


def run():
    for words in json.loads(open(sys.argv[1]).read()):
        if words[0] != "copy":
            app(words, standalone_mode=False)
        elif rank() == 0:
            shutil.copytree(words[1], words[2], ignore=shutil.ignore_patterns(words[3]))
        barrier("command ended")  # the next one may read what the first process writes last

    # One process fails where the other waits for it.
    import vugen_cli.stages.train_reducer as stage
    if rank() == 1:
        def fail(*_):
            raise VugenError("only the second process knows why")
        stage.training_batches = fail
    sys.argv = ["vugen", *json.loads(open(sys.argv[2]).read())]
    main()


if __name__ == "__main__":  # decoding processes import it
    run()
"""


def torchrun(*words: str | Path, cwd: Path, restarts: int = 0) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, "--max-restarts", str(restarts), *map(str, words)],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def sets(vlm_path: Path, *more: str) -> list[str]:
    overrides = [*tiny_overrides(vlm_path), *more]
    return [word for override in overrides for word in ("--set", override)]


@pytest.fixture(scope="module")
def commands(scenes: Path, vlm_path: Path, trained: Path) -> list[list[str]]:
    """The line of commands, run by one process and by two."""
    small = ["--data", str(scenes), "--steps", "6", "--batch-size", "8"]
    sizes = [f"nano_vlm.{name}={value}" for name, value in {**TINY.model_dump(), "vision_steps": 2}.items()]
    wide = ["engine.strategy=fsdp", "engine.shard_vlm=true", "engine.recompute=true", "engine.accumulate=2"]
    wide += ["engine.compile=true", "engine.offload=true"]
    wide += ["train_sampler.repa=0.5", "train_sampler.opposites=1"]
    often, fsdp = "train_sampler.checkpoint_every=3", "engine.strategy=fsdp"
    half = ["engine.strategy=fsdp", "train_sampler.precision=bfloat16"]
    vlm = ["--features", f"vlm:{vlm_path}", "--batch-size", "8"]
    score = ["score", *vlm, "--no-cache"]
    cached = ["score", "--fid", *vlm]
    brief = ["--steps", "3", "--batch-size", "8", "--set", "data.workers=0"]
    brief += ["--set", "train_sampler.precision=float32"]
    mixture = [f"data.mixture=[{{path: {scenes}, weight: 2}}, {{path: drawn}}]"]
    tar, other = str(scenes / "train-000000.tar"), str(scenes / "train-000001.tar")
    reducer, sampler = "reducer.safetensors", "s.safetensors"
    further = ["train-sampler", "--init", sampler, *brief, "--set", fsdp]
    return [
        ["prepare", "--dataset", "openmoji", "--count", "12", "--shard-size", "5", "--out", "drawn"],
        ["train-vlm", *small, "--out", "vlm", *sets(vlm_path, *sizes)],
        ["train-reducer", *words(scenes, vlm_path, Path("reducer.safetensors"))],
        ["train-sampler", *small, "--out", "s.safetensors", *sets(vlm_path, often)],
        ["train-sampler", *small, "--out", "f.safetensors", *sets(vlm_path, *wide)],
        ["train-sampler", *small, "--out", "h.safetensors", *sets(vlm_path, *half)],
        ["train-sampler", *small, "--out", "a.safetensors", *sets(vlm_path, often, fsdp)],
        ["copy", "a.run", "b.run", LAST],
        ["train-sampler", *small, "--out", "b.safetensors", *sets(vlm_path, often, fsdp)],
        ["copy", "s.run", "d.run", LAST],
        ["train-sampler", *small, "--out", "d.safetensors", *sets(vlm_path, often, fsdp)],
        ["sample", "a bear", "two cats", "a tree", "-n", "2", "--sampler", "s.safetensors"],
        ["prepare", "--latents", reducer, "--data", str(scenes), "--out", "latents"],
        [*further, "--data", "latents", "--out", "c.safetensors"],
        [*further, "--adapter", "4", "--data", str(scenes), "--out", "k.safetensors"],
        ["train-reducer", "--out", "m.safetensors", *brief, *sets(vlm_path, *mixture)],
        ["inspect", "s.safetensors"],
        # The same weights for one and for two, which train theirs to other last bits.
        ["reconstruct", "--reducer", str(trained / reducer), "--images", str(scenes), "--count", "20",
         "--out", "rec"],
        [*score, "--fid", "--kid", "--pr", "--images", tar, "--reference", str(scenes), "--out", "sets.json"],
        [*cached, "--images", tar, "--reference", str(scenes), "--out", "first.json"],
        [*cached, "--images", tar, "--reference", str(scenes), "--out", "cached.json"],
        ["score", "--psnr", "--images", tar, "--reference", other, "--out", "pairs.json"],
        ["score", "prompts", "--vqa-score", "--images", tar, "--vlm", "nano", "--count", "9",
         "--out", "prompts.json"],
        ["study", "diversity", *vlm, "--images", "samples", "--out", "diversity.json"],
        ["study", "composition", "--sampler", sampler, "--count", "2", "--out", "composition.json"],
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(commands: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vugen_cli.app import app

    folder = tmp_path_factory.mktemp("alone")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for words in commands:
            # a, b and d are about states of two processes: no test looks at those of one.
            if words[0] != "copy" and not {"a.safetensors", "b.safetensors", "d.safetensors"} & {*words}:
                app(words, standalone_mode=False)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def together(
    commands: list[list[str]], tmp_path_factory: pytest.TempPathFactory, alone: Path
) -> tuple[Path, str, str, int]:
    """The folder that two processes left, what they said, and how it ended."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "script.py").write_text(SCRIPT)
    (folder / "commands.json").write_text(json.dumps(commands))
    failing = [word.replace("reducer.safetensors", "x.safetensors") for word in commands[2]]
    (folder / "failing.json").write_text(json.dumps(failing))
    job = torchrun("script.py", "commands.json", "failing.json", cwd=folder)
    said, errors = job.communicate(timeout=240)
    return folder, said, errors, job.returncode


@pytest.mark.parametrize("stage", ["vlm", "reducer", "s", "f"])
def test_losses_do_not_depend_on_the_number_of_processes_or_the_strategy(
    alone: Path, together: tuple[Path, str, str, int], stage: str
) -> None:
    one, two = metrics(alone / f"{stage}.run"), metrics(together[0] / f"{stage}.run")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_latent_cache_and_a_mixture_are_shared_out_too(
    alone: Path, together: tuple[Path, str, str, int]
) -> None:
    one, two = (json.loads((f / "latents/dataset.json").read_text()) for f in (alone, together[0]))
    counts = [[s["samples"] for s in manifest["splits"]["train"]["shards"]] for manifest in (one, two)]
    assert counts[0] == counts[1] and sum(counts[0]) == 96
    for stage in ("c", "m"):
        losses = [[row["loss"] for row in metrics(f / f"{stage}.run")] for f in (alone, together[0])]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 3


def test_an_adapter_beside_shared_out_weights_is_the_one_of_a_single_process(
    alone: Path, together: tuple[Path, str, str, int]
) -> None:
    one, two = (load_tensors(folder / "k.safetensors") for folder in (alone, together[0]))
    assert list(one) == list(two) and all(".lora_" in name for name in one)
    assert all(torch.allclose(one[k], two[k], atol=1e-3) for k in one)


def test_sharded_layers_gathered_in_bfloat16_train_and_draw(
    alone: Path, together: tuple[Path, str, str, int]
) -> None:
    one, two = metrics(alone / "h.run"), metrics(together[0] / "h.run")
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=0.02)
    assert (together[0] / "h.run" / "preview-0000006.png").is_file()


def test_sharded_and_whole_runs_leave_the_same_files(
    alone: Path, together: tuple[Path, str, str, int]
) -> None:
    for name in ("s.safetensors", "f.safetensors"):
        (one, card), (two, other) = (load_checkpoint(folder / name) for folder in (alone, together[0]))
        assert card == other
        assert list(one) == list(two)
        assert all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)
    whole = Stored(alone / "f.run" / "state-0000006.safetensors")
    shared = Stored(together[0] / "f.run" / "state-0000006")
    assert whole.card == shared.card and whole.shapes == shared.shapes
    for name in whole.shapes:
        assert torch.allclose(whole.read(name), shared.read(name), atol=1e-4)


def test_a_sharded_run_goes_on_to_the_same_bytes(together: tuple[Path, str, str, int]) -> None:
    straight, again = (together[0] / run / "state-0000006" for run in ("a.run", "b.run"))
    assert sorted(path.name for path in straight.iterdir()) == [*PARTS, "card.json"]
    for part in PARTS:
        assert (straight / part).read_bytes() == (again / part).read_bytes()
    assert [row["step"] for row in metrics(together[0] / "b.run")] == list(range(6))


def test_a_run_goes_on_sharded_whole_or_in_one_process(
    scenes: Path, vlm_path: Path, tmp_path: Path, alone: Path, together: tuple[Path, str, str, int]
) -> None:
    from vugen_cli.app import app

    shutil.copytree(together[0] / "a.run", tmp_path / "a.run", ignore=shutil.ignore_patterns(LAST))
    command = ["train-sampler", "--data", str(scenes), "--steps", "6", "--batch-size", "8"]
    command += ["--reducer", str(together[0] / "reducer.safetensors")]
    command += ["--out", str(tmp_path / "a.safetensors")]
    app([*command, *sets(vlm_path, "train_sampler.checkpoint_every=3")], standalone_mode=False)
    expected = [row["loss"] for row in metrics(alone / "s.run")]
    states = sorted(path.name for path in (together[0] / "d.run").glob("state-*"))
    assert states == ["state-0000003.safetensors", "state-0000006"]
    for run in (together[0] / "d.run", tmp_path / "a.run"):  # ddp -> fsdp, and fsdp -> one process
        assert [row["loss"] for row in metrics(run)] == pytest.approx(expected, abs=1e-5)


def test_shards_and_pictures_do_not_depend_on_the_number_of_processes(
    alone: Path, together: tuple[Path, str, str, int]
) -> None:
    for name in ("drawn/dataset.json", *(f"drawn/train-{i:06d}.tar" for i in range(3))):
        assert (alone / name).read_bytes() == (together[0] / name).read_bytes()
    rows = [(p / "samples/samples.jsonl").read_text().splitlines() for p in (alone, together[0])]
    assert rows[0] == rows[1] and len(rows[0]) == 6
    assert all((together[0] / "samples" / json.loads(row)["file"]).is_file() for row in rows[1])


def test_scores_do_not_depend_on_the_number_of_processes(
    alone: Path, together: tuple[Path, str, str, int]
) -> None:
    assert json.loads((together[0] / "cached.json").read_text())["images"]["cached"]
    for name in ("sets.json", "cached.json", "pairs.json", "prompts.json", "composition.json"):
        one, two = (json.loads((folder / name).read_text()) for folder in (alone, together[0]))
        assert len(one["scores"]) == len(two["scores"]) > 0
        for a, b in zip(one["scores"], two["scores"], strict=True):
            assert a["name"] == b["name"] and (a["value"] is None) == (b["value"] is None)
            assert a["value"] is None or a["value"] == pytest.approx(b["value"], rel=1e-9)
        assert one["images"] == two["images"] and one.get("reference") == two.get("reference")
    assert json.loads((together[0] / "diversity.json").read_text())["images"]["count"] == 6
    one, two = (
        json.loads((folder / "rec/reconstruction.json").read_text()) for folder in (alone, together[0])
    )
    assert one["images"] == two["images"] and one["images"]["count"] == 20
    for key in ("psnr", "ssim", "frechet"):
        assert one[key] == pytest.approx(two[key], rel=1e-9)
    pictures = [(folder / "rec/reconstruction.png").read_bytes() for folder in (alone, together[0])]
    assert pictures[0] == pictures[1]


def test_only_the_first_process_speaks_and_a_failure_of_one_is_told_once(
    together: tuple[Path, str, str, int],
) -> None:
    _, said, errors, status = together
    assert said.count("wrote reducer.safetensors") == said.count("drawn: train, 12 images") == 1
    lines = [line for line in errors.splitlines() if "error: " in line and "exitcode" not in line]
    assert status != 0
    assert lines == ["error: only the second process knows why"], errors[-3000:]


def test_a_lost_process_is_replaced_and_the_job_ends_with_the_same_weights(
    scenes: Path, vlm_path: Path, tmp_path: Path, together: tuple[Path, str, str, int]
) -> None:
    run = tmp_path / "lost.run"
    job = reducer_job(scenes, vlm_path, tmp_path / "lost.safetensors", cwd=tmp_path, restarts=1)
    wait_for(lambda: len(list(run.glob("state-*.safetensors"))), job)
    os.kill(worker(job.pid, 1), signal.SIGKILL)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    last = "state-0000006.safetensors"
    assert (run / last).read_bytes() == (together[0] / "reducer.run" / last).read_bytes()
    assert [row["step"] for row in metrics(run)] == list(range(6))


def test_sigterm_stops_all_processes_at_one_step_and_one_process_goes_on(
    scenes: Path, vlm_path: Path, tmp_path: Path
) -> None:
    run = tmp_path / "r.run"
    job = reducer_job(scenes, vlm_path, tmp_path / "r.safetensors", cwd=tmp_path, steps=100_000)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) > 2, job)
    job.terminate()
    _, errors = job.communicate(timeout=60)
    assert job.returncode != 0
    assert errors.count("run the same command again to go on") == 1
    done = len(metrics(run))
    assert sorted(run.glob("state-*"))[-1].name == f"state-{done:07d}.safetensors"

    from vugen_cli.app import app

    again = words(scenes, vlm_path, tmp_path / "r.safetensors", done + 2)
    app(["train-reducer", *again], standalone_mode=False)
    assert [row["step"] for row in metrics(run)] == list(range(done + 2))


def words(scenes: Path, vlm_path: Path, out: Path, steps: int = 6) -> list[str]:
    """The options of a short run of stage 1 that saves its state often."""
    small = ["--data", str(scenes), "--out", str(out), "--steps", str(steps), "--batch-size", "8"]
    return [*small, *sets(vlm_path, "train_reducer.checkpoint_every=2")]


def reducer_job(
    scenes: Path, vlm_path: Path, out: Path, cwd: Path, steps: int = 6, restarts: int = 0
) -> "subprocess.Popen[str]":
    command = ["-m", "vugen_cli", "train-reducer", *words(scenes, vlm_path, out, steps)]
    return torchrun(*command, cwd=cwd, restarts=restarts)


def worker(launcher: int, number: int) -> int:
    """The process id of one of torchrun's workers."""
    limit = time.monotonic() + 30
    while time.monotonic() < limit:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                environment = (folder / "environ").read_bytes().split(b"\0")
            except (OSError, ValueError, IndexError):
                continue
            if parent == launcher and f"RANK={number}".encode() in environment:
                return int(folder.name)
        time.sleep(0.1)
    raise AssertionError("torchrun has no such worker")


@pytest.mark.parametrize(
    ("ask", "collective"),
    [(processes.broadcast, "broadcast_object_list"), (processes.gather, "gather_object")],
)
def test_who_waits_for_hours_waits_outside_of_a_collective_which_would_give_up(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[int], Any], collective: str
) -> None:
    done: list[str] = []
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "barrier", lambda what: done.append("barrier"))
    monkeypatch.setattr(torch.distributed, collective, lambda *_, **__: done.append("collective"))
    ask(7)
    assert done == ["barrier", "collective"]


def test_rows_meet_the_same_numbers_however_the_batch_is_shared_out() -> None:
    whole = random_rows(torch.randn, (12, 3), torch.Generator().manual_seed(7))
    parts = []
    for begin in range(0, 12, 4):
        generator = BatchGenerator("cpu")
        generator.size, generator.rows = 12, slice(begin, begin + 4)
        generator.manual_seed(7)
        parts.append(random_rows(torch.randn, (4, 3), generator))
    assert torch.equal(whole, torch.cat(parts))
    # Nothing of the other processes' rows is kept.
    assert all(part.untyped_storage().nbytes() == part.numel() * part.element_size() for part in parts)
