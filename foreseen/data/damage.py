"""Damage that decoders pass over in silence: bytes that were lost inside a picture that is otherwise whole.

A disk or an interrupted copy leaves blocks of zeros, or of something else. libjpeg makes grey or shifted pixels of
them, and says so only to those who ask, which Pillow does not. So `pack` looks at what the bytes themselves can tell,
at the speed of a search; later reads are guarded by the checksum of what was packed.

For a JPEG (ITU T.81) that is: markers that may not stand among its pixels, restart markers that are missing, and long
runs of zero bytes, where its own Huffman tables do not make them mean an even area. For a PNG, the checksums of its
pixels, which Pillow does not compare. WEBP and GIF carry nothing to compare.
"""

import re
import struct
import zlib

_ZEROS = bytes(256)  # half a disk sector
_MARKER = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)
_SCAN, _TABLES, _RESTART_INTERVAL, _END = 0xDA, 0xC4, 0xDD, 0xD9
_RESTARTS = range(0xD0, 0xD8)
_BASELINE, _PROGRESSIVE = (0xC0, 0xC1), 0xC2
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# What may follow the pixels of a scan: tables, another scan, the number of lines, the end, notes.
_AFTER_A_SCAN = frozenset({0xC4, 0xCC, 0xDA, 0xDB, 0xDC, 0xDD, 0xD9, 0xFE, *range(0xE0, 0xF0)})
# First symbols of the tables of annex K, which a film's frames leave out; DC first, then AC, by table number.
_USUAL_FIRST_SYMBOLS = {0x00: 0x00, 0x01: 0x00, 0x10: 0x01, 0x11: 0x00}
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"IDAT")


def find_damage(data: bytes) -> str | None:
    """What is wrong with the encoded pixels of a picture, in words; None where nothing can be seen.

    Args:
        data: a whole picture that its decoder accepts.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg_damage(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png_damage(data)
    return None


def _png_damage(data: bytes) -> str | None:
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 8 + length
        if kind == b"IEND" or end + 4 > len(data):
            return None
        if (
            kind in _PIXEL_CHUNKS
            and zlib.crc32(memoryview(data)[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]
        ):
            return f"it is damaged: the checksum of its {kind.decode()} chunk at byte {at:,} differs"
        at = end + 4
    return None


def _jpeg_damage(data: bytes) -> str | None:
    first_symbols = dict(_USUAL_FIRST_SYMBOLS)
    frame, has_restarts, at = 0, False, 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None  # between segments libjpeg looks for the next one, too
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker == _END:
            return None
        (length,) = struct.unpack_from(">H", data, at + 2)
        segment = data[at + 4 : at + 2 + length]
        at += 2 + length
        if marker in _FRAMES:
            frame = marker
        elif marker == _TABLES:
            first_symbols |= _first_symbols(segment)
        elif marker == _RESTART_INTERVAL:
            has_restarts = segment[:2] != b"\0\0"
        elif marker == _SCAN:
            end, problem = _end_of_scan(data, at, has_restarts)
            if problem is None and not _may_hold_zeros(frame, segment, first_symbols):
                zeros = data.find(_ZEROS, at, end)
                if zeros >= 0:
                    problem = f"its pixels are zero bytes from byte {zeros:,} on"
            if problem is not None:
                return f"it is damaged: {problem}"
            at = end
    return None


def _end_of_scan(data: bytes, at: int, has_restarts: bool) -> tuple[int, str | None]:
    """Where the marker after a scan's pixels stands, and what is wrong with the markers among them."""
    restarts = 0
    for found in _MARKER.finditer(data, at):
        marker, place = data[found.start() + 1], found.start()
        if marker in _RESTARTS:
            expected = _RESTARTS[restarts % 8]
            if not has_restarts or marker != expected:
                return place, f"a restart marker is missing or out of place at byte {place:,}"
            restarts += 1
            continue
        if marker not in _AFTER_A_SCAN:
            return place, f"a marker that may not stand among pixels (ff{marker:02x}) at byte {place:,}"
        return place, None
    return len(data), None


def _first_symbols(segment: bytes) -> dict[int, int]:
    """Of each Huffman table in a DHT segment, the symbol of the code that is all zeros, by class and number."""
    found, at = {}, 0
    while at + 17 < len(segment):
        found[segment[at]] = segment[at + 17]
        at += 17 + sum(segment[at + 1 : at + 17])
    return found


def _may_hold_zeros(frame: int, scan: bytes, first_symbols: dict[int, int]) -> bool:
    """Whether a long run of zero bits is something that an encoder writes in this scan.

    With the usual tables it is not. With tables made for the picture, the shortest codes may be "as dark as the block
    before" and "no detail", and zeros then are an even area. In a progressive scan of details they are not, since
    blocks without any are counted; in one that refines, which holds single bits, they are.
    """
    count = scan[0] if scan else 0
    if len(scan) < 4 + 2 * count or frame not in (*_BASELINE, _PROGRESSIVE):
        return True
    tables = [scan[2 + 2 * component] for component in range(count)]
    is_even = all(first_symbols.get(table >> 4) == 0 for table in tables)  # class 0, DC: no difference
    if frame in _BASELINE:
        return is_even and all(
            first_symbols.get(0x10 | (table & 15)) == 0 for table in tables
        )  # class 1, AC: no detail
    first_coefficient, refines = scan[1 + 2 * count], scan[3 + 2 * count] >> 4 > 0
    return refines or (first_coefficient == 0 and is_even)
