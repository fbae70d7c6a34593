"""The ways to install: what the package says of itself, and the container's files, fit each other."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PAGE = (ROOT / "docs/install.md").read_text()


def test_the_versions_of_python_are_the_same_everywhere() -> None:
    named = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert named == ["3.11", "3.12", "3.13"] and PROJECT["requires-python"] == f">={named[0]}"
    assert "Python 3.11 to 3.13" in (ROOT / "README.md").read_text() and "3.11, 3.12 or 3.13" in PAGE


def test_the_container_is_given_all_that_the_package_is_built_from() -> None:
    copied = [
        name for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()
    ]
    let_through = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert sorted(copied) == sorted(let_through) and all((ROOT / name).exists() for name in copied)
    links = {file.resolve().relative_to(ROOT).parts[0] for file in (ROOT / "vugen_cli").iterdir()}  # recipes
    built_from = {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "recipes", *links}
    assert built_from <= set(copied)


def test_every_build_argument_and_extra_is_explained() -> None:
    arguments = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
    assert arguments == set(re.findall(r"^\| `(\w+)=", PAGE, re.MULTILINE))
    explained = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`\w+`.*?) \|", PAGE, re.MULTILINE))))
    assert set(PROJECT["optional-dependencies"]) - {"dev", "docs"} <= explained


def test_the_wheel_is_built_and_tried_by_continuous_integration() -> None:
    assert "\n.ci/wheel\n" in (ROOT / ".ci/run").read_text()
    assert (ROOT / ".ci/wheel").stat().st_mode & 0o111
