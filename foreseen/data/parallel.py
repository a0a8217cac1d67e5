"""Work on many shards at once, in processes that end with this one."""

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from foreseen.errors import BadInput
from foreseen.processes import exit_with_the_parent

Job = TypeVar("Job")
Result = TypeVar("Result")


def count_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int
) -> Iterator[tuple[int, Result]]:
    """Do the jobs, and give each result with its job's number as it comes; few jobs are in memory at a time.

    Args:
        function: of a module, so that other processes can import it.
        jobs: what it is called with.
        workers: processes; with 1 it is all done here.

    Raises:
        BadInput: a process was killed.
    """
    numbered = enumerate(jobs)
    if workers <= 1:
        yield from ((number, function(job)) for number, job in numbered)
        return
    # Spawned, not forked: a fork copies the locks of whatever threads the caller has.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    running: dict[Future[Result], int] = {}
    try:
        while True:
            for number, job in itertools.islice(numbered, 2 * workers - len(running)):
                running[pool.submit(function, job)] = number
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        raise BadInput(
            f"a process was killed, by want of memory perhaps: run the same command again with --workers below "
            f"{workers}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started it
    exit_with_the_parent()
