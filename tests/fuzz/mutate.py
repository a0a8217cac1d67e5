"""Small damage to bytes, text and JSON, drawn from a seeded generator: what files suffer, and what attackers write."""

import copy
import io
import json
import pickle
import pickletools
import random
import struct
import zlib
from itertools import pairwise
from typing import Any

NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
_WORDS: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**400, 1e308, -0.0, "", ".", "..", "/", "../../x",
    "a\0b", "\ud800", "\x1b[2J", "x" * 5000, "9" * 400, [], {}, [[]], [None] * 50, {"a": {"a": 1}}, "${oc.env:HOME}",
    float("inf"), float("nan"), "pipe:true", "train", "none", "float64",
)  # fmt: skip
_TOKENS = (
    "[", "]", "{", "}", ":", ",", '"', "'", "&a", "*a", "!!python/name:os.system", "- ", "\n", "\t", "\0", "%", "@",
    "`", "|", ">", "#", "?", "${", "~", "null", "1e999", "0x", "-.inf", "---", "...", "=", "\ufeff", "\u2028", "\\",
    ";", "<<: ",
)  # fmt: skip


def mutate_bytes(data: bytes, rng: random.Random, *, head: int = 0) -> bytes:
    """Damage bytes in one to six places.

    Args:
        data: whole.
        rng: draws the damage.
        head: half of it falls into so many bytes at the beginning, where headers stand; 0 for anywhere.
    """
    raw = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        size = min(len(raw), head) if head and rng.random() < 0.5 else len(raw)
        at = rng.randrange(size) if size else 0
        length = min(rng.choice((1, 1, 2, 4, 16, 512)), len(raw) - at)
        kind = rng.randrange(8)
        if kind == 0 and raw:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            number, width = rng.choice(NUMBERS), rng.choice("BHIQ")
            raw[at : at + struct.calcsize(width)] = struct.pack(
                rng.choice("<>") + width, number % 2 ** (8 * struct.calcsize(width))
            )
        elif kind == 3:
            del raw[at : at + length]
        elif kind == 4:
            raw[at:at] = rng.randbytes(length)
        elif kind == 5:
            raw[at:at] = raw[at : at + length]
        elif kind == 6:
            raw[at : at + length] = bytes(length)
        elif rng.random() < 0.3:
            del raw[at:]
    return bytes(raw)


def mutate_png(data: bytes, rng: random.Random) -> bytes:
    """Damage chunks of a PNG and mend its checksums, so that what lies behind them is reached."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    number = rng.randrange(len(chunks))
    kind, body = chunks[number]
    change = rng.randrange(4)
    if change == 0:
        chunks[number] = kind, mutate_bytes(body, rng)
    elif change == 1:
        chunks[number] = rng.choice((b"tRNS", b"PLTE", b"eXIf", b"zTXt", b"iCCP", b"acTL", b"fdAT", b"gAMA")), body
    elif change == 2:
        chunks.insert(number, chunks[rng.randrange(len(chunks))])
    else:
        del chunks[number]
    out = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        out += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return out


_OPERATIONS = (
    pickle.REDUCE, pickle.BUILD, pickle.NEWOBJ, pickle.BINPERSID, pickle.SETITEM, pickle.SETITEMS, pickle.APPENDS,
    pickle.TUPLE2, pickle.TUPLE, pickle.MARK, pickle.POP, pickle.NONE, pickle.EMPTY_DICT, pickle.EMPTY_TUPLE,
    pickle.BINGET + b"\x01", pickle.BINGET + b"\x05", pickle.BINPUT + b"\x01", pickle.BININT + b"\xff\xff\xff\x7f",
    pickle.LONG1 + b"\x08" + b"\xff" * 7 + b"\x7f", pickle.LONG1 + b"\x01\xff",
)  # fmt: skip


def mutate_pickle(data: bytes, rng: random.Random, *, skip: int = 0) -> bytes:
    """Damage a program by whole instructions, so that what follows is still read as such.

    Args:
        data: programs one after another, and what follows them.
        rng: draws the damage.
        skip: so many programs are left as they are.
    """
    source = io.BytesIO(data)
    for _ in range(skip):
        for _instruction in pickletools.genops(source):
            pass
    begin = source.tell()
    places = [place for _, _, place in pickletools.genops(source) if place is not None]
    end = source.tell()
    program = [data[first:last] for first, last in pairwise([*places, end])]
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(1, len(program)), rng.choice((1, 1, 2, 5, 20))
        change = rng.randrange(4)
        if change == 0:
            del program[at : at + length]
        elif change == 1:
            program[at:at] = program[rng.randrange(len(program)) :][:length]
        else:
            program[at:at] = rng.choices(_OPERATIONS, k=rng.choice((1, 1, 3)))
        if len(program) < 2:
            break
    return data[:begin] + b"".join(program) + data[end:]


def mutate_text(text: str, rng: random.Random) -> str:
    """Damage a text: tokens of YAML and CSV, lines moved, repeated and cut, depth and length."""
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(text) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            text = text[:at] + rng.choice(_TOKENS) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + rng.randint(1, 20) :]
        elif kind == 2:
            lines = text.split("\n")
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
            text = "\n".join(lines)
        elif kind == 3:
            text = text[:at] + str(rng.choice(_WORDS)) + text[at:]
        elif kind == 4:
            text = text[:at] + rng.choice(_TOKENS) * rng.choice((2, 50, 3000)) + text[at:]
        else:
            text = text[:at]
    return text


def mutate_json(value: Any, rng: random.Random) -> bytes:
    """Damage parsed JSON in one to three values, then perhaps its text."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        value = _replace(value, rng)
    text = json.dumps(value)
    if rng.random() < 0.2:
        text = mutate_text(text, rng)
    return text.encode("utf-8", "replace") if rng.random() < 0.9 else mutate_bytes(text.encode("utf-8", "replace"), rng)


def _replace(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            del value[key]
        elif rng.random() < 0.1:
            value[str(rng.choice(_WORDS))] = value[key]
        else:
            value[key] = _replace(value[key], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            value.insert(at, copy.deepcopy(rng.choice(_WORDS)))
        else:
            value[at] = _replace(value[at], rng)
        return value
    return copy.deepcopy(rng.choice(_WORDS))
