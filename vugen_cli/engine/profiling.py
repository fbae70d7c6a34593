"""`--profile`: where the time of a training step goes.

A few steady steps are watched in three ways that would disturb each other: some with a clock that waits for
the device after each part, one with every floating-point operation counted, and some with torch's profiler,
for a trace that https://ui.perfetto.dev and chrome://tracing open.
"""

import contextlib
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from vugen_cli.files import whole_file
from vugen_cli.processes import world_size

WARM, TIMED, COUNTED, TRACED = 5, 8, 1, 3  # steps, in this order
STEPS = WARM + TIMED + COUNTED + TRACED

# Dense bfloat16 FLOP/s of a device, by a part of its name, from NVIDIA's data sheets; the first that fits.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


class Stopwatch:
    """A stopwatch with named laps: seconds of each name, summed.

    Args:
        device: waited for at the end of each lap, so that its work counts where it was asked for.
    """

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, dict[str, float]()
        self.last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def mark(self, name: str) -> None:
        """What passed since the lap before was `name`."""
        now = self._now()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


_stopwatch: Stopwatch | None = None


def mark(name: str) -> None:
    """Say what the time since the lap before went into; does nothing but in the timed steps of a profile."""
    if _stopwatch:
        _stopwatch.mark(name)


class Profile:
    """Watches STEPS steps of a run, then leaves a trace and prints a table.

    Args:
        trace: the file to write, `.json.gz`.
        device: where the run trains.
        bfloat16: whether it multiplies in that, which is what the known peaks are for.
        images: in a step, over all processes.
    """

    def __init__(self, trace: Path, device: torch.device, bfloat16: bool, images: int):
        self.trace, self.device, self.bfloat16, self.images = trace, device, bfloat16, images
        self.step, self.started, self.flops = 0, 0.0, 0
        self.watching = contextlib.ExitStack()

    def next_step(self) -> None:
        """Call at the beginning of every step."""
        global _stopwatch
        if self.step == WARM:
            _stopwatch = Stopwatch(self.device)
        elif self.step == WARM + TIMED:
            assert _stopwatch
            _stopwatch.mark("other")
            self.seconds, _stopwatch = {k: s / TIMED for k, s in _stopwatch.seconds.items()}, None
            self.watching.enter_context(torch.compiler.set_stance("force_eager"))  # to see every operation
            counter = self.watching.enter_context(FlopCounterMode(display=False))
            self.watching.callback(lambda: setattr(self, "flops", counter.get_total_flops()))
        elif self.step == WARM + TIMED + COUNTED:
            self.watching.close()
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = self.watching.enter_context(torch.profiler.profile(activities=activities))
        elif self.step == STEPS:
            self.watching.close()
            with whole_file(self.trace) as temporary:
                self.profiler.export_chrome_trace(str(temporary))
            tqdm.write("\n".join(self.report()))
        self.step += 1

    def report(self) -> list[str]:
        """The table as lines."""
        whole = sum(self.seconds.values())
        lines = [f"A step of {1000 * whole:.1f} ms ({self.images / whole:.0f} images/s), mean of {TIMED}:"]
        lines += [
            f"  {name:28} {1000 * seconds:9.2f} ms  {seconds / whole:6.1%}"
            for name, seconds in sorted(self.seconds.items(), key=lambda item: -item[1])
        ]
        rate = self.flops / whole
        each = " by each process" if world_size() > 1 else ""
        lines.append(
            f"  {self.flops / 1e9:.1f} GFLOP in products, convolutions and attention{each}: "
            f"{rate / 1e12:.3f} TFLOP/s"
        )
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "this CPU"
        peak = next((peak for part, peak in PEAKS.items() if part in name), None)
        if peak and self.bfloat16:
            lines.append(f"  MFU {rate / peak:.1%} of the {peak / 1e12:.0f} TFLOP/s of {name} in bfloat16")
        else:
            kind = "bfloat16" if self.bfloat16 else "float32"
            lines.append(f"  MFU unknown: no peak is known of {name} in {kind}")
        wait = self.seconds.get("waiting for data", 0.0) / whole
        lines.append(f"  data-wait {wait:.1%}; trace of {TRACED} steps in {self.trace}")
        return lines
