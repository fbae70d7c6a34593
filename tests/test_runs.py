"""The runs are programs: each is run here whole, by sh, with its training cut short, and a second time."""

import json
import os
import shutil
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from conftest import tiny_overrides
from diffusers import AutoencoderKL
from PIL import Image
from typer.testing import CliRunner

from vugen_cli.app import app
from vugen_cli.checkpoint import read_card

ROOT = Path(__file__).parent.parent / "runs"
RUNS = sorted(ROOT.glob("*.sh"))
SHORT = "--steps 2 --batch-size 4"
# Stands where `vugen` would: hands its words over and ends as it is told. Starting Python and torch for each
# command would take longer than the commands.
DOOR = """#!/bin/sh
{ pwd; printf '%s\\n' "$@"; } > "$CALLS/asked"
exit "$(cat "$CALLS/answer")"
"""


def run(script: Path, folder: Path, **variables: str | Path) -> tuple[list[list[str]], str]:
    """Run a script in a folder by sh; its `vugen` commands run in this process.

    Returns:
        The commands, in order, and what the last of them failed with, if the script ended because of it.
    """
    calls, tools = folder / "calls", folder / "bin"
    for made in (calls, tools):
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
    os.mkfifo(calls / "asked")
    os.mkfifo(calls / "answer")
    (tools / "vugen").write_text(DOOR)
    (tools / "vugen").chmod(0o755)
    given = {name: str(value) for name, value in variables.items()}
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(calls), **given}
    whole = ["sh", "-c", 'sh "$0"; printf "end\\n%s" $? > "$CALLS/asked"', str(script)]
    commands: list[list[str]] = []
    failure, here = "", Path.cwd()
    with subprocess.Popen(whole, cwd=folder, env=environment):
        try:
            while True:
                where, *words = (calls / "asked").read_text().removesuffix("\n").split("\n")
                if where == "end":
                    assert (words == ["0"]) == (not failure), f"{script.name} ended with {words}: {failure}"
                    return commands, failure
                os.chdir(where)
                result = CliRunner().invoke(app, words)
                commands.append(words)
                if result.exit_code:
                    failure = f"vugen {' '.join(words)}: {result.exception!r} {result.output}"
                (calls / "answer").write_text(str(result.exit_code))
        finally:
            os.chdir(here)


def trained(commands: list[list[str]]) -> list[str]:
    """What the training commands wrote."""
    return [words[words.index("--out") + 1] for words in commands if words[0].startswith("train-")]


def settings(*more: str) -> str:
    """EXTRA of a run: two steps, tiny networks."""
    tiny = [each for each in tiny_overrides(Path()) if not each.startswith(("vlm=", "decoder.steps"))]
    return " ".join([SHORT, *(f"--set {each}" for each in (*tiny, "decoder.steps=2", *more))])


def picture(number: int) -> bytes:
    buffer = BytesIO()
    Image.linear_gradient("L").rotate(37 * number).resize((72, 64)).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("script", RUNS, ids=lambda script: script.name)
def test_a_run_is_plain_sh_that_stops_at_the_first_error(script: Path) -> None:
    assert subprocess.run(["sh", "-n", str(script)], check=False).returncode == 0
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/sh" and "set -eu" in lines
    assert max(map(len, lines)) <= 120


def test_a_run_ends_where_a_command_fails(tmp_path: Path) -> None:
    commands, failure = run(ROOT / "nano.sh", tmp_path, COUNT="8", HELD_OUT="0")
    assert [words[0] for words in commands] == ["prepare", "prepare"] and "--count" in failure


@pytest.mark.slow
def test_the_bundled_model_is_made_from_nothing_and_nothing_is_made_twice(tmp_path: Path) -> None:
    tiny_vlm = [f"nano_vlm.{size}" for size in ("vision_width=32", "vision_layers=1", "vision_heads=2")]
    tiny_vlm += [
        f"nano_vlm.{size}" for size in ("width=64", "layers=2", "heads=2", "mlp=128", "vision_steps=1")
    ]
    cut = {"COUNT": "24", "HELD_OUT": "8", "JUDGED": "2", "EXTRA": settings(*tiny_vlm)}
    commands, failure = run(ROOT / "nano.sh", tmp_path, **cut)
    assert not failure
    made = trained(commands)
    stages = [
        "reducer",
        "sampler-1",
        "sampler-2",
        "sampler",
        "decoder",
        "decoder-64",
        "decoder-128",
        "strict",
        "lenient",
    ]
    assert made == ["vlm-1", "vlm-2", "vlm", *(f"{stage}.safetensors" for stage in stages)]
    out = tmp_path / "out/nano"
    assert all((out / name).exists() for name in made) and (out / "samples/grid.png").is_file()
    assert read_card(out / "sampler.safetensors").vlm.name == "vlm"
    again, failure = run(ROOT / "nano.sh", tmp_path, **cut)
    assert not failure and not trained(again) and "study" not in {words[0] for words in again}


@pytest.mark.slow
def test_imagenet_from_a_tar_to_its_distance(tmp_path: Path, vlm_path: Path) -> None:
    for split in ("train", "val"):
        for wnid in ("n01440764", "n01443537"):
            folder = tmp_path / "images" / split / wnid
            folder.mkdir(parents=True)
            for number in range(4):
                (folder / f"{wnid}_{number}.JPEG").write_bytes(picture(number))
    commands, failure = run(
        ROOT / "imagenet-256.sh",
        tmp_path,
        IMAGENET_DIR=tmp_path / "images",
        VLM=vlm_path,
        SIZE="64",
        PER_CLASS="2",
        FEATURES="vlm",
        EXTRA=settings("decoder.image_size=64", "sampling.solver=euler", "decoder.losses.lpips=0"),
    )
    assert not failure
    out = tmp_path / "out/imagenet-256"
    assert (out / "classes.txt").read_text() == "tench\ngoldfish\n"
    assert len(list((out / "samples").glob("*.png"))) == 5  # two of each class, and the grid
    scores = json.loads((out / "scores.json").read_text())["scores"]
    assert [score["metric"] for score in scores] == ["frechet_vlm", "precision_vlm", "recall_vlm"]
    assert [words[0] for words in commands if "train" in words[0]] == ["train-reducer", "train-sampler"]


@pytest.mark.slow
def test_the_papers_comparison_leaves_a_table_for_each_decoder_and_every_figure(
    tmp_path: Path, vlm_path: Path
) -> None:
    for source in ("yfcc100m", "cc12m"):
        (tmp_path / source).mkdir()
        with tarfile.open(tmp_path / source / "00000.tar", "w") as tar:
            for number in range(4):
                for name, content in (("jpg", picture(number)), ("txt", b"a thing")):
                    member = tarfile.TarInfo(f"{number:05d}.{name}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))
    (tmp_path / "mine").mkdir()
    (tmp_path / "coco/val2017").mkdir(parents=True)
    (tmp_path / "coco/annotations").mkdir()
    for number in range(4):
        (tmp_path / f"mine/{number}.jpg").write_bytes(picture(number))
        (tmp_path / f"mine/{number}.txt").write_text("a thing of mine")
        (tmp_path / f"coco/val2017/{number:012d}.jpg").write_bytes(picture(number))
    listing = {
        "images": [{"id": number, "file_name": f"{number:012d}.jpg"} for number in range(4)],
        "annotations": [
            {"image_id": number, "id": number, "caption": f"a thing {number}"} for number in range(4)
        ],
    }
    (tmp_path / "coco/annotations/captions_val2017.json").write_text(json.dumps(listing))
    (tmp_path / "prompts.txt").write_text("a bear\na cat\n")
    torch.manual_seed(0)
    widths = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 2}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**widths, **blocks).save_pretrained(tmp_path / "vae")
    commands, failure = run(
        ROOT / "paper.sh",
        tmp_path,
        YFCC100M=tmp_path / "yfcc100m",
        CC12M=tmp_path / "cc12m",
        THIRD=tmp_path / "mine",
        COCO_DIR=tmp_path / "coco",
        PROMPTS=tmp_path / "prompts.txt",
        VLM=vlm_path,
        VAE=tmp_path / "vae",
        SIZE="64",
        KEEP="1",
        SEEDS="4",
        FEATURES="vlm",
        EXTRA=settings("decoder.image_size=64", "sampling.solver=euler", "decoder.losses.lpips=0"),
    )
    assert not failure
    out = tmp_path / "out/paper"
    for name in ("vugen", "ldm", "baseline"):
        assert json.loads((out / f"coco-{name}.json").read_text())["scores"][0]["metric"] == "frechet_vlm"
    assert trained(commands)[-2:] == ["sampler.safetensors", "baseline-sampler.safetensors"]
    grids = [read_card(out / f"{arm}.safetensors").latents.grid for arm in ("reducer", "baseline")]
    assert grids == [(4, 4), (16, 16)], "the VLM's 8 x 8 and the VAE's 32 x 32 merged alike"
    figures = ("reconstructions/reconstruction.png", "compare.html", "over-training.png")
    assert all((out / figure).is_file() for figure in (*figures, "understanding.json"))
