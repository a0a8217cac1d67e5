"""What the index, `data index` and `data check`, the order, the reader and the door cost: each figure with its bar.

    python benchmarks/index.py [--reads 1000000] [--rounds 7]

Indexing, checking and the order are CPU seconds of this process; opening and `foreseen --help` are wall seconds of
fresh processes, with the files in the page cache. The set of 100 million samples is simulated: its index and labels are
sparse files (1.6 GB that take no disk), its manifest with 100,000 shards is real. Memory is this process's VmRSS.
"""

import argparse
import io
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foreseen.data.check import check_set
from foreseen.data.decode import decode
from foreseen.data.index_tars import IndexOptions, index_tars
from foreseen.data.manifest import Manifest, Shard, Split, write_manifest
from foreseen.data.order import Order
from foreseen.data.pack import pack
from foreseen.data.shards import INDEX_ROW, ShardSet
from foreseen.data.source import FolderListing
from foreseen.data.tar_labels import LabelRule
from foreseen.data.tars import scan_tar

MANY, MANY_SHARDS = 100_000_000, 100_000
TAR_SAMPLES = 20_000
LARGER_PICTURES = 2_000
PICTURES, SHARD_SAMPLES = 5_000, 25  # 200 shards: more than the reader keeps open

OPEN = """
import sys, time
from foreseen.data.shards import ShardSet
began = time.perf_counter()
data = ShardSet.open(sys.argv[1], "train")
seconds = time.perf_counter() - began
assert len(data) == int(sys.argv[2]) and "torch" not in sys.modules
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, int(peak) / 1024)
"""


def report(what: str, value: float, unit: str, bar: float) -> None:
    print(f"{what:58} {value:8.3g} {unit:10} bar {bar:g}: {'pass' if value <= bar else 'MISSED'}", flush=True)


def cpu_seconds(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def index_a_tar(folder: Path, rounds: int) -> None:
    """A tar as `pack` writes it, a jpg and a json a sample, with members as small as can be."""
    file, sizes = folder / "tiny.tar", np.random.default_rng(0).integers(500, 3000, TAR_SAMPLES).tolist()
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, size in enumerate(sizes):
            for extension, length in (("jpg", size), ("json", 80)):
                info = tarfile.TarInfo(f"{number:09d}.{extension}")
                info.size = length
                tar.addfile(info, io.BytesIO(bytes(length)))
    assert len(scan_tar(file)) == 2 * TAR_SAMPLES
    seconds = statistics.median(cpu_seconds(partial(scan_tar, file)) for _ in range(rounds))
    report(f"index a tar of {TAR_SAMPLES:,} samples of two members", seconds / TAR_SAMPLES * 1e6, "µs/sample", 5)


def doctor(folder: Path, rounds: int) -> None:
    """Index and check shards whose pictures are as large as the reduced Pets: CPU seconds of one process."""
    pictures, generator = folder / "larger", np.random.default_rng(0)
    pictures.mkdir()
    for number in range(LARGER_PICTURES):
        coarse = Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8))
        coarse.resize((256, 192), Image.Resampling.BICUBIC).save(pictures / f"{number}.jpg", quality=92)
    pack(FolderListing(pictures), folder / "larger_set", "train", shard_samples=500, workers=1)
    tars = sorted((folder / "larger_set").glob("*.tar"))
    data = ShardSet.open(folder / "larger_set", "train")

    def decode_all() -> None:
        for number in range(len(data)):
            decode(data.read(number), fast=False)

    def index(*, checksums: bool = False, labels: str = "none") -> None:
        options = IndexOptions(labels=LabelRule.parse(labels), checksums=checksums)
        index_tars({"train": tars}, folder / "index", options, workers=1, overwrite=True)

    def check(*, decode: bool) -> None:
        assert not check_set(folder / "larger_set", decode=decode, workers=1).faults

    def per_10_000(action: Callable[[], object]) -> float:
        return statistics.median(cpu_seconds(action) for _ in range(rounds)) / LARGER_PICTURES * 10_000

    pairs = [(cpu_seconds(decode_all), cpu_seconds(partial(check, decode=True))) for _ in range(rounds)]
    decoding = statistics.median(alone for alone, _ in pairs) / LARGER_PICTURES * 10_000
    mean = sum(tar.stat().st_size for tar in tars) / LARGER_PICTURES / 1024
    print(f"the next are for 10,000 samples of {mean:.1f} KiB, which take {decoding:.1f} s to read and decode")
    report("data index", per_10_000(index), "s", 1)
    report("data index --labels json:path", per_10_000(partial(index, labels="json:path")), "s", 2)
    report("data index --checksums", per_10_000(partial(index, checksums=True)), "s", 2)
    report("data check --no-decode", per_10_000(partial(check, decode=False)), "s", 4)
    report("data check", statistics.median(checked for _, checked in pairs) / LARGER_PICTURES * 10_000, "s", 10)
    report("  against reading and decoding alone", statistics.median(both / alone for alone, both in pairs), "×", 1.3)


def open_many(folder: Path, rounds: int) -> None:
    """Open a simulated set in processes that have numpy and no torch."""
    entry = Split(
        samples=MANY,
        shards=tuple(Shard(f"train-{i:06d}.tar", MANY // MANY_SHARDS, 110_000_000 + i) for i in range(MANY_SHARDS)),
        image="jpg",
        index="train.index.npy",
        index_digest="0" * 32,
        labels="train.labels.npy",
        mean=None,
        std=None,
        source=None,
        licence=None,
        plan=None,
    )
    write_manifest(folder, Manifest({"train": entry}))
    for name, dtype in (("train.index.npy", INDEX_ROW), ("train.labels.npy", np.dtype("<i4"))):
        np.lib.format.open_memmap(folder / name, mode="w+", dtype=dtype, shape=(MANY,))
    found = []
    for _ in range(rounds):
        command = [sys.executable, "-c", OPEN, str(folder), str(MANY)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found.append([float(number) for number in printed.split()])
    seconds, peak = (statistics.median(column) for column in zip(*found, strict=True))
    report(f"open {MANY:,} samples in {MANY_SHARDS:,} shards", seconds, "s", 1)
    report("  peak memory of that process (VmHWM)", peak, "MiB", 200)


def order_blocks(rounds: int) -> None:
    order = Order(0, MANY)

    def draw(blocks: NDArray[np.int64]) -> None:
        for positions in blocks:
            order.samples(positions)

    for block in (256, 4096):
        blocks = np.arange(100 * block).reshape(100, block)
        seconds = statistics.median(cpu_seconds(partial(draw, blocks)) for _ in range(rounds))
        report(f"order of {MANY:,} samples in blocks of {block}", seconds / blocks.size * 1e9, "ns/sample", 1000)


def read_many(folder: Path, reads: int) -> None:
    """Read small JPEGs again and again in the stream's order, with an eye on this process's memory."""
    pictures, generator = folder / "pictures", np.random.default_rng(0)
    pictures.mkdir()
    for number in range(PICTURES):
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.jpg")
    pack(FolderListing(pictures), folder / "set", "train", shard_samples=SHARD_SAMPLES, workers=1)
    data = ShardSet.open(folder / "set", "train")
    order, marks, block = Order(0, PICTURES), [reads // 10, reads // 2, reads], 1000
    resident: list[float] = []
    began, done = time.process_time(), 0
    while len(resident) < len(marks):
        positions = np.arange(done, min(done + block, marks[len(resident)]))
        for sample in order.samples(positions).tolist():
            data.read(sample)
        done += len(positions)
        if done == marks[len(resident)]:
            resident.append(resident_mib())
    spent = (time.process_time() - began) / reads
    print(f"{reads:,} reads of {PICTURES:,} samples, {spent * 1e6:.1f} µs each; VmRSS at 10 %, 50 %, 100 %: "
          f"{', '.join(f'{mib:.1f}' for mib in resident)} MiB")  # fmt: skip
    report("  growth of memory from 10 % to 100 % of the reads", resident[-1] - resident[0], "MiB", 4)


def resident_mib() -> float:
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) / 1024


def help_answers(rounds: int) -> None:
    command = [str(Path(sys.executable).with_name("foreseen")), "--help"]
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    report("foreseen --help", statistics.median(times), "s", 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reads", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=7, help="of which the median counts")
    args = parser.parse_args()
    if args.reads < 10:
        parser.error(f"--reads {args.reads} is below 10")
    with tempfile.TemporaryDirectory() as folder:
        index_a_tar(Path(folder), args.rounds)
        doctor(Path(folder), min(3, args.rounds))
        open_many(Path(folder), args.rounds)
        order_blocks(args.rounds)
        read_many(Path(folder), args.reads)
    help_answers(args.rounds)


if __name__ == "__main__":
    main()
