"""The benchmark for the day a GPU is there goes through all its parts here, tiny, on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_rehearsal_ends_well_and_leaves_a_table(tmp_path: Path) -> None:
    words = ["--rehearse", "--device", "cpu", "--out", str(tmp_path / "t.md")]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu.py", *words],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    table = (tmp_path / "t.md").read_text()
    for part in (
        "reducer of the nano line",
        "sampler of the nano line",
        "drawing 8",
        "expert, 16 image tokens",
    ):
        assert part in table
    assert "losses of six steps in float32 | at most 0.0e+00" in table, "the CPU beside itself"
    assert "FAILED" not in table
