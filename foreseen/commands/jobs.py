"""Runs as parts of a larger command: each is made once, in this process or side by side with others."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreseen.errors import BadInput

if TYPE_CHECKING:
    from foreseen.commands.verbs import Verb
    from foreseen.config import Config

LOG = "log.txt"
_LOOK_EVERY_S = 2.0
_STOP = (signal.SIGTERM, signal.SIGUSR1)  # as foreseen.engine.preempt, which is slow to import


def is_main_rank() -> bool:
    """Whether this process speaks and writes for its job; before, between and after the job's own sessions, too."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Tell a person, once for all ranks."""
    if is_main_rank():
        print(text, flush=True)


class Preempted(Exception):
    """The command was told to stop; what ran has saved."""


class Jobs:
    """Runs jobs in the order of their submission, one after another or `processes` at a time.

    With one process a job runs in this very process, when it is waited for, and tells its own progress; under a
    launcher all ranks do the same. With more, each of them has its share of the cores, one of the GPUs if there are
    any, and writes to `log.txt` in the job's run folder.

    Told to stop by SIGTERM or SIGUSR1, or when a job fails, the jobs that run save and end, and no other begins.

    Args:
        processes: how many jobs at a time.

    Raises:
        BadInput: several processes under a launcher that started several ranks.
    """

    def __init__(self, processes: int = 1) -> None:
        if processes > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise BadInput(f"--jobs {processes} runs several jobs side by side, and this one has several ranks already")
        self._pool: ProcessPoolExecutor | None = None
        self._processes = processes
        self._waiting: dict[Future[None], tuple[Verb, Config]] = {}
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Jobs":
        self._handlers = {number: signal.signal(number, _stop) for number in _STOP}
        if self._processes > 1:
            from foreseen.data.parallel import count_cpus

            context = multiprocessing.get_context("spawn")
            places = context.SimpleQueue()
            for place in range(self._processes):
                places.put(place)
            threads = max(1, count_cpus() // self._processes)
            self._pool = ProcessPoolExecutor(
                self._processes, mp_context=context, initializer=_start_process, initargs=(threads, places)
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=kind is None, cancel_futures=True)
            while kind is not None and (left := multiprocessing.active_children()):
                for process in left:
                    process.terminate()  # heard by a run that is being made; told again until it has begun or ended
                time.sleep(0.2)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def submit(self, verb: "Verb", config: "Config") -> "Future[None]":
        """Put a job in the queue."""
        if self._pool is not None:
            (config.run.dir / LOG).unlink(missing_ok=True)
            return self._pool.submit(_run_quietly, verb, config.model_dump(mode="json"), config.run.dir)
        future: Future[None] = Future()
        self._waiting[future] = (verb, config)
        return future

    def wait(
        self,
        futures: "Sequence[Future[None]]",
        *,
        beside: "Sequence[Future[None]]" = (),
        look: Callable[[], None] = lambda: None,
    ) -> "Iterator[Future[None]]":
        """Hand out jobs as they end.

        Args:
            futures: of `submit`.
            beside: others, not waited for, whose failure ends the wait as well.
            look: called every two seconds while waiting.

        Raises:
            BadInput: a process was killed.
            Exception: that of the first job that failed.
        """
        for future in futures:
            if future in self._waiting:
                _run(*self._waiting.pop(future))
                future.set_result(None)
                yield future
        left = {future for future in futures if self._pool is not None}
        while left:
            done, left = wait(left, timeout=_LOOK_EVERY_S, return_when=FIRST_COMPLETED)
            look()
            for future in [*done, *(other for other in beside if other.done())]:
                try:
                    future.result()
                except BrokenProcessPool:
                    raise BadInput(
                        "a process that made a run was killed, as the system does when memory runs out; the same "
                        "command goes on, with fewer --jobs in less memory"
                    ) from None
            yield from done


def _stop(number: int, _: object) -> None:
    raise Preempted("told to stop")


def _start_process(threads: int, places: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported, for it and for its children
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(_count_gpus())))).split(",")
    if gpus != [""]:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[places.get() % len(gpus)]
    from foreseen.processes import exit_with_the_parent

    exit_with_the_parent()
    # Only a run that is being made heeds the first two, and saves; of Ctrl-C the parent tells.
    for ignored in (*_STOP, signal.SIGINT):
        signal.signal(ignored, signal.SIG_IGN)
    import torch

    torch.set_num_threads(threads)


def _count_gpus() -> int:
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _run_quietly(verb: "Verb", raw: dict[str, Any], folder: Path) -> None:
    from foreseen.commands.verbs import method_options
    from foreseen.config import resolve

    folder.mkdir(parents=True, exist_ok=True)
    with (
        open(folder / LOG, "w", buffering=1, encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        _run(verb, resolve(raw, method_options(verb)))


def _run(verb: "Verb", config: "Config") -> None:
    from foreseen.commands.verbs import command_of

    outcome = command_of(verb).run(config)
    if outcome.told_to_stop:
        raise Preempted(f"told to stop: {config.run.dir} is saved at step {outcome.step}")
