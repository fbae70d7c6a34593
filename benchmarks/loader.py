"""The training stream beside decoding alone, in the same run and on one core.

    python benchmarks/loader.py --data data/imagenet

Prints samples/s of the stream (index, read, decode, shuffle, batch) and of decoding the same files from
memory, and their ratio, by processor time, which what else the machine does disturbs least. Goal: 0.85.
"""

import argparse
import itertools
import os
import platform
import time

import torch

from vugen_cli.data.loader import ShardedImages, TrainingStream, decode_stored


def main() -> None:
    """Alternate the two, five times each, and keep the best of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a data set written by vugen prepare")
    parser.add_argument("--samples", type=int, default=640)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = ShardedImages(options.data)
    files = stored_files(images, options.samples)
    stream = iter(TrainingStream(images, batch_size=32, seed=0))
    for _ in range(4):
        next(stream)  # open the shards first: the index is built once in a run
    rates: dict[str, float] = {"decode only": 0.0, "stream": 0.0}
    for _ in range(5):
        started = time.process_time()
        for data in files:
            decode_stored(data)
        rates["decode only"] = max(rates["decode only"], len(files) / (time.process_time() - started))
        started = time.process_time()
        count = sum(len(batch.captions) for batch in itertools.islice(stream, options.samples // 32))
        rates["stream"] = max(rates["stream"], count / (time.process_time() - started))
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one used; {images.size} px")
    for name, rate in rates.items():
        print(f"{name:12} {rate:8.0f} samples/s")
    print(f"stream / decode only = {rates['stream'] / rates['decode only']:.2f}")


def stored_files(images: ShardedImages, count: int) -> list[bytes]:
    """The encoded pictures of the first samples."""
    found: list[bytes] = []
    for shard in range(len(images.counts)):
        file, samples = images._shard(shard)
        for members in samples:
            offset, size = members["png"] if "png" in members else members["jpg"]
            found.append(os.pread(file.fileno(), size, offset))
            if len(found) == count:
                return found
    return found


if __name__ == "__main__":
    main()
