"""What `foreseen quickstart` costs and finds: time, memory, and the gain of pretraining, over pretraining seeds.

    python benchmarks/quickstart.py --seeds 0 10 20

Each run draws its own set of labels and pretrains anew. Memory is the proportional set size of all its processes
together, looked at twice a second: the largest sum.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

INTERVAL_S = 0.5


def tree(root: int) -> list[int]:
    """Process numbers of a process and all that it started, on Linux."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def memory_mib(processes: list[int]) -> float:
    """Proportional set size of processes together."""
    total = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds and MiB of a command."""
    began = time.monotonic()
    job = subprocess.Popen(command)
    peak = 0.0
    while job.poll() is None:
        peak = max(peak, memory_mib(tree(job.pid)))
        time.sleep(INTERVAL_S)
    if job.returncode:
        sys.exit(f"{command} ended with {job.returncode}")
    return time.monotonic() - began, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 10, 20])
    parser.add_argument("--method", default="mae")
    parser.add_argument("--out", type=Path, help="keep the runs here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        rows = []
        for seed in options.seeds:
            out = folder / f"{options.method}-{seed}"
            command = [sys.executable, "-m", "foreseen", "quickstart", "--method", options.method]
            seconds, peak = measure([*command, "--seed", str(seed), "--out", str(out)])
            record = json.loads((out / "finetune/controls.json").read_text(encoding="utf-8"))
            rows.append((seed, seconds, peak, record))
        print("\n| seed | seconds | MiB | pretrained | scratch at its best | 3x the passes | gain, 95 % interval |")
        print("| --- " * 7 + "|")
        for seed, seconds, peak, record in rows:
            arms, gain = record["arms"], record["differences"]["scratch"]
            cells = [seed, f"{seconds:.0f}", f"{peak:.0f}"]
            cells += [f"{arms[name]['mean']:.1f}" for name in ("pretrained", "scratch", "scratch_3x")]
            cells.append(f"{gain['mean']:+.1f} [{gain['low']:+.1f}, {gain['high']:+.1f}]")
            print("| " + " | ".join(map(str, cells)) + " |")
        gains = [record["differences"]["scratch"]["mean"] for *_, record in rows]
        typical = median(row[1] for row in rows)
        print(f"\nmedian {typical:.0f} s; mean gain over pretraining seeds {mean(gains):+.1f} points")


if __name__ == "__main__":
    main()
