"""What went wrong on the way to a server: whether it may pass, and the sentence if it does not."""

import errno

from foreseen.errors import BadInput
from foreseen.masked import masked

WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # between tries
_FOR_GOOD = frozenset({errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOSYS, getattr(errno, "EREMCHG", errno.EINVAL)})
_PASSING_STATUS = frozenset({408, 425, 429})
_REFUSED_STATUS = frozenset({401, 403, 407})
_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "TokenRetrievalError")


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: a time limit, a lost connection, a server in trouble."""
    if (status := _status(error)) is not None:
        return status >= 500 or status in _PASSING_STATUS
    if isinstance(error, (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)):
        return False
    if type(error).__name__ in _CREDENTIALS:
        return False
    if isinstance(error, OSError):
        return error.errno not in _FOR_GOOD
    if isinstance(error, TimeoutError):
        return True
    return type(error).__module__.partition(".")[0] in ("aiohttp", "botocore", "aiobotocore", "gcsfs", "google")


def refusal(url: str, error: BaseException, tries: int, spent_s: float) -> BadInput:
    """The sentence for an error that did not pass: the URL, what the server said, and what to change."""
    said = masked(str(error).strip()) or type(error).__name__
    where, status = masked(url), _status(error)
    if isinstance(error, FileNotFoundError) or status == 404:
        return BadInput(f"{where} is not there (404): look at data.path and data.shards_at")
    if isinstance(error, PermissionError) or status in _REFUSED_STATUS or type(error).__name__ in _CREDENTIALS:
        return BadInput(
            f"{where} is refused ({status or 403}; the server says: {said}): give credentials in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS), or set "
            "data.storage_options.anon=true for what is public"
        )
    if may_pass(error):
        what = "gave no answer in time" if isinstance(error, TimeoutError) else f"failed ({said})"
        return BadInput(
            f"{where} {what}, {tries} times in {spent_s:.0f} s: look at the server, the network and "
            "data.storage_options.endpoint_url; the same command goes on from the last checkpoint"
        )
    return BadInput(f"{where} cannot be read ({said}): look at data.path and data.storage_options")


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error stands for, where it says so: aiohttp's has `status`, gcsfs's `code`."""
    for name in ("status", "code"):
        try:
            return int(getattr(error, name))
        except (AttributeError, TypeError, ValueError):
            continue
    return None
