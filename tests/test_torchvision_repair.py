"""The repair makes torchvision importable where its extension does not load, and touches nothing elsewhere.

Each case runs in a process of its own: what is tested is the first import.
"""

import _ctypes
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]

# A shared object that loads, standing in for a torchvision extension that does; None where it is built in.
LOADABLE = getattr(_ctypes, "__file__", None)


def run(code, *path, **environment):
    """Run code in a fresh interpreter with `path` before everything else; return what it prints."""
    env = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(map(str, (*path, PROJECT)))}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fake_torchvision(folder, extension=None):
    """A torchvision that, like the real one, ends in an error where `nms` is not declared as it expects.

    With an extension that loads it declares the operator itself, which fails if someone did so before.
    """
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        textwrap.dedent(
            """
            import torch
            HEALTHY = {healthy}
            if HEALTHY:
                library = torch.library.Library("torchvision", "DEF")
                library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            torch.library.register_fake("torchvision::nms", lambda *arguments: None)
            """
        ).format(healthy=extension is not None)
    )
    if extension is not None:
        shutil.copy(extension, package / "_C.so")
    return folder


@pytest.mark.slow
def test_everything_imports_after_the_repair():
    out = run(
        """
        from vugen_cli.torchvision_repair import repair_torchvision

        first = repair_torchvision()
        assert repair_torchvision() is first
        import open_clip
        import torch
        import torchvision
        from transformers import CLIPImageProcessor
        from transformers.models.clip.image_processing_clip import CLIPImageProcessor as again
        from torchvision.transforms import Compose, Normalize, Resize

        image = torch.rand(1, 3, 16, 16)
        resized = Compose([Resize((8, 8), antialias=True), Normalize([0.5] * 3, [0.5] * 3)])(image)
        assert resized.shape == (1, 3, 8, 8)
        processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
        pixels = processor(images=[(image[0] * 255).byte()], return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 8, 8)
        print("imported")
        """
    )
    assert out == "imported"


def test_a_mismatched_install_is_repaired(tmp_path):
    code = """
        from vugen_cli.torchvision_repair import repair_torchvision

        try:
            import torchvision
        except RuntimeError as error:
            assert "torchvision::nms" in str(error), error
        else:
            raise SystemExit("the fake install is healthy")
        assert repair_torchvision() is True
        import torchvision
        print("imported")
        """
    assert run(code, fake_torchvision(tmp_path)) == "imported"
    # An extension that is there but does not load, as with a CUDA build beside a CPU torch.
    (tmp_path / "torchvision" / "_C.so").write_bytes(b"\x7fELF, but no more")
    assert run(code, tmp_path) == "imported"


@pytest.mark.skipif(
    LOADABLE is None or os.name == "nt", reason="no shared object to stand in for torchvision's"
)
def test_a_healthy_install_is_left_alone(tmp_path):
    code = """
        import torch
        from vugen_cli.torchvision_repair import repair_torchvision

        assert repair_torchvision() is False
        assert not hasattr(torch.ops.torchvision, "nms")
        import torchvision  # would fail if nms were declared twice
        assert torchvision.HEALTHY
        print("imported")
        """
    assert run(code, fake_torchvision(tmp_path, LOADABLE)) == "imported"


def test_an_imported_or_absent_torchvision_is_left_alone(tmp_path):
    code = """
        import importlib.util
        import sys
        from types import ModuleType
        from vugen_cli.torchvision_repair import repair_torchvision

        {setup}
        assert repair_torchvision() is False
        print("torch" in sys.modules)
        """
    # Cheap where there is nothing to do: not even torch is imported.
    assert run(code.format(setup="sys.modules['torchvision'] = ModuleType('torchvision')")) == "False"
    absent = "importlib.util.find_spec = lambda name: None"
    assert run(code.format(setup=absent)) == "False"
