"""Text of unknown origin made fit for a terminal and a log: names of files, keys of samples, words of other libraries.

A file may be called anything: with line ends it forges lines of a log, with escape sequences it moves the cursor,
renames the window or hides what stands there, and with marks of direction it reads backwards.
"""

import re
import unicodedata

# Cc: control characters; Cf: of direction and other invisible ones; Cs: lone surrogates; Zl, Zp: line and paragraph.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_JOINERS = frozenset("\u200c\u200d")  # Persian words and many emoji are spelled with them
_PLAIN = re.compile(r"[ -~]*")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: str, *, keep: str = "") -> str:
    """The text on one line, with all that is not seen, or steers a terminal, escaped as Python does.

    Bytes of a file name that are not UTF-8 become the replacement character.

    Args:
        text: any string.
        keep: characters that stay, such as a line end.
    """
    if _PLAIN.fullmatch(text):
        return text
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if _encodable(text) else text
    return "".join(letter if letter in keep else _shown(letter) for letter in text)


def say(text: str) -> None:
    """Print a line, with what strangers wrote in it made fit for a terminal."""
    print(printable(text))


def _encodable(text: str) -> bool:
    """Whether its surrogates, if any, stand for bytes."""
    return not any("\ud800" <= letter <= "\udfff" and not "\udc80" <= letter <= "\udcff" for letter in text)


def _shown(letter: str) -> str:
    if letter in _SHORT:
        return _SHORT[letter]
    if letter in _JOINERS or unicodedata.category(letter) not in _UNSEEN:
        return letter
    return letter.encode("unicode_escape").decode()
