"""Loss curves of a run as a picture."""

import json
from pathlib import Path

import numpy as np

from vugen_cli.files import whole_file


def plot_curves(run: Path) -> None:
    """Plot every loss that a run has logged against the step, raw and smoothed, into its `curves.png`.

    Args:
        run: its folder, with a `metrics.jsonl`.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    hidden = {"step", "corrupt", "captions_cut", "data_wait", "memory_gb"}
    names = [k for k in log[0] if k not in hidden]
    figure, axes = plt.subplots(
        1, len(names), figsize=(3.6 * len(names), 3), layout="constrained", squeeze=False
    )
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
    plt.close(figure)
