"""Processes that do not outlive the one that started them."""

import multiprocessing
import multiprocessing.connection
import os
import threading


def exit_with_the_parent() -> None:
    """End this process when the one that started it is gone, however it went, SIGKILL included.

    Looks at the parent's own sentinel: the parent by process number may be a fork server, which lives as long as its
    children.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_at_the_end_of, args=(parent.sentinel,), daemon=True).start()


def _exit_at_the_end_of(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
