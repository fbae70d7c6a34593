"""The training stream: beside decoding alone, and of one reader among many, each on one core.

    python benchmarks/loader.py --data data/imagenet
    python benchmarks/loader.py --readers --folder /tmp/readers
    python benchmarks/loader.py --open 100000

The first prints samples/s of the stream (index, read, decode, shuffle, batch) and of decoding the same files
from memory, and their ratio, by processor time, which what else the machine does disturbs least. Goal: 0.85.

The second makes a data set of 64 shards of 1000 pictures of 256 px in FOLDER (about 1 GB) and prints
samples/s of a reader that is alone, of one worker of 8 on one rank of 8, and of one of 8 on 64. All are cold:
a new process, its shards never opened, their pages dropped from the system's cache before each try; opening
shards is counted. Goal: 0.7 of a reader alone. Then the bytes that a host fetches of a remote data set beside
its share. Goal: 1.3.

The third opens a made-up data set of so many shards. Goal: 100,000 in 5 s and 300 MB.
"""

import argparse
import io
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vugen_cli.data.loader import ShardedImages, TrainingStream, decode_stored
from vugen_cli.data.manifest import FORMAT, Manifest, Shard, Split, write_manifest
from vugen_cli.data.order import StreamOrder, stream_count
from vugen_cli.data.sample import Sample
from vugen_cli.data.writer import write_dataset

BATCH, WINDOW = 512, 20_000
READERS = {"alone": (1, 1), "8 x 8": (8, 8), "64 x 8": (64, 8)}  # ranks, workers on each


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="a data set written by vugen prepare")
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--readers", action="store_true", help="one reader among many")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/readers"), help="of --readers")
    parser.add_argument("--one", nargs=2, type=int, metavar=("RANKS", "WORKERS"), help=argparse.SUPPRESS)
    parser.add_argument("--open", type=int, metavar="SHARDS")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one used", file=sys.stderr)
    if options.one:
        print(json.dumps(one_reader(options.folder, options.one[0], options.one[1], options.samples)))
    elif options.readers:
        readers(options.folder, options.samples)
        fetched()
    elif options.open:
        opened(options.open)
    else:
        beside_decoding(options.data, options.samples)


def beside_decoding(data: str, samples: int) -> None:
    """Alternate the stream and decoding, five times each, and keep the best of each."""
    images = ShardedImages(data)
    files = stored_files(images, samples)
    stream = iter(TrainingStream(images, batch_size=32, seed=0))
    rates: dict[str, float] = {"decode only": 0.0, "stream": 0.0}
    for _ in range(5):
        started = time.process_time()
        for file in files:
            decode_stored(file, images.size)
        rates["decode only"] = max(rates["decode only"], len(files) / (time.process_time() - started))
        started = time.process_time()
        count = sum(len(batch.captions) for batch in itertools.islice(stream, samples // 32))
        rates["stream"] = max(rates["stream"], count / (time.process_time() - started))
    for name, rate in rates.items():
        print(f"{name:12} {rate:8.0f} samples/s")
    print(f"stream / decode only = {rates['stream'] / rates['decode only']:.2f}")


def stored_files(images: ShardedImages, count: int) -> list[bytes]:
    """The encoded pictures of the first samples."""
    places = [(shard, i) for shard, samples in enumerate(images.counts) for i in range(samples)]
    return [images.stored(*place)[0] for place in places[:count]]


class Smooth:
    """Pictures of a few broad waves: decoded as photographs are, at a quarter of their bytes."""

    name, origin, licence, classes = "smooth", "drawn", "CC0", ()

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> Sample:
        coarse = np.random.default_rng(index).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
        return Sample(str(index), file.getvalue(), ["a picture of a few broad waves"])


def make(folder: Path) -> None:
    """64 shards, each a file of its own with the same content."""
    if (folder / "train-000063.tar").exists():
        return
    with tempfile.TemporaryDirectory() as first:
        manifest = write_dataset(Smooth(), first, size=256)
        split = manifest.splits["train"]
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"train-{number:06d}.tar" for number in range(64)]
        for name in names:
            for suffix in (".tar", ".index.npy"):
                shutil.copyfile(Path(first, f"train-000000{suffix}"), (folder / name).with_suffix(suffix))
    split.shards, split.count = [replace(split.shards[0], name=name) for name in names], 64_000
    write_manifest(folder, manifest)


def readers(folder: Path, samples: int) -> None:
    """Each kind of reader three times in a process of its own, in turn; the best of each."""
    make(folder)
    best = dict.fromkeys(READERS, (0.0, 0.0))
    for _ in range(3):
        for name, (ranks, workers) in READERS.items():
            command = [sys.executable, __file__, "--folder", folder, "--samples", samples]
            command += ["--one", ranks, workers]
            done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True, text=True)
            by_clock, by_processor = json.loads(done.stdout)
            best[name] = max(best[name][0], by_clock), max(best[name][1], by_processor)
    for name, (by_clock, by_processor) in best.items():
        ratio = by_processor / best["alone"][1]
        print(
            f"{name:8} {by_clock:6.0f} samples/s, {by_processor:6.0f} by processor time, {ratio:.2f} of alone"
        )


def one_reader(folder: Path, ranks: int, workers: int, samples: int) -> tuple[float, float]:
    """Samples/s of the first worker of a rank in the middle: by the clock, and by processor time."""
    for file in folder.iterdir():
        with open(file, "rb") as stored:
            os.fsync(stored.fileno())
            os.posix_fadvise(stored.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    images = ShardedImages(folder)
    stream = TrainingStream(images, BATCH, seed=0, window=WINDOW, part=(ranks // 2, ranks))
    numbers = range(0, workers * max(1, samples // stream.count), workers)
    stream_warm_up()
    clock, processor = time.perf_counter(), time.process_time()
    count = sum(len(stream.batch(number).captions) for number in numbers)
    return count / (time.perf_counter() - clock), count / (time.process_time() - processor)


def stream_warm_up() -> None:
    """Decode once, so that no library is loaded while the clock runs."""
    decode_stored(Smooth()[0].image, 256)  # type: ignore[arg-type]


def fetched() -> None:
    """Bytes of the shards that a host's rows come from in an epoch, beside an equal share of all."""
    for shards, hosts in ((1_000, 8), (1_000, 64), (100_000, 8), (100_000, 64)):
        counts = np.full(shards, 1000)
        order = StreamOrder(counts, 0, WINDOW, stream_count(4096, shards * 1000))
        per_host = order.streams // hosts
        most = max(
            len({int(s) for k in range(h * per_host, (h + 1) * per_host) for s, _, _ in order._pieces(k)})
            for h in range(hosts)
        )
        print(f"{shards} shards, {hosts} hosts: a host fetches {most * hosts / shards:.3f} of its share")


def opened(count: int) -> None:
    """Seconds and memory of opening a data set of `count` shards, here and as a worker gets it."""
    shards = [
        Shard(f"train-{i:06d}.tar", 1000, 47_000_000 + i, sha256(str(i).encode()).hexdigest())
        for i in range(count)
    ]
    with tempfile.TemporaryDirectory() as folder:
        split = Split(count=1000 * count, shards=shards, skipped_count=count * 10)
        write_manifest(Path(folder), Manifest(format=FORMAT, dataset="x", size=256, splits={"train": split}))
        for shard in shards:
            Path(folder, shard.name).touch()
        del split, shards
        subprocess.run([sys.executable, "-c", OPENING, folder], check=True)


OPENING = """
import pickle, sys, time
from vugen_cli.data.loader import ShardedImages, TrainingStream

def memory(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024

before, began = memory("VmRSS"), time.perf_counter()
stream = TrainingStream(ShardedImages(sys.argv[1]), 4096, seed=0)
stream.orders[0].at(5, 0)
print(f"{time.perf_counter() - began:.1f} s, {time.process_time():.1f} s of processor time with imports")
print(f"{before:.0f} MiB before, {memory('VmRSS'):.0f} after, at most {memory('VmHWM'):.0f}")
print(f"a worker is sent {len(pickle.dumps(stream)) / 1e6:.1f} MB")
"""


if __name__ == "__main__":
    main()
