"""Processes that do not outlive the one that started them."""

import multiprocessing
import multiprocessing.connection
import os
import threading
import time
from pathlib import Path

import psutil

_LAUNCHERS = frozenset({"accelerate", "accelerate-launch", "torchrun"})
_LAUNCHING_MODULES = ("accelerate.commands.", "torch.distributed.run", "torch.distributed.launch")
_NEAR = 3  # generations
_FIRST_WORDS = 6  # interpreter, an option or two, -m, module; not what the job itself is told
_LOOK_EVERY_S = 1.0
_WATCH = "launcher's end"


def exit_with_the_parent() -> None:
    """End this process when the one that started it is gone, however it went, SIGKILL included.

    Looks at the parent's own sentinel: the parent by process number may be a fork server, which lives as long as its
    children.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_at_the_end_of, args=(parent.sentinel,), daemon=True).start()


def exit_with_the_launcher() -> None:
    """End this process when the launcher that started it is gone; nothing where none did.

    A launcher that is killed by SIGKILL tells its ranks nothing, and they would hold the run folder for ever.
    """
    launcher = _find_launcher()
    if launcher is not None and not any(thread.name == _WATCH for thread in threading.enumerate()):
        threading.Thread(target=_exit_without, args=(launcher,), name=_WATCH, daemon=True).start()


def _find_launcher() -> psutil.Process | None:
    """The nearest launcher above; a script of the user's may stand between."""
    try:
        return next(filter(_is_launcher, psutil.Process().parents()[:_NEAR]), None)
    except psutil.Error:
        return None


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()[:_FIRST_WORDS]
    except psutil.Error:
        return False
    return any(Path(word).name in _LAUNCHERS or word.startswith(_LAUNCHING_MODULES) for word in words)


def _exit_without(launcher: psutil.Process) -> None:
    while _is_alive(launcher):
        time.sleep(_LOOK_EVERY_S)
    os._exit(1)


def _is_alive(process: psutil.Process) -> bool:
    try:  # a parent that takes no notice leaves a zombie
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _exit_at_the_end_of(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
