"""Feeds mutated inputs to the readers: `python -m tests.fuzz.driver COUNT [TARGET] [--first SEED]`.

Input number n of a target is a function of its name and n alone. Each may take ten seconds and 1 GB more than the
process had before it. The input at work is always in `OUT/TARGET-N.bin`, so one that kills the interpreter is found,
too; those that pass are removed. A fault says how to repeat it.
"""

import argparse
import contextlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from foreseen.data.shards import CorruptSample
from foreseen.errors import BadInput
from tests.fuzz.targets import TARGETS

SECONDS, ROOM = 10, 1 << 30


class Hang(BaseException):
    """Past the time of an input; no reader may swallow it."""


def main() -> int:
    """Run; the exit status says whether all inputs passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("target", nargs="?", choices=sorted(TARGETS))
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()), help="where faulty inputs are kept")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _hang)
    for target in TARGETS.values():  # once, so that nothing is imported under the limit
        with contextlib.suppress(Exception):
            _try(target.make(random.Random(0)), target.read)
    room = _virtual_bytes() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    faults = 0
    for name in [options.target] if options.target else TARGETS:
        ends: Counter[str] = Counter()
        for number in range(options.first, options.first + options.count):
            end = _feed(name, number, options.out)
            ends[end] += 1
            faults += end == "fault"
        print(
            f"{name:16} {options.count:6} inputs: " + ", ".join(f"{n} {end}" for end, n in sorted(ends.items())),
            flush=True,
        )
    return min(faults, 1)


def make(name: str, number: int) -> bytes:
    """Input number n of a target."""
    return TARGETS[name].make(random.Random(f"{name} {number}"))


def _feed(name: str, number: int, out: Path) -> str:
    data = make(name, number)
    kept = out / f"{name.replace(' ', '-')}-{number}.bin"
    kept.write_bytes(data)
    signal.alarm(SECONDS)
    try:
        end = _try(data, TARGETS[name].read)
    except (Exception, Hang) as error:
        signal.alarm(0)
        print(f"FAULT {name} {number}: {type(error).__name__}: {error}"[:300])
        traceback.print_exc(limit=-6, file=sys.stdout)
        print(f"  again: python -m tests.fuzz.driver 1 {name!r} --first {number}   (the input: {kept})", flush=True)
        return "fault"
    signal.alarm(0)
    kept.unlink()
    return end


def _try(data: bytes, read: Callable[[bytes, Path], None]) -> str:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        read(data, folder)
    except (BadInput, CorruptSample) as error:
        if not str(error):
            raise ValueError("an error without words") from error
        return "refused"
    finally:
        shutil.rmtree(folder)
    return "read"


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang(f"no end after {SECONDS} s")


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
