"""Loss curves of a run as a picture."""

import json
import time
from pathlib import Path

import numpy as np

from vugen_cli.files import whole_file

FIRST = 15.0  # seconds after which a run has curves to look at
EVERY = 60.0
SHARE = 0.02  # of a run's time that its curves may take
POINTS = 20_000  # about as many steps are drawn: of a longer log every second, every third, ...


class LiveCurves:
    """The curves of a run that goes on: plotted anew every minute, less often where that takes long.

    Args:
        run: its folder.
    """

    def __init__(self, run: Path):
        self.run = run
        self.next = time.perf_counter() + FIRST

    def update(self, at_once: bool = False) -> bool:
        """Plot them if it is time to, or at once; whether that was done."""
        begun = time.perf_counter()
        if begun < self.next and not at_once:
            return False
        plot_curves(self.run)
        now = time.perf_counter()
        self.next = now + max(EVERY, (now - begun) / SHARE)
        return True


def plot_curves(run: Path) -> None:
    """Plot every loss that a run has logged against the step, raw and smoothed, into its `curves.png`.

    Where it has logged nothing yet, nothing is written.

    Args:
        run: its folder, with a `metrics.jsonl`.
    """
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines[:: 1 + len(lines) // POINTS]]
    if not log:
        return
    from matplotlib.figure import Figure

    hidden = {"step", "corrupt", "captions_cut", "data_wait", "memory_gb"}
    names = [k for k in dict.fromkeys(k for row in log for k in row) if k not in hidden]
    wide = 3.6 * len(names)  # inches; margins are set, since measuring every label takes as long as drawing
    margins = {"left": 0.6 / wide, "right": 1 - 0.1 / wide, "bottom": 0.17, "top": 0.9, "wspace": 0.25}
    figure = Figure(figsize=(wide, 3))
    axes = figure.subplots(1, len(names), gridspec_kw=margins, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        steps = np.array([row["step"] for row in log if name in row])
        values = np.array([row[name] for row in log if name in row])
        (line,) = axis.plot(steps, values, alpha=0.25, linewidth=0.6)
        width = max(1, len(values) // 50)
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axis.plot(steps[width - 1 :], smooth, color=line.get_color())
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if name in ("loss", "grad_norm"):
            axis.set_yscale("log")
    with whole_file(run / "curves.png") as temporary:
        figure.savefig(temporary, dpi=100, format="png")
