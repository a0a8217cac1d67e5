"""What bytes are that are no picture we read, in words, and what to do about it.

Folders of pictures hold web pages that a server sent instead of a picture, pointers of Git LFS, and formats that are
not read on purpose. A list of thousands of unreadable files is of use only where each says which of these it is.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping

# Pictures that are not read, by the ends of their names, and what to do with them.
_UNREAD = {
    "convert them to JPEG or PNG": (
        ".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".svg", ".svgz", ".ico", ".qoi", ".tga",
        ".dds", ".pcx", ".wmf", ".emf",
    ),
    "export them as PNG or TIFF": (".psd", ".psb", ".xcf", ".ai", ".eps", ".kra", ".dcm"),
    "develop the raw ones to JPEG or TIFF": (
        ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".srf", ".sr2", ".dng", ".raf", ".orf", ".rw2", ".pef", ".srw",
        ".x3f", ".3fr", ".iiq", ".raw",
    ),
    "convert them to 16-bit PNG or float TIFF": (".exr", ".hdr", ".fits"),
}  # fmt: skip
_REMEDIES = {suffix: remedy for remedy, suffixes in _UNREAD.items() for suffix in suffixes}

_TEXT = re.compile(rb"[\t\n\r\x20-\x7e]+")
_WEB_PAGE = re.compile(rb"\s*(<!doctype html|<html|<head|<body|<script)", re.IGNORECASE)

# Kinds of the ISO base media file format, by the brand that follows `ftyp`.
_BRANDS = {
    "it is HEIC or HEIF, as phones write it: convert it to JPEG": (
        b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1",
    ),
    "it is AVIF, whose header does not bound what its decoder takes: convert it to JPEG or PNG": (b"avif", b"avis"),
    "it is a raw camera file (CR3): develop it to JPEG or TIFF": (b"crx ",),
}  # fmt: skip
_SIGNATURES = (
    (b"version https://git-lfs.github.com/spec/", "it is a Git LFS pointer and not the picture: run `git lfs pull`"),
    (b"/annex/objects/", "it is a git-annex pointer and not the picture: run `git annex get`"),
    (b"\x00\x05\x16\x07", "it is an AppleDouble file, which macOS puts beside the picture: delete it"),
    (b"\x00\x05\x16\x00", "it is an AppleSingle file: convert it to a plain one"),
    (b"\x00\x00\x00\x01Bud1", "it is a .DS_Store of macOS: delete it"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "it is an OLE file, such as Thumbs.db of Windows: delete it"),
    (b"\x00\x00\x00\x0cjP  \r\n\x87\n", "it is JPEG 2000: convert it to PNG or TIFF"),
    (b"\xff\x4f\xff\x51", "it is JPEG 2000: convert it to PNG or TIFF"),
    (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "it is JPEG XL: convert it to JPEG or PNG"),
    (b"\xff\x0a", "it is JPEG XL: convert it to JPEG or PNG"),
    (b"8BPS", "it is a Photoshop file (PSD): export it as PNG or TIFF"),
    (b"%PDF", "it is a PDF: export its pages as pictures"),
    (b"%!PS", "it is PostScript: export it as PNG"),
    (b"FUJIFILMCCD-RAW", "it is a raw camera file (RAF): develop it to JPEG or TIFF"),
    (b"IIRO", "it is a raw camera file (ORF): develop it to JPEG or TIFF"),
    (b"IIU\x00", "it is a raw camera file (RW2): develop it to JPEG or TIFF"),
    (b"\x00\x00\x01\x00", "it is an icon (ICO): convert it to PNG"),
    (b"v/1\x01", "it is OpenEXR: convert it to 16-bit PNG or float TIFF"),
    (b"#?RADIANCE", "it is Radiance HDR: convert it to 16-bit PNG or float TIFF"),
    (b"DDS ", "it is a DDS texture: convert it to PNG"),
    (b"qoif", "it is QOI: convert it to PNG"),
    (b"SIMPLE  =", "it is FITS: convert it to 16-bit PNG or float TIFF"),
    (b"\x89HDF", "it is HDF5: export its arrays as pictures"),
    (b"\x93NUMPY", "it is a NumPy array: export it as PNG or TIFF"),
    (b"PK\x03\x04", "it is a zip archive: unpack it"),
    (b"\x1f\x8b", "it is compressed (gzip): unpack it"),
    (b"\x80\x02", "it is a Python pickle, which is never opened"),
    (b"\x80\x03", "it is a Python pickle, which is never opened"),
    (b"\x80\x04", "it is a Python pickle, which is never opened"),
    (b"\x80\x05", "it is a Python pickle, which is never opened"),
)
_BROKEN = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "BigTIFF"),
    (b"MM\x00+", "BigTIFF"),
)


def count_unread(names: Iterable[str]) -> Counter[str]:
    """How many of some files are pictures by their names, of kinds that are not read: by the end of the name."""
    suffixes = (os.path.splitext(name)[1].lower() for name in names)
    return Counter(suffix for suffix in suffixes if suffix in _REMEDIES)


def name_unread(counts: Mapping[str, int]) -> str:
    """Say which these are, and what to do about them."""
    kinds = ", ".join(
        f"{count:,} {suffix}" for suffix, count in sorted(counts.items(), key=lambda kind: (-kind[1], kind))
    )
    remedies = [remedy for remedy, suffixes in _UNREAD.items() if not counts.keys().isdisjoint(suffixes)]
    return f"{sum(counts.values()):,} of them are pictures of kinds that are not read ({kinds}): {', '.join(remedies)}"


def name_bytes(data: bytes, formats: tuple[str, ...]) -> str:
    """Say what bytes are that no decoder of `formats` recognises.

    Args:
        data: not empty.
        formats: those that are read, for the sentence that ends the guessing.
    """
    head = data[:1024]
    if head[4:8] == b"ftyp":
        for words, brands in _BRANDS.items():
            if head[8:12] in brands:
                return words
        return "it is a film (MP4 or MOV): take its frames out as pictures"
    if head[8:12] == b"CR\x02\x00":
        return "it is a raw camera file (CR2): develop it to JPEG or TIFF"
    if head[128:132] == b"DICM":
        return "it is DICOM: export it as 16-bit PNG or TIFF"
    for signature, words in _SIGNATURES:
        if head.startswith(signature):
            return words
    if _WEB_PAGE.match(head):
        return "it is a web page (HTML) that was saved in a picture's place: download it again"
    if b"<svg" in head:
        return "it is a drawing (SVG): convert it to PNG"
    if not data.strip(b"\0"):
        return "it holds nothing but zero bytes, as an interrupted copy leaves it: copy it again"
    for signature, name in _BROKEN:
        if head.startswith(signature):
            return f"it is {name} whose header is broken or of a kind that is not read: save it as 8-bit RGB"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "it is a broken or truncated WEBP: copy it again"
    if _TEXT.fullmatch(head):
        start = head[:40].split(b"\n")[0].strip().decode()
        return f"it is text and no picture, it begins with {start!r}"
    return "it is no picture in a format that is read (" + ", ".join(formats) + ")"
