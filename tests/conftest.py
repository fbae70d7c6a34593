"""A tiny VLM on disk and a small data set, made once for the whole suite."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a network
# Two test processes share two cores: a thread each, that does not spin while it waits.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from vugen_cli.sampling.sampler import Sampler

import pytest
import torch

from vugen_cli.app import main
from vugen_cli.card import Card
from vugen_cli.data.writer import write_dataset
from vugen_cli.metrics.report import Record
from vugen_cli.nano.edits import OpenMojiEdits
from vugen_cli.nano.scenes import OpenMojiScenes
from vugen_cli.nano.vlm import build, save_vlm, train_tokenizer
from vugen_cli.recipe import NanoVLM, Recipe, load_recipe
from vugen_cli.vlm.frozen import FrozenVLM, load_vlm

torch.set_num_threads(min(2, torch.get_num_threads()))

TINY = NanoVLM(
    vision_width=32, vision_layers=2, vision_heads=2, width=64, layers=2, heads=2, mlp=128, vocabulary=512
)


# The files that take longest. Each file is run by one of the two test processes: a long one begun last would
# keep its process busy for a minute in which the other has nothing to do.
LONGEST = ("distributed", "training", "plan", "gpu_benchmark", "docs", "families", "runs", "cli", "examples",
           "prepare", "launchers", "nano", "demo")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # or pytest-xdist begins with the files of the most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test, and no command that a test runs, reads or fills the user's cache."""
    os.environ["VUGEN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set: 96 training scenes in four shards and 24 held-out ones."""
    out = tmp_path_factory.mktemp("scenes") / "openmoji"
    write_dataset(OpenMojiScenes(96, "train", 64), out, "train", 64, shard_size=24)
    write_dataset(OpenMojiScenes(24, "val", 64), out, "val", 64)
    return out


@pytest.fixture(scope="session")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared edits of scenes: 40 for training in two shards and 16 held-out ones."""
    out = tmp_path_factory.mktemp("edits") / "openmoji-edits"
    write_dataset(OpenMojiEdits(40), out, "train", 64, shard_size=20)
    write_dataset(OpenMojiEdits(16, "val"), out, "val", 64)
    return out


@pytest.fixture(scope="session")
def vlm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llava of random weights, saved as a Hugging Face directory."""
    return save_random_vlm(tmp_path_factory.mktemp("vlm") / "tiny", seed=0)


def save_random_vlm(path: Path, seed: int) -> Path:
    texts = [caption for i in range(40) for caption in OpenMojiScenes(40)[i].captions]
    torch.manual_seed(seed)
    save_vlm(*build(TINY, 64, train_tokenizer(texts, TINY.vocabulary)), path)
    return path


@pytest.fixture(scope="session")
def vlm(vlm_path: Path) -> FrozenVLM:
    return load_vlm(str(vlm_path))


@pytest.fixture(scope="session")
def tiny_recipe(vlm_path: Path) -> Recipe:
    """A recipe whose every stage takes seconds."""
    return load_recipe(None, tiny_overrides(vlm_path))


def tiny_overrides(vlm_path: Path) -> list[str]:
    stages = ("train_reducer", "train_sampler", "train_vlm")
    return [
        f"vlm={vlm_path}",
        "decoder.channels=[8,16]",
        "decoder.heads=2",
        "decoder.middle_layers=1",
        "decoder.steps=1",
        "reducer.channels=4",
        'instruction="{prompt}"',
        "data.workers=0",
        "sampling.steps=2",
        "train_sampler.optimizer=adamw",  # which may be sharded
        *(
            f"{stage}.{setting}"
            for stage in stages
            for setting in ("steps=4", "batch_size=4", "precision=float32")
        ),
    ]


@pytest.fixture(scope="session")
def trained(scenes: Path, tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `reducer.safetensors` and `sampler.safetensors` of four steps each."""
    from vugen_cli.stages.train_reducer import train_reducer
    from vugen_cli.stages.train_sampler import train_sampler

    out = tmp_path_factory.mktemp("trained")
    device = torch.device("cpu")
    reducer = train_reducer(tiny_recipe, scenes, out / "reducer.safetensors", device)
    train_sampler(tiny_recipe, reducer, scenes, out / "sampler.safetensors", device)
    return out


@pytest.fixture(scope="session")
def lively_sampler(trained: Path) -> "Sampler":
    """The sampler of four steps with a last layer that is far from zero: its pictures show every change."""
    from vugen_cli.sampling.trained import load_sampler

    sampler = load_sampler(trained / "sampler.safetensors")
    torch.manual_seed(0)
    torch.nn.init.normal_(sampler.expert.proj_out.weight, std=0.3)
    return sampler


def written(record: Record) -> dict[str, Any]:
    """A report, or another record, as its JSON file holds it."""
    read: dict[str, Any] = json.loads(json.dumps(record.written()))
    return read


def vugen(*arguments: str | Path, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "vugen_cli", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def vugen_here(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line as `vugen` does, in this process: what it imports is imported once."""
    said, errors, status = io.StringIO(), io.StringIO(), 0
    before, words = Path.cwd(), sys.argv
    os.chdir(cwd)
    sys.argv = ["vugen", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            main()
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        os.chdir(before)
        sys.argv = words
    return subprocess.CompletedProcess(["vugen"], status, said.getvalue(), errors.getvalue())


def make_card(stage: str = "reducer", **changes: Any) -> Card:
    """A card such as a small run writes, for tests that need just some of it."""
    return Card.model_validate(
        {
            "stage": stage,
            "step": 4,
            "recipe": {},
            "vlm": {"name": "vlm", "fingerprint": "0" * 64},
            "data": {"path": "data", "dataset": "folder", "size": 64, "counts": {"train": 8}},
            "latents": {"channels": 4, "grid": [8, 8], "width": 32},
            "image_size": 64,
            **changes,
        }
    )
