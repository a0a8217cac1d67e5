"""Runs as parts of a larger command: each is made once, in this process or side by side with others."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foreseen.commands.verbs import Verb
    from foreseen.config import Config

LOG = "log.txt"
_LOOK_EVERY_S = 2.0


def is_main_rank() -> bool:
    """Whether this process speaks and writes for its job; before, between and after the job's own sessions, too."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Tell a person, once for all ranks."""
    if is_main_rank():
        print(text, flush=True)


class Preempted(Exception):
    """A run was told to stop, and saved."""


class Jobs:
    """Runs jobs in the order of their submission, one after another or `processes` at a time.

    With one process a job runs in this very process, when it is waited for, and tells its own progress; under a
    launcher all ranks do the same. With more, each of them has its share of the cores and writes to `log.txt` in the
    job's run folder.

    Args:
        processes: how many jobs at a time.

    Raises:
        BadInput: several processes under a launcher that started several ranks.
    """

    def __init__(self, processes: int = 1) -> None:
        from foreseen.errors import BadInput

        if processes > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise BadInput(f"--jobs {processes} runs several jobs side by side, and this one has several ranks already")
        self._pool: ProcessPoolExecutor | None = None
        self._processes = processes

    def __enter__(self) -> "Jobs":
        if self._processes > 1:
            from foreseen.data.pack import count_cpus

            threads = max(1, count_cpus() // self._processes)
            self._pool = ProcessPoolExecutor(
                self._processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_process,
                initargs=(threads,),
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is None:
            return
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        # After a failure the others save where they are, rather than go on for nobody.
        while kind is not None and (left := multiprocessing.active_children()):
            for process in left:
                process.terminate()
            time.sleep(0.2)

    def submit(self, verb: "Verb", config: "Config") -> "Future[None]":
        """Put a job in the queue; with one process it has run when this returns."""
        if self._pool is not None:
            return self._pool.submit(_run_quietly, verb, config.model_dump(mode="json"), config.run.dir)
        future: Future[None] = Future()
        _run(verb, config)
        future.set_result(None)
        return future

    def wait(
        self, futures: "Sequence[Future[Any]]", *, look: Callable[[], None] = lambda: None
    ) -> "Iterator[Future[Any]]":  # fmt: skip
        """Hand out the jobs as they end; the first that failed raises its error.

        Args:
            futures: of `submit`.
            look: called every two seconds while waiting.
        """
        left = set(futures)
        while left:
            done, left = wait(left, timeout=_LOOK_EVERY_S, return_when=FIRST_COMPLETED)
            look()
            for future in done:
                future.result()
                yield future


def _start_process(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported, for it and for its children
    from foreseen.processes import exit_with_the_parent

    exit_with_the_parent()
    # Only a run that is being made heeds it, and saves: a pool that lost an idle process would break.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    import torch

    torch.set_num_threads(threads)


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
    from foreseen.commands import finetune, pretrain

    outcome = (pretrain.run if verb == "pretrain" else finetune.run)(config)
    if outcome.preempted:
        raise Preempted(f"told to stop: {config.run.dir} is saved at step {outcome.step}")
