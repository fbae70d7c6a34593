"""Every import runs down one list of packages, and no two files import each other in a circle.

Imports inside functions count; imports for type checkers do not.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import vugen_cli

ROOT = Path(vugen_cli.__file__).parent
LAYERS = (
    "app",
    "commands",
    "serve",
    "doctor",
    "runs",
    "nano",
    "studies",
    "stages",
    "sampling",
    "metrics",
    "models",
    "vlm",
    "engine",
    "data",
    # one file each, at the top level
    "checkpoint",
    "card",
    "key_map",
    "pictures",
    "recipe",
    "hub",
    "flow",
    "seeds",
    "moments",
    "files",
    "progress",
    "processes",
    "torchvision_repair",
    "errors",
    "version",
)
DOORS = {"__init__", "__main__"}  # the package's own face: it hands names on


def imports(text: str) -> set[str]:
    """The modules that a source text imports when it runs, each with the names it takes: `a`, `a.name`."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(text)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        waiting += ast.iter_child_nodes(node)
    return found


def module_of(path: Path) -> str:
    return ".".join(("vugen_cli", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


FILES = {
    module_of(path): path
    for path in sorted(ROOT.rglob("*.py"))
    if path.parent != ROOT or path.stem not in DOORS
}
GRAPH = {module: imports(path.read_text()) & FILES.keys() - {module} for module, path in FILES.items()}


def layer(module: str) -> int:
    return LAYERS.index(module.split(".")[1])


def runs_up(module: str, imported: set[str]) -> list[str]:
    return [other for other in imported if layer(other) < layer(module)]


def test_every_package_and_file_has_its_place() -> None:
    assert {module.split(".")[1] for module in FILES} == set(LAYERS)


@pytest.mark.parametrize("module", FILES)
def test_imports_run_down(module: str) -> None:
    assert not runs_up(module, GRAPH[module])


def test_no_files_import_each_other() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as circle:
        pytest.fail(f"a circle: {' <- '.join(circle.args[1])}")


def test_an_import_that_runs_up_is_seen_wherever_it_stands() -> None:
    text = "def late():\n    from vugen_cli.stages import distill\n"
    assert "vugen_cli.stages.distill" in runs_up("vugen_cli.models.reducer", imports(text) & FILES.keys())
    assert not imports("if TYPE_CHECKING:\n    import vugen_cli.app\n")
