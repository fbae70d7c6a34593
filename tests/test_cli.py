"""The command line as a user meets it: help, errors in one line, nothing half-written."""

import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import save_random_vlm, vugen, vugen_here
from PIL import Image

COMMANDS = [
    "prepare",
    "train-reducer",
    "train-sampler",
    "sample",
    "merge",
    "export",
    "push",
    "serve",
    "score",
    "score prompts",
    "study composition",
    "study understanding",
    "study training",
    "study diversity",
    "reconstruct",
    "compare",
    "chat",
    "train-vlm",
    "train-judge",
    "train-vae",
    "inspect",
    "config",
    "runs",
    "demo",
    "doctor",
]


def fails(*arguments: str | Path, cwd: Path) -> str:
    """The one line a command ends in when it fails."""
    result = vugen_here(*arguments, cwd=cwd)
    assert result.returncode == 1, result.stderr
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.rstrip().endswith(lines[0])
    return lines[0]


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys; from vugen_cli.app import app\ntry: app(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'numpy', 'transformers', 'pydantic', 'PIL', 'yaml'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]")
    assert all(command.split()[0] in result.stdout for command in COMMANDS)


def test_version(tmp_path: Path) -> None:
    assert vugen("--version", cwd=tmp_path).stdout.startswith("vugen 0.")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, tmp_path: Path) -> None:
    result = vugen_here(*command.split(), "--help", cwd=tmp_path)
    assert result.returncode == 0 and f"vugen {command}" in result.stdout
    assert command == "score" or "--json" in result.stdout  # a group's own help ends in its commands


def test_sampling_depends_only_on_seed_prompt_and_number(trained: Path, tmp_path: Path) -> None:
    sampler = trained / "sampler.safetensors"

    def pictures(out: str, *arguments: str) -> dict[str, bytes]:
        result = vugen_here("sample", *arguments, "--sampler", sampler, "--out", out, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return {p.name: np.asarray(Image.open(p)).tobytes() for p in (tmp_path / out).glob("a-*.png")}

    long = "a cat " + "and a very large red car " * 8
    one = pictures("one", "a bear", "-n", "1")
    assert gc.isenabled()
    many = pictures("many", "a bear", "a cat", long, "-n", "11")
    again = pictures("again", "a cat", "a bear", "-n", "3")
    other = pictures("other", "a bear", "--seed", "1")
    assert len(many) == 33 and len(set(many.values())) == 33
    assert pictures("same", "a bear", "-n", "1") == one, "the same command gives the same bytes"
    for part in (one, again):  # products of matrices round by how many are drawn together
        for name, pixels in part.items():
            a, b = (np.frombuffer(p, np.uint8).astype(int) for p in (many[name], pixels))
            assert np.abs(a - b).max() <= 1
    assert other.keys() == one.keys() and other != one


# What `vugen sample` does without; transformers itself imports torchvision, scipy and torch's compiler.
UNNEEDED = {
    *("matplotlib", "diffusers", "open_clip", "timm", "torch_fidelity", "webdataset"),
    *("vugen_cli.data.loader", "vugen_cli.engine.loop", "vugen_cli.stages", "vugen_cli.studies"),
    *("vugen_cli.nano", "vugen_cli.metrics.scores", "vugen_cli.metrics.encoders"),
}


def test_samples_say_how_they_were_made(
    trained: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # what the process imports is looked at too
    arguments = [
        "sample",
        "a bear in a forest",
        "-n",
        "2",
        "--steps",
        "3",
        "--solver",
        "heun",
        "--guidance",
        "1",
    ]
    result = vugen(*arguments, "--sampler", trained / "sampler.safetensors", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines() if "import time:" in line}
    assert "vugen_cli.sampling.draw" in imported and not imported & UNNEEDED
    rows = [json.loads(line) for line in (tmp_path / "samples/samples.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1]
    assert rows[0]["prompt"] == "a bear in a forest" and rows[0]["solver"] == "heun" and rows[0]["steps"] == 3
    assert rows[0]["reference"] == str(scenes)
    with Image.open(tmp_path / "samples" / rows[1]["file"]) as image:
        assert image.size == (64, 64) and image.text["vugen:prompt"] == "a bear in a forest"  # type: ignore[attr-defined]
    assert (tmp_path / "samples/grid.png").exists()


def test_the_newest_sampler_here_is_taken_and_scored_against_its_reference(
    trained: Path, tmp_path: Path
) -> None:
    for stage in ("reducer", "sampler"):
        (tmp_path / f"{stage}.safetensors").write_bytes((trained / f"{stage}.safetensors").read_bytes())
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "prompts.txt").write_text("a bear\n\na cat\n")
    result = vugen_here("sample", "--prompts", "prompts.txt", "-n", "2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "sampler: sampler.safetensors, the newest here" in result.stdout
    result = vugen_here("score", "--fid", "--features", "vlm", cwd=tmp_path)  # the sampler's VLM, not nano
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "scores.json").read_text())
    (score,) = report["scores"]
    card = json.loads(vugen_card(tmp_path / "sampler.safetensors"))
    assert report["vlm_fingerprint"] == card["vlm"]["fingerprint"]
    assert score["metric"] == "frechet_vlm" and score["value"] > 0 and "not FID" in score["name"]
    assert report["images"]["count"] == 4 and report["reference"]["count"] == 24 and score["warning"]


def vugen_card(path: Path) -> str:
    from vugen_cli.checkpoint import read_card

    return read_card(path).model_dump_json()


def test_reconstruct_measures_and_shows(trained: Path, scenes: Path, tmp_path: Path) -> None:
    result = vugen_here(
        "reconstruct",
        "--reducer",
        trained / "reducer.safetensors",
        "--images",
        scenes,
        "--count",
        "10",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "reconstructions/reconstruction.json").read_text())
    assert report["images"]["count"] == 10 and 0 < report["psnr"] < 30 and -1 <= report["ssim"] <= 1
    assert (tmp_path / "reconstructions/reconstruction.png").exists()


def test_inspect_shows_cards_and_manifests(trained: Path, scenes: Path, tmp_path: Path) -> None:
    assert "stage: sampler" in vugen_here("inspect", trained / "sampler.safetensors", cwd=tmp_path).stdout
    assert "CC BY-SA" in vugen_here("inspect", scenes, cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample"], "no prompt"),
        (["sample", ""], "a prompt is empty"),
        (["sample", "  ", "a bear"], "a prompt is empty"),
        (["sample", "a bear", "--prompts", "none.txt"], "none.txt: No such file"),
        (["sample", "a bear", "--sampler", "none.safetensors"], "no checkpoint at none.safetensors"),
        (["sample", "a bear", "--sampler", "{reducer}"], "is a reducer checkpoint, but a sampler is needed"),
        (["sample", "a bear", "--sampler", "{sampler}", "--vlm", "{other}"], "was trained on the VLM"),
        (["sample", "bear " * 5000, "--sampler", "{sampler}"], "too long"),
        (["sample", "a bear", "--sampler", "{sampler}", "--out", "/proc/x"], "cannot write to /proc/x"),
        (["train-reducer", "--data", "nowhere"], "no data set at nowhere"),
        (["train-reducer", "--data", "{scenes}", "--set", "redcer.channels=3"], "did you mean `reducer`"),
        (["train-reducer", "--data", "{scenes}", "--recipe", "none"], "no recipe at none"),
        (["train-reducer", "--data", "{scenes}", "--out", "model.ckpt"], "ends in .safetensors"),
        (["train-reducer", "--data", "{scenes}", "--vlm", "{vlm}", "--device", "cuda"], "no usable GPU"),
        (["train-reducer", "--data", "{scenes}", "--vlm", "{vlm}", "--out", "/proc/x.safetensors"], "/proc"),
        (["train-sampler", "--reducer", "{sampler}"], "is a sampler checkpoint, but a reducer is needed"),
        (["train-sampler", "--reducer", "{truncated}"], "truncated.safetensors"),
        (["reconstruct", "--reducer", "{reducer}", "--images", "nowhere"], "nowhere"),
        (["score", "--fid"], "no samples under"),
        (["score"], "no metric was asked for"),
        (["score", "prompts"], "no metric was asked for"),
        (["score", "--images", "{scenes}", "prompts", "--vqa-score"], "--images stands before prompts"),
        (["score", "--fid", "--images", "nowhere"], "no images at nowhere"),
        (["score", "--is", "--images", "{scenes}", "--features", "resnet"], "--features resnet: give"),
        (["study", "training", "nowhere"], "nowhere holds no kept checkpoints"),
        (["study", "diversity", "--images", "nowhere"], "no images at nowhere"),
        (["study", "composition", "--sampler", "{reducer}"], "is a reducer checkpoint"),
        (["inspect", "nothing"], "no checkpoint at nothing"),
        (["inspect", "{truncated}"], "truncated.safetensors is damaged"),
        (["sample", "a bear", "--device", "meta"], "--device meta"),
        (["export", "{sampler}", "--out", "noted"], "noted/README.md is of something else"),
        (["export", "{sampler}", "--scores", "{manifest}"], "of `vugen score`: format: Extra inputs"),
        (["prepare", "--dataset", "folder", "--source", "noted", "--shapes", ""], "--shapes"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_line(
    arguments: list[str], message: str, trained: Path, scenes: Path, vlm_path: Path, tmp_path: Path
) -> None:
    if "cuda" in arguments and __import__("torch").cuda.is_available():
        pytest.skip("there is a GPU here")
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes((trained / "reducer.safetensors").read_bytes()[:-100])
    names = {name: trained / f"{name}.safetensors" for name in ("reducer", "sampler")}
    names |= {"scenes": scenes, "vlm": vlm_path, "truncated": truncated}
    names["manifest"] = scenes / "dataset.json"
    noted = tmp_path / "noted" / "README.md"
    noted.parent.mkdir()
    noted.write_text("mine")
    Image.new("RGB", (64, 64)).save(noted.with_name("a bear.png"))
    if "{other}" in arguments:
        names["other"] = save_random_vlm(tmp_path / "other", seed=5)
    before = set(tmp_path.rglob("*"))
    line = fails(*(a.format(**names) if "{" in a else a for a in arguments), cwd=tmp_path)
    assert message in line and noted.read_text() == "mine"
    assert not [p for p in set(tmp_path.rglob("*")) - before if p.suffix == ".safetensors"]


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in vugen("inspect", "nothing", "--debug", cwd=tmp_path).stderr


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_result_is_written_whatever_becomes_of_its_table(encoding: str, tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (64, 64), (60 * number, 99, 0)).save(tmp_path / f"{number}.png")
    words = [
        "-m",
        "vugen_cli",
        "score",
        "--fid",
        "--kid",
        "--features",
        "vlm",
        "--images",
        ".",
        "--reference",
        ".",
    ]
    run = subprocess.Popen(
        [sys.executable, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert run.stdout and run.stderr
    if encoding == "utf-8":
        run.stdout.readline()
        run.stdout.close()  # as `| head -1` does
    else:
        assert b"\\u2013" in run.stdout.read(), "a dash, where the value is missing"
    run.wait()
    assert (tmp_path / "scores.json").is_file() and b"UnicodeEncodeError" not in run.stderr.read()


def test_an_unknown_option_is_a_usage_error(tmp_path: Path) -> None:
    assert vugen_here("sample", "--colour", cwd=tmp_path).returncode == 2


def test_a_full_disk_is_one_line_and_leaves_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit to the size of files stands in for a full disk; Python ignores the signal with it."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        arguments = ["sample", "a bear", "--sampler", trained / "sampler.safetensors", "--out", "full"]
        result = vugen_here(*arguments, cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (
        result.returncode == 1 and "cannot write full/" in result.stderr and "Traceback" not in result.stderr
    )
    assert not list((tmp_path / "full").iterdir())
