"""Let torchvision import beside a torch it was not built for.

A CPU-only torch with a CUDA build of torchvision (or any other pair whose compiled parts do not fit) cannot
load torchvision's extension. torchvision forgives that itself, but then registers shape functions for two
operators that only the extension declares, so `import torchvision` fails with "operator torchvision::nms does
not exist" and takes transformers' image processors, open_clip and timm down with it. Declaring the two
operators first is enough: resizing, normalising and the models work, the compiled operators (nms, roi_align,
...) stay unavailable.
"""

import functools
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: Any = None  # torch drops the declarations when the Library object is collected


@functools.cache
def repair_torchvision() -> bool:
    """Make the first `import torchvision` succeed where its compiled extension does not fit torch.

    Call it before anything imports torchvision (transformers, open_clip, timm and torch-fidelity do). It does
    nothing if torchvision is not installed, is already imported, or loads its extension: on a healthy install
    it only loads the library that `import torchvision` loads next. Calls after the first cost nothing.

    Returns:
        True if the operators were declared here, False if there was nothing to repair.
    """
    global _library
    if "torchvision" in sys.modules:
        return False
    package = importlib.util.find_spec("torchvision")
    if package is None or package.origin is None:
        return False

    import torch

    if hasattr(torch.ops.torchvision, "nms") or _extension_loads(Path(package.origin).parent):
        return False
    _library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        _library.define(schema)
    return True


def _extension_loads(package_dir: Path) -> bool:
    """Whether torchvision's compiled `_C` loads; it is found and loaded as `torchvision.extension` does."""
    import torch

    loader = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    spec = importlib.machinery.FileFinder(str(package_dir), loader).find_spec("_C")
    if spec is None or spec.origin is None:
        return False
    try:
        torch.ops.load_library(spec.origin)
    except OSError:
        return False
    return True
