"""What messages and records must not hold: credentials that stand in a URL or among the options of a server."""

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
_USER = re.compile(r"(?<=://)[^/\s@?#]+@")
_QUERY = re.compile(r"(?<=[?&])([^=&\s'\"]+)=[^&\s'\"]+")
# What may be shown of data.storage_options; every other value may be a secret.
_PLAIN_OPTIONS = frozenset(
    {"endpoint_url", "anon", "requester_pays", "use_ssl", "project", "region_name", "addressing_style", "verify"}
)


def masked(text: str) -> str:
    """The text with user names, passwords and the values of queries in its URLs replaced."""
    if "://" not in text:
        return text
    return _QUERY.sub(rf"\1={MASK}", _USER.sub(f"{MASK}@", text))


def masked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a server with every value replaced that may be a secret."""
    shown: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            shown[name] = masked_options(value)
        elif name in _PLAIN_OPTIONS:
            shown[name] = masked(value) if isinstance(value, str) else value
        else:
            shown[name] = MASK
    return shown


def masked_argument(argument: str) -> str:
    """A word of a command line, without the credentials in it."""
    key, is_override, _ = argument.partition("=")
    if is_override and key.startswith("data.storage_options") and key.rpartition(".")[2] not in _PLAIN_OPTIONS:
        return f"{key}={MASK}"
    return masked(argument)
