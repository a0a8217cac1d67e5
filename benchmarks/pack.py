"""Packing a folder into shards against `tar` and webdataset's own writer, on the same files.

    python benchmarks/pack.py [--pictures DIR | --archives DIR] [--count 3000] [--rounds 5]

The candidates take turns inside a round and ratios are taken within it; a first round warms the page cache up. Times
are CPU seconds of this process and its children, and wall seconds, which other work on the machine stretches. `tar cf`
and webdataset copy bytes and look at none of them (webdataset also writes a json a sample, as we do). Packing with
foreseen decodes each picture, which is how unreadable ones are found, and sums its channels, takes a checksum, writes
index and manifest, and syncs the disk. "decode alone" decodes the same files as packing does: what is left of packing
without it is the price of the rest.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from foreseen.data.decode import decode
from foreseen.data.pack import pack
from foreseen.data.parallel import count_cpus
from foreseen.data.source import FolderListing

SHARD_SAMPLES = 1000
TAR, WRITER, OURS = "tar cf", "webdataset.ShardWriter", "foreseen, 1 process"
READ, DECODE = "read alone", "decode alone"


def unpack(archives: Path, folder: Path, count: int) -> None:
    """The first pictures of Oxford-IIIT Pet by name, as files."""
    with tarfile.open(archives / "images.tar.gz") as tar:
        members = {Path(member.name).name: member for member in tar if member.name.endswith(".jpg")}
        for name in sorted(members)[:count]:
            data = tar.extractfile(members[name])
            assert data is not None
            (folder / name).write_bytes(data.read())


def with_tar(pictures: Path, out: Path) -> None:
    subprocess.run(["tar", "cf", str(out / "all.tar"), "-C", str(pictures), "."], check=True)


def with_webdataset(pictures: Path, out: Path) -> None:
    import webdataset  # and torch with it, which the processes of `pack` have no need of

    with webdataset.ShardWriter(str(out / "train-%06d.tar"), maxcount=SHARD_SAMPLES, verbose=0) as writer:
        for number, file in enumerate(sorted(pictures.iterdir())):
            facts = json.dumps({"path": file.name, "label": None}).encode()
            writer.write({"__key__": f"{number:09d}", "jpg": file.read_bytes(), "json": facts})


def with_foreseen(workers: int) -> Callable[[Path, Path], None]:
    def run(pictures: Path, out: Path) -> None:
        summary = pack(
            FolderListing(pictures), out / "set", "train", shard_samples=SHARD_SAMPLES, workers=workers
        )  # fmt: skip
        assert not summary.unreadable
        assert not summary.converted

    return run


def read_alone(pictures: Path, _: Path) -> None:
    for file in pictures.iterdir():
        file.read_bytes()


def decode_alone(pictures: Path, _: Path) -> None:
    for file in pictures.iterdir():
        decode(file.read_bytes(), fast=False)


def cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(
    candidates: dict[str, Callable[[Path, Path], None]], pictures: Path, folder: Path, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """CPU and wall seconds of each candidate in each round."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for round_number in range(rounds + 1):
        for name, run in candidates.items():
            out = folder / "out"
            out.mkdir()
            began = cpu_seconds(), time.perf_counter()
            run(pictures, out)
            if round_number:  # the first round warms up
                spent[name].append((cpu_seconds() - began[0], time.perf_counter() - began[1]))
            shutil.rmtree(out)
    return spent


def report(spent: dict[str, list[tuple[float, float]]], count: int, size: int) -> None:
    for name, rounds in spent.items():
        cpu, wall = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratios = {
            other: statistics.median(own[0] / peer[0] for own, peer in zip(rounds, spent[other], strict=True))
            for other in (TAR, WRITER)
        }
        print(f"  {name:24} {cpu:6.2f} s CPU {wall:6.2f} s wall   {count / cpu:8.0f} pictures and "
              f"{size / cpu / 1e6:6.1f} MB per CPU s   {ratios[TAR]:6.2f} x tar {ratios[WRITER]:5.2f} x webdataset"
              )  # fmt: skip
    rest = [own[0] - peer[0] for own, peer in zip(spent[OURS], spent[DECODE], strict=True)]
    share = statistics.median(part / own[0] for part, own in zip(rest, spent[OURS], strict=True))
    peer = statistics.median(part / own[0] for part, own in zip(rest, spent[WRITER], strict=True))
    print(f"  {OURS} without the time of {DECODE!r}: {share:.0%} of it, {peer:.2f} x webdataset")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found = Path(__file__).parent.parent.parent / "shared" / "data" / "oxford-iiit-pet"
    parser.add_argument("--pictures", type=Path, help="a folder of JPEGs, instead of --archives")
    parser.add_argument("--archives", type=Path, default=found, help="folder with images.tar.gz of Oxford-IIIT Pet")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # webdataset leaves its files to the garbage collector
    candidates = {
        TAR: with_tar,
        WRITER: with_webdataset,
        OURS: with_foreseen(1),
        f"foreseen, {count_cpus()} processes": with_foreseen(count_cpus()),
        READ: read_alone,
        DECODE: decode_alone,
    }
    with tempfile.TemporaryDirectory() as name:
        pictures = Path(name) / "pictures"
        pictures.mkdir()
        if args.pictures is None:
            unpack(args.archives, pictures, args.count)
        else:
            listing = FolderListing(args.pictures)
            for number in range(args.count):
                data = listing[number % len(listing)].image.read()
                (pictures / f"{number:06d}.jpg").write_bytes(data)
        size = sum(file.stat().st_size for file in pictures.iterdir())
        count = sum(1 for _ in pictures.iterdir())
        print(f"{count:,} pictures of {size / count / 1024:.1f} KiB, medians of {args.rounds} rounds, shards of "
              f"{SHARD_SAMPLES:,}")  # fmt: skip
        report(measure(candidates, pictures, Path(name), args.rounds), count, size)


if __name__ == "__main__":
    main()
