"""The sanity suite of the docs holds with any encoder, and says so by its exit status."""

import subprocess
import sys
from pathlib import Path

SUITE = Path(__file__).parent.parent / "benchmarks" / "score_sanity.py"


def test_distances_rise_with_damage_and_are_zero_without(tmp_path, vlm_path, scenes):
    command = [sys.executable, SUITE, "--features", f"vlm:{vlm_path}", "--images", scenes, "--count", "24"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, (result.stdout, result.stderr)
    assert result.stdout.count(" ok") == 14 and "WRONG" not in result.stdout
    assert not list(tmp_path.iterdir())
