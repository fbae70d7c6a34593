"""`vugen score` beside torch-fidelity: FID, KID, Inception Score, precision and recall of the same two sets.

    python benchmarks/score.py --images drawn --reference photos --count 300

Each tool runs as a process of its own, from start to printed scores, on the same images and weights; neither
reads a cache. Prints seconds, seconds of processor time (which tell more where the machine is shared), peak
memory (of the largest process; torch-fidelity's loaders are not added), the ratios, and the scores. Goals:
0.8 of the time, no more memory. The images of a folder must be of one size, which torch-fidelity needs.
Without --weights, both read a seeded random state dict of the network.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

from vugen_cli.data.folder import image_paths
from vugen_cli.torchvision_repair import repair_torchvision

THEIRS = """
import json, sys
from vugen_cli.torchvision_repair import repair_torchvision
repair_torchvision()
from torch_fidelity import calculate_metrics
images, reference, weights, subset, out = sys.argv[1:]
scores = calculate_metrics(
    input1=images, input2=reference, fid=True, kid=True, isc=True, prc=True, kid_subset_size=int(subset),
    feature_extractor="inception-v3-compat", feature_extractor_weights_path=weights,
    cuda=False, cache=False, verbose=False,
)
json.dump(scores, open(out, "w"))
"""


def main() -> None:
    """Run both tools in turn, the better of --rounds each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, type=Path, help="folder of images of one size")
    parser.add_argument("--reference", required=True, type=Path, help="another")
    parser.add_argument("--count", type=int, default=300, help="images of each")
    parser.add_argument("--weights", type=Path, help="Inception weights, the standard file or any other")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        weights = options.weights or random_weights(work / "inception.pth")
        images, reference = (
            copy(source, work / name, options.count)
            for name, source in (("images", options.images), ("reference", options.reference))
        )
        # As `vugen score` chooses it; torch-fidelity has to be told where the sets are small.
        subset = 1000 if options.count >= 1000 else options.count // 2
        metrics = ["--fid", "--kid", "--is", "--pr", "--no-cache"]
        sets = ["--images", images, "--reference", reference, "--features", f"inception:{weights}"]
        tools = {
            "torch-fidelity": ["-c", THEIRS, images, reference, weights, subset, work / "theirs.json"],
            "vugen score": ["-m", "vugen_cli", "score", *metrics, *sets, "--out", work / "ours.json"],
        }
        best = dict.fromkeys(tools, (float("inf"),) * 3)
        for _ in range(options.rounds):
            for name, arguments in tools.items():
                best[name] = min(best[name], measure(arguments))
        theirs = json.loads((work / "theirs.json").read_text())
        ours = {score["metric"]: score for score in json.loads((work / "ours.json").read_text())["scores"]}
    print(f"2 x {options.count} images, {os.cpu_count()} cores, torch {torch.__version__}")
    for name, (seconds, processor, mebibytes) in best.items():
        print(f"{name:15} {seconds:8.1f} s {processor:8.1f} s of processor {mebibytes:8.0f} MiB")
    time_, processor, memory = (b / a for a, b in zip(*best.values(), strict=True))
    print(
        f"{time_:.2f} of torch-fidelity's time, {processor:.2f} of its processor, {memory:.2f} of its memory"
    )
    for metric, field, key in (
        ("fid", "value", "frechet_inception_distance"),
        ("kid", "value", "kernel_inception_distance_mean"),
        ("kid", "std", "kernel_inception_distance_std"),
        ("is", "value", "inception_score_mean"),
        ("is", "std", "inception_score_std"),
        ("precision", "value", "precision"),
        ("recall", "value", "recall"),
    ):
        print(f"{metric:9} {field:5} {ours[metric][field]:.8g} torch-fidelity {theirs[key]:.8g}")


def copy(source: Path, target: Path, count: int) -> Path:
    """The first images of a folder, side by side in a new one."""
    target.mkdir()
    for number, name in zip(range(count), image_paths(source), strict=False):
        shutil.copyfile(source / name, target / f"{number:06d}{Path(name).suffix.lower()}")
    return target


def measure(arguments: list[object]) -> tuple[float, float, float]:
    """Seconds, seconds of processor time and MiB of a Python process."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{arguments[:3]} failed")
    seconds = time.perf_counter() - started
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def random_weights(path: Path, seed: int = 0) -> Path:
    """Save a state dict of the FID network, He-initialised so that features neither vanish nor explode."""
    repair_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # Built on the meta device: the constructor's loading has nothing to copy into.
    skip_loading = mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict", return_value=None)
    no_file = mock.patch.object(torch, "load", return_value={})
    with skip_loading, no_file, torch.device("meta"):
        network = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path="none")
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros((), dtype=torch.long)
        elif name.endswith((".bias", "running_mean")):
            state[name] = torch.zeros(tensor.shape)
        elif tensor.ndim > 1:
            fan_in = tensor[0].numel()
            state[name] = torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5
        else:
            state[name] = torch.ones(tensor.shape)
    torch.save(state, path)
    return path


if __name__ == "__main__":
    main()
