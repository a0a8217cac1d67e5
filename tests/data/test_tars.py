"""Headers of tars: every format is read as `tarfile` reads it, and nothing that a header says takes memory or time."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from foreseen.data.tars import Tar, read_tar, scan_tar
from foreseen.errors import BadInput

NAMES = ["a.jpg", "d/" * 60 + "b.jpg", "é" * 20 + ".jpg", "x" * 90 + ".jpg", "folder name/with blanks.json"]


def make_tar(file: Path, members: dict[str, bytes], **options: object) -> Path:
    with tarfile.open(file, "w", **options) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def as_tarfile_finds(file: Path) -> list[tuple[str, int, int]]:
    with tarfile.open(file, "r:") as tar:
        return [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]


def header(name: bytes, size: bytes, kind: bytes = b"0", prefix: bytes = b"") -> bytes:
    """A header with a right checksum, whatever it says."""
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"00000000000\0"
    block += b" " * 8 + kind + bytes(100) + b"ustar\x0000" + bytes(80) + prefix.ljust(155, b"\0")
    block = block.ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def octal(size: int) -> bytes:
    return b"%011o" % size


def padded(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 512) * 512, b"\0")


def pax(**records: str) -> bytes:
    """A PAX header and its payload."""
    data = b""
    for key, value in records.items():
        record = f" {key.replace('__', '.')}={value}\n".encode()
        length = next(n for n in range(len(record), len(record) + 9) if len(str(n)) + len(record) == n)
        data += str(length).encode() + record
    return header(b"pax", octal(len(data)), b"x") + padded(data)


END = bytes(1024)
SOUND = header(b"a.jpg", octal(3)) + padded(b"abc")


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tarfile_is_read(tar_format: int, tmp_path: Path) -> None:
    members = {name: bytes([number]) * (100 + 300 * number) for number, name in enumerate(NAMES)}
    file = make_tar(tmp_path / "a.tar", members, format=tar_format)
    found = scan_tar(file)
    assert [tuple(member) for member in found] == as_tarfile_finds(file)
    content = file.read_bytes()
    assert [content[offset : offset + size] for _, offset, size in found] == list(members.values())


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar program")
@pytest.mark.parametrize("tar_format", ["posix", "gnu", "v7", "oldgnu", "ustar"])
def test_every_format_of_the_tar_program_is_read(tar_format: str, tmp_path: Path) -> None:
    names = [name for name in NAMES if tar_format not in ("v7", "ustar") or len(name) < 90]
    for number, name in enumerate(names):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([number + 1]) * 700)
    (tmp_path / "in" / "link.jpg").symlink_to("/etc/passwd")
    os.link(tmp_path / "in" / "a.jpg", tmp_path / "in" / "again.jpg")
    if tar_format != "v7":
        os.mkfifo(tmp_path / "in" / "pipe.jpg")
    command = ["tar", f"--format={tar_format}", "-cf", "a.tar", "-C", "in", "."]
    subprocess.run(command, cwd=tmp_path, check=True)
    tar = read_tar(tmp_path / "a.tar")
    assert [tuple(member) for member in tar.members] == as_tarfile_finds(tmp_path / "a.tar")
    assert len(tar.members) == len(names)
    assert (tar.skipped["link"], tar.skipped.get("pipe", 0), tar.problem) == (2, tar_format != "v7", None)


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar program")
@pytest.mark.parametrize("tar_format", ["posix", "gnu", "oldgnu"])
def test_sparse_members_are_refused_in_every_format(tar_format: str, tmp_path: Path) -> None:
    (tmp_path / "holes").touch()
    os.truncate(tmp_path / "holes", 10_000_000)
    subprocess.run(["tar", f"--format={tar_format}", "-cSf", "a.tar", "holes"], cwd=tmp_path, check=True)
    with pytest.raises(BadInput, match=r"a\.tar has a sparse member, .* without --sparse"):
        scan_tar(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_tars_are_named_by_their_compression(kind: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", f"w:{kind}"):  # type: ignore[call-overload]
        pass
    with pytest.raises(BadInput, match=r"is compressed \((gzip|bzip2|xz)\)"):
        scan_tar(tmp_path / "a.tar")


def test_a_name_that_begins_as_a_bzip2_does_is_a_name(tmp_path: Path) -> None:
    assert scan_tar(make_tar(tmp_path / "a.tar", {"BZhang.jpg": b"x"}))[0].name == "BZhang.jpg"


def test_names_that_point_elsewhere_are_only_names(tmp_path: Path) -> None:
    names = ["/etc/passwd", "../../up.jpg", "a/../b.jpg"]
    file = make_tar(tmp_path / "a.tar", dict.fromkeys(names, b"x"))
    assert [member.name for member in scan_tar(file)] == names


HOSTILE = {
    "a negative size": header(b"a", b"-0000000001"),
    "a negative size in base 256": header(b"a", b"\xff" * 12),
    "eight exabytes": header(b"a", b"\x80\0\0\0\x7f" + b"\xff" * 7),
    "a size that is no number": header(b"a", b"0x10"),
    "a size with underscores": header(b"a", b"1_0"),
    "a long name of 1 GB": header(b"././@LongLink", octal(1 << 30), b"L") + bytes(4096),
    "a long link of 1 GB": header(b"././@LongLink", octal(1 << 30), b"K") + bytes(4096),
    "a PAX header of 1 GB": header(b"pax", octal(1 << 30), b"x") + bytes(4096),
    "a PAX header for all of 1 GB": header(b"pax", octal(1 << 30), b"g") + bytes(4096),
    "a PAX size below zero": pax(size="-512") + SOUND,
    "a PAX size that is no number": pax(size="1e9") + SOUND,
    "a PAX size of many digits": pax(size="9" * 60) + SOUND,
    "a PAX size beyond the end": pax(size="99999999") + SOUND,
    "a PAX record of no length": header(b"pax", octal(9), b"x") + padded(b"0 path=a\n") + SOUND,
    "a PAX record longer than its header": header(b"pax", octal(9), b"x") + padded(b"99 path=a") + SOUND,
    "a PAX record of many digits": header(b"pax", octal(40), b"x") + padded(b"9" * 40) + SOUND,
    "one name for all": header(b"pax", octal(10), b"g") + padded(b"10 path=a\n") + SOUND,
    "two PAX names": pax(path="a.jpg") + pax(path="b.jpg") + SOUND,
    "a PAX name and a long one": pax(path="a.jpg") + header(b"L", octal(5), b"L") + padded(b"b.jpg") + SOUND,
    "long names without end": (header(b"L", octal(1), b"L") + padded(b"x")) * 3000,
    "a long name and no member": header(b"L", octal(1), b"L") + padded(b"x"),
    "an old sparse map without end": header(b"a", octal(0), b"S") + b"\1" * 512 * 100,
    "a new sparse map": pax(GNU__sparse__major="1", GNU__sparse__minor="0") + SOUND,
    "a wrong checksum": b"b" + SOUND[1:],
    "a header cut off": SOUND[:300],
    "nothing": b"",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_headers_are_a_sentence(what: str, tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    file.write_bytes(HOSTILE[what] + (END if HOSTILE[what] and "cut" not in what else b""))
    for salvage in (False, True):
        assert read_tar(file, salvage=salvage).problem is not None
    with pytest.raises(BadInput, match=r"a\.tar (is|has|gives) "):
        scan_tar(file)


def test_a_sound_tar_after_this_is_no_problem(tmp_path: Path) -> None:
    """So that the cases above fail for what they say, and not for how they are made."""
    (tmp_path / "a.tar").write_bytes(pax(path="c.jpg", size="3") + SOUND + SOUND + END)
    assert read_tar(tmp_path / "a.tar") == Tar([("c.jpg", 1536, 3), ("a.jpg", 2560, 3)], {}, None)  # type: ignore[list-item]


@pytest.mark.parametrize("salvage", [False, True])
def test_sizes_that_only_a_header_claims_take_neither_memory_nor_time(salvage: bool, tmp_path: Path) -> None:
    """Sparse files of 1 GB, so that even a size that the file has is not believed blindly."""
    script = """
import sys, time, resource
from pathlib import Path
from foreseen.data.tars import read_tar
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
for file in sys.argv[2:]:
    assert read_tar(Path(file), salvage=sys.argv[1] == "True").problem
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, time.perf_counter() - began)
"""
    files = []
    for number, kind in enumerate(b"LKxg"):
        file = tmp_path / f"{number}.tar"
        file.write_bytes(header(b"long", octal(1 << 30), bytes([kind])))
        os.truncate(file, (1 << 30) + 4096)
        files.append(str(file))
    command = [sys.executable, "-c", script, str(salvage), *files]
    mib, seconds = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert mib < 20
    assert seconds < 5


def test_alternating_damage_is_salvaged_in_linear_time(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes((SOUND + b"b" + SOUND[1:]) * 3000 + END)
    began = time.process_time()
    assert len(read_tar(tmp_path / "a.tar", salvage=True).members) == 3000
    assert time.process_time() - began < 5


def test_what_stands_behind_a_damaged_header_is_salvaged(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(SOUND + b"b" + SOUND[1:] + pax(path="c.jpg") + SOUND + END)
    strict, saved = read_tar(tmp_path / "a.tar"), read_tar(tmp_path / "a.tar", salvage=True)
    assert [member.name for member in strict.members] == ["a.jpg"]
    assert [member.name for member in saved.members] == ["a.jpg", "c.jpg"]
    assert strict.problem == saved.problem
    assert "is damaged: the checksum of its header at byte 1,024 is wrong" in str(saved.problem)


def test_checksums_of_signed_bytes_are_those_of_very_old_tars(tmp_path: Path) -> None:
    block = bytearray(header("é.jpg".encode(), octal(3)))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % (sum(block) - 256 * sum(byte > 127 for byte in block))
    (tmp_path / "a.tar").write_bytes(bytes(block) + padded(b"abc") + END)
    assert [member.name for member in scan_tar(tmp_path / "a.tar")] == ["é.jpg"]


SEEDS = (SOUND + pax(path="c.jpg") + SOUND + END, header(b"L", octal(6), b"L") + padded(b"l.json") + SOUND + END)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.integers(0, 2500), st.binary(min_size=1, max_size=12)), max_size=3),
    length=st.integers(0, 4000),
)
@example(seed=SEEDS[1], edits=[(512, b"\1" * 7)], length=2560)  # a long name without its NUL
@example(seed=SEEDS[0], edits=[(517, b"\1" * 500)], length=4000)
def test_any_bytes_are_read_as_tarfile_reads_them_or_are_a_sentence(
    seed: bytes, edits: list[tuple[int, bytes]], length: int, tmp_path: Path
) -> None:
    content = bytearray(seed)
    for at, data in edits:
        content[at : at + len(data)] = data
    file = tmp_path / "a.tar"
    file.write_bytes(content[:length])
    try:
        tar = read_tar(file)
    except BadInput:
        return
    for member in tar.members:
        assert 0 <= member.offset <= member.offset + member.size <= length
    if tar.problem is None:
        assert [tuple(member) for member in tar.members] == as_tarfile_finds(file)
    read_tar(file, salvage=True)
