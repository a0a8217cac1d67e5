"""Found by every Python that starts with this folder on its path: no address outside this process group is reached.

Each try is written to the file that FORESEEN_TEST_NETWORK names, and fails.
"""

import os
import socket
import sys
from typing import Any

_WATCHED = {"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"}
_LOOPBACK = {"127.0.0.1", "::1"}
_LOOKED_UP = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _WATCHED:
        if getattr(arguments[0], "family", None) not in (socket.AF_INET, socket.AF_INET6):
            return
        if event == "socket.bind" and str(arguments[1][0]) in _LOOPBACK:  # how urllib3 learns whether IPv6 is there
            return
    elif event not in _LOOKED_UP:
        return
    with open(os.environ["FORESEEN_TEST_NETWORK"], "a", encoding="utf-8") as record:
        record.write(f"{event} {arguments[1:] if event in _WATCHED else arguments} by {sys.argv}\n")
    raise PermissionError(f"{event} is not allowed here")


if "FORESEEN_TEST_NETWORK" in os.environ:
    sys.addaudithook(_refuse)
