"""Every command shown in the README and in docs/ runs."""

import importlib
import os
import re
import shlex
import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import pytest
from conftest import tiny_overrides
from PIL import Image
from test_layers import LAYERS
from typer.testing import CliRunner

import vugen_cli
from vugen_cli.app import app
from vugen_cli.version import __version__

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = {  # what makes a documented command finish in seconds; everything else runs as it is written
    "prepare": ["--count", "40", "--workers", "1"],
    "train-reducer": ["--steps", "2", "--batch-size", "4", "--set", "data.workers=0"],
    "train-sampler": [
        "--steps",
        "2",
        "--batch-size",
        "4",
        "--set",
        "data.workers=0",
        "--set",
        "sampling.steps=2",
    ],
    "train-vlm": ["--steps", "2", "--batch-size", "4"],
    "train-judge": ["--steps", "2", "--batch-size", "4"],
    "sample": ["--steps", "2"],  # where the bundled sampler draws
    "reconstruct": ["--count", "8"],
}


def commands(page: Path) -> list[list[str]]:
    """The `vugen` commands of a page's shell blocks, in order."""
    found = []
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "vugen":
                found.append(words[1:])
    return found


def jpeg(seed: int) -> bytes:
    buffer = BytesIO()
    Image.linear_gradient("L").rotate(37 * seed).resize((96, 80)).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def workplace(tmp_path: Path, vlm_path: Path) -> Path:
    """The inputs that the pages speak of: an ImageNet tar, COCO, a folder of photos, a VLM."""
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in ("n01440764", "n01443537"):
            inner = BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i in range(4):
                    member = tarfile.TarInfo(f"{wnid}_{i}.JPEG")
                    member.size = len(jpeg(i))
                    tar.addfile(member, BytesIO(jpeg(i)))
            entry = tarfile.TarInfo(f"{wnid}.tar")
            entry.size = len(inner.getvalue())
            outer.addfile(entry, BytesIO(inner.getvalue()))
    (tmp_path / "coco/train2017").mkdir(parents=True)
    (tmp_path / "coco/annotations").mkdir()
    (tmp_path / "photos/cats").mkdir(parents=True)
    for i in range(6):
        (tmp_path / f"coco/train2017/{i:012d}.jpg").write_bytes(jpeg(i))
        (tmp_path / f"photos/cats/{i}.jpg").write_bytes(jpeg(i))
    captions = ", ".join(f'{{"image_id": {i}, "id": {i}, "caption": "a thing {i}"}}' for i in range(6))
    images = ", ".join(f'{{"id": {i}, "file_name": "{i:012d}.jpg"}}' for i in range(6))
    (tmp_path / "coco/annotations/captions_train2017.json").write_text(
        f'{{"images": [{images}], "annotations": [{captions}]}}'
    )
    shutil.copytree(vlm_path, tmp_path / "my-vlm")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_runs_in_order(
    page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = commands(page)
    if not shown:
        pytest.skip("this page shows no command")
    monkeypatch.chdir(workplace)
    for words in shown:
        small = (
            [p for o in tiny_overrides(workplace / "my-vlm")[1:] for p in ("--set", o)]
            if "train" in words[0]
            else []
        )
        # In this process: starting one for each command would take longer than the commands.
        result = CliRunner().invoke(app, [*words, *SHORT.get(words[0], []), *small])
        assert result.exit_code == 0, f"vugen {' '.join(words)}\n{result.exception!r}"


def test_the_two_setup_commands_are_one_line_each() -> None:
    text = (ROOT / "README.md").read_text()
    for name, last in (("demo", ".venv/bin/vugen demo"), ("test", ".venv/bin/python -m pytest")):
        block = re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)```", text, re.DOTALL)
        assert block
        (line,) = block.group(1).strip().splitlines()
        assert line.startswith("python3 -m venv") and line.endswith(last)
    ci = (ROOT / ".ci/run").read_text().splitlines()
    install, tests = ci.index(line.removesuffix(f" && {last}")), ci.index(line)
    checks = [ci.index(f".venv/bin/{check}") for check in ("ruff format --check .", "ruff check .", "mypy")]
    assert install < min(checks) and max(checks) < ci.index(".venv/bin/mkdocs build --strict --quiet") < tests


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            place = page.parent / target
            assert place.exists(), f"{page.name}: {target}"
            # The site holds docs/ alone: files elsewhere are named there, not linked.
            assert page.parent == ROOT or place.resolve().is_relative_to(ROOT / "docs"), (
                f"{page.name}: {target}"
            )
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_files_that_the_pages_name_are_there() -> None:
    for page in PAGES:
        for name in re.findall(r"`([\w/.-]+/[\w.-]+\.(?:py|sh|yaml|md))`", page.read_text()):
            assert (ROOT / name).exists() or (ROOT / "vugen_cli" / name).exists(), f"{page.name}: {name}"


def test_every_change_says_whether_bytes_change_and_versions_agree() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    entries = re.split(r"\n(?=- \*\*)", text.partition("\n## ")[2].partition("\n## ")[0])[1:]
    assert entries
    for entry in entries:
        assert re.search(r"Bytes change: (no|yes, \w+)", " ".join(entry.split())), entry
    assert f"\n## {__version__}" in text
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_packages_face_lists_every_package_in_the_order_of_imports() -> None:
    listed = re.findall(r"^    (?:app, )?(\w+)  ", vugen_cli.__doc__ or "", re.MULTILINE)
    packages = [name for name in LAYERS if (ROOT / "vugen_cli" / name).is_dir()]
    assert listed == packages
    assert sorted(vugen_cli.__all__) == vugen_cli.__all__
    assert all(getattr(vugen_cli, name) for name in vugen_cli.__all__)


def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), {})
    assert (tmp_path / "bear.png").is_file() and (tmp_path / "drawn/grid.png").is_file()


def test_every_equation_names_a_function_that_is_there() -> None:
    rows = re.findall(
        r"^\| .* \| `([\w/]+\.py)` (`.*`) \|$", (ROOT / "docs/method.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 15
    for file, names in rows:
        module = importlib.import_module("vugen_cli." + file.removesuffix(".py").replace("/", "."))
        for name in re.findall(r"`([\w.]+)`", names):
            found = module
            for part in name.split("."):
                found = getattr(found, part)
            assert callable(found)
