"""The notebooks of examples/ run, cell by cell, with their training cut to two steps."""

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))


def cells(notebook: Path, kind: str) -> list[str]:
    found = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By exec, since no cell has magics: a kernel would bring two dozen packages for no more."""
    shown: list[Any] = []
    notebook_tools = types.ModuleType("IPython.display")
    vars(notebook_tools).update(display=shown.append, Image=lambda path, **_: Path(path).read_bytes())
    monkeypatch.setitem(sys.modules, "IPython.display", notebook_tools)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    sources = cells(notebook, "code")
    for name, short in {"STEPS": 2, "BATCH": 4, "SCENES": 24, "SCORED": 4, "ODE_STEPS": 2}.items():
        sources[0] = re.sub(rf"^{name} = \d+$", f"{name} = {short}", sources[0], flags=re.MULTILINE)
    assert "STEPS = 2\n" in sources[0] + "\n"
    namespace: dict[str, Any] = {}
    for source in sources:
        exec(compile(source, notebook.name, "exec"), namespace)
    assert all(picture.startswith(b"\x89PNG") for picture in shown)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_a_notebook_is_kept_as_it_was_run_small_and_with_its_pictures(notebook: Path) -> None:
    found = json.loads(notebook.read_text())
    ran = [cell for cell in found["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1))
    outputs = [output for cell in ran for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 2 and notebook.stat().st_size < 400_000
    assert all(len("".join(picture)) < 135_000 for picture in pictures)  # 100 kB, in base64


def test_the_links_of_the_notebooks_lead_somewhere() -> None:
    for notebook in NOTEBOOKS:
        for target in re.findall(r"\]\(([^)#:]+)\)", "\n".join(cells(notebook, "markdown"))):
            assert (notebook.parent / target).exists(), f"{notebook.name}: {target}"
