"""Packing: bytes kept, stock readers served, kills survived, bad pictures named."""

import errno
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foreseen.data import pack as pack_module
from foreseen.data.decode import decode
from foreseen.data.manifest import read_manifest
from foreseen.data.pack import pack
from foreseen.data.publish import lock_folder
from foreseen.data.shards import ShardSet
from foreseen.data.source import Blob, FolderListing, Missing, SourceSample
from foreseen.data.tars import scan_tar
from foreseen.data.write_shard import ShardJob, ShardResult, write_shard
from foreseen.errors import BadInput


def save(file: Path, width: int = 48, height: int = 32, seed: int = 0, **options: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    Image.fromarray(((ramp + 17 * seed) % 256).astype(np.uint8)).save(file, **options)
    return file


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def facts(folder: Path, split: str) -> list[dict[str, object]]:
    """Every KEY.json of a split."""
    found = []
    for file in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(file) as tar:
            found += [json.load(tar.extractfile(info)) for info in tar if info.name.endswith(".json")]  # type: ignore[arg-type]
    return found


def test_jpeg_bytes_are_kept_and_every_picture_is_there_once(picture_folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    samples = FolderListing(picture_folder)
    summary = pack(samples, tmp_path / "set", "train", shard_samples=10, workers=1, progress=lambda *n: seen.append(n))
    assert (summary.samples, summary.shards, summary.unreadable, summary.image) == (37, 4, [], "jpg")
    assert seen == [(0, 37), (10, 37), (20, 37), (30, 37), (37, 37)]
    data = ShardSet.open(tmp_path / "set", "train")
    packed = [data.read(sample) for sample in range(37)]
    assert sorted(packed) == sorted(file.read_bytes() for file in picture_folder.rglob("*.jpg"))
    names = [fact["path"] for fact in facts(tmp_path / "set", "train")]
    assert names != sorted(names), "the samples are shuffled"
    for name, read, fact in zip(names, packed, facts(tmp_path / "set", "train"), strict=True):
        assert read == (picture_folder / str(name)).read_bytes()
        height, width = decode(read, fast=False).shape[:2]
        assert (fact["width"], fact["height"], fact["label"]) == (width, height, None)
    assert data.labels is None


def test_the_bytes_do_not_depend_on_the_workers_but_on_the_seed(picture_folder: Path, tmp_path: Path) -> None:
    samples = FolderListing(picture_folder, labels="folder")
    for name, workers, seed in (("one", 1, 0), ("two", 2, 0), ("other", 1, 1)):
        pack(samples, tmp_path / name, "train", classes=samples.classes, shard_samples=8, workers=workers, seed=seed)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one")["train-000000.tar"] != contents(tmp_path / "other")["train-000000.tar"]


def run_reader(script: str, *arguments: str, **environment: str) -> list[object]:
    """Run a stock reader in a process of its own; what it prints as json."""
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True)
    found: list[object] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_stock_webdataset_reads_the_shards(small_shards: Path) -> None:
    script = """
import json, sys, zlib, webdataset
samples = webdataset.WebDataset(sys.argv[1:], shardshuffle=False, empty_check=False)
print(json.dumps([[zlib.crc32(sample["jpg"]), json.loads(sample["json"])["label"]] for sample in samples]))
"""
    data = ShardSet.open(small_shards, "train")
    assert data.labels is not None
    expected = [[zlib.crc32(data.read(number)), int(label)] for number, label in enumerate(data.labels)]
    assert run_reader(script, *map(str, sorted(small_shards.glob("train-*.tar")))) == expected


def test_hugging_face_datasets_reads_the_shards(small_shards: Path, tmp_path: Path) -> None:
    script = """
import json, sys, datasets
rows = datasets.load_dataset("webdataset", data_files={"train": sys.argv[1]}, cache_dir=sys.argv[2])["train"]
print(json.dumps([[*row["jpg"].size, row["json"]] for row in rows]))
"""
    files, cache = str(small_shards / "train-*.tar"), str(tmp_path / "cache")
    found = run_reader(script, files, cache, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert found == [[fact["width"], fact["height"], fact] for fact in facts(small_shards, "train")]


PACKING = """
import sys
from pathlib import Path
from foreseen.data.pack import pack
from foreseen.data.source import FolderListing
if __name__ == "__main__":
    samples = FolderListing(sys.argv[1], labels="folder")
    print("begun", flush=True)
    pack(samples, sys.argv[2], "train", classes=samples.classes, shard_samples=3, max_side=45, workers=2,
         progress=lambda done, total: print(done, flush=True))
"""


def test_a_killed_packing_goes_on_and_gives_the_same_bytes(picture_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "packing.py"
    script.write_text(PACKING)
    out = tmp_path / "set"
    command = [sys.executable, str(script), str(picture_folder), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip().isdigit() and int(line) >= 6:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (out / "manifest.json").exists(), "the split came to exist before it was whole"
    with pytest.raises(BadInput, match="has not finished"):
        ShardSet.open(out, "train")
    samples = FolderListing(picture_folder, labels="folder")
    kwargs = {"classes": samples.classes, "shard_samples": 3, "workers": 1}
    with pytest.raises(BadInput, match=r"unfinished packing of the same pictures with max_side 45, quality 90: finish"):
        pack(samples, out, "train", **kwargs, quality=80)  # type: ignore[arg-type]
    summary = pack(samples, out, "train", **kwargs, max_side=45)  # type: ignore[arg-type]
    assert 2 <= summary.kept_shards < summary.shards
    pack(samples, tmp_path / "whole", "train", **kwargs, max_side=45)  # type: ignore[arg-type]
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("at", range(12))
@pytest.mark.parametrize("replacing", [False, True])
def test_a_kill_at_any_rename_leaves_a_whole_set_or_none(
    at: int, replacing: bool, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = FolderListing(picture_folder)[:12]
    kwargs = {"shard_samples": 6, "workers": 1, "overwrite": replacing}
    if replacing:
        pack(FolderListing(picture_folder), tmp_path / "set", "train", shard_samples=6, workers=1)
    pack(samples, tmp_path / "whole", "train", **kwargs)  # type: ignore[arg-type]
    replace, calls = os.replace, iter(range(1000))

    def stop_before(source: object, target: object) -> None:
        if next(calls) == at:
            raise KeyboardInterrupt
        replace(source, target)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_before)
        try:
            pack(samples, tmp_path / "set", "train", **kwargs)  # type: ignore[arg-type]
        except KeyboardInterrupt:
            try:
                found = ShardSet.open(tmp_path / "set", "train")
            except BadInput:
                pass
            else:
                found.check_sizes()
                assert [len(found.read(sample)) > 0 for sample in range(len(found))]
            summary = pack(samples, tmp_path / "set", "train", **kwargs)  # type: ignore[arg-type]
            written = 0 if at < 3 else 1 if at < 5 else 2  # the plan, then each shard and what says it is finished
            assert summary.kept_shards == written
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_unreadable_pictures_are_left_out_and_named(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number in range(6):
        save(source / f"{number}.jpg", seed=number)
    (source / "page.jpg").write_text("<html>")
    (source / "half.jpg").write_bytes((source / "0.jpg").read_bytes()[:400])
    (source / "empty.jpg").touch()
    seen = ["empty.jpg", "half.jpg", "page.jpg"]
    summary = pack(FolderListing(source), tmp_path / "set", "train", shard_samples=2, workers=1)
    assert sorted(name for name, _ in summary.unreadable) == seen
    assert dict(summary.unreadable)["page.jpg"].startswith("it is a web page")
    lines = (tmp_path / "set" / "train.unreadable.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == seen
    data = ShardSet.open(tmp_path / "set", "train")
    assert len(data) == 6
    data.check_sizes()
    with pytest.raises(
        BadInput, match=r"3 of 9 pictures cannot be read, so nothing was packed; empty\.jpg: it is empty"
    ):
        pack(FolderListing(source), tmp_path / "strict", "train", workers=1, strict=True)
    assert sorted(contents(tmp_path / "strict")) == ["train.unreadable.txt"]
    for name in seen:
        (source / name).unlink()
    assert pack(FolderListing(source), tmp_path / "strict", "train", workers=1, strict=True).samples == 6
    assert "train.unreadable.txt" not in contents(tmp_path / "strict")


def test_a_folder_in_which_nothing_can_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(BadInput, match=r"1 of 1 pictures cannot be read"):
        pack(FolderListing(tmp_path), tmp_path / "set", "train", workers=1)


def test_only_pictures_above_max_side_are_shrunk_and_masks_and_boxes_with_them(tmp_path: Path) -> None:
    large, small = save(tmp_path / "large.jpg", 120, 60), save(tmp_path / "small.jpg", 40, 30)
    samples = []
    for file, size in ((large, (120, 60)), (small, (40, 30))):
        mask = tmp_path / f"{file.stem}.png"
        Image.fromarray(np.tile(np.arange(size[0]) // 40 * 90, (size[1], 1)).astype(np.uint8)).save(mask)
        blobs = [Blob(str(path), path.stat().st_size) for path in (file, mask)]
        samples.append(SourceSample(file.name, blobs[0], boxes={"box": (30, 6, 60, 60)}, masks={"mask.png": blobs[1]}))
    summary = pack(samples, tmp_path / "set", "train", max_side=50, workers=1)
    assert summary.shrunk == 1
    found = {}
    with tarfile.open(tmp_path / "set" / "train-000000.tar") as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    for name, data in members.items():
        if name.endswith(".json"):
            fact = json.loads(data)
            found[fact["path"]] = (
                fact,
                members[name.replace("json", "jpg")],
                members[name.replace("json", "mask.png")],
            )
    fact, image, mask_data = found["large.jpg"]
    assert (fact["width"], fact["height"], fact["box"]) == (50, 25, [12, 2, 25, 25])
    assert decode(image, fast=False).shape == (25, 50, 3)
    labels = np.asarray(Image.open(io.BytesIO(mask_data)))
    assert labels.shape == (25, 50)
    assert set(labels.ravel()) == {0, 90, 180}, "a label map is never blended"
    fact, image, mask_data = found["small.jpg"]
    assert image == small.read_bytes()
    assert mask_data == (tmp_path / "small.png").read_bytes()
    assert (fact["width"], fact["box"]) == (40, [30, 6, 40, 30]), "boxes stay within the picture"


def test_a_mask_of_another_size_makes_its_sample_unreadable(tmp_path: Path) -> None:
    file, mask = save(tmp_path / "a.jpg", 40, 30), save(tmp_path / "a.png", 30, 40)
    blobs = [Blob(str(path), path.stat().st_size) for path in (file, mask)]
    with pytest.raises(BadInput, match=r"a\.jpg: trimap\.png is 30 x 40 pixels, the picture 40 x 30"):
        pack([SourceSample("a.jpg", blobs[0], masks={"trimap.png": blobs[1]})], tmp_path / "set", "train", workers=1)


@pytest.mark.parametrize(
    ("suffixes", "image", "converted"),
    [
        ((".png", ".png"), "png", 0),
        ((".webp", ".webp"), "webp", 0),
        ((".png", ".bmp"), "png", 1),
        ((".jpg", ".png", ".webp"), "jpg", 2),
    ],
)
def test_the_set_has_one_format_and_says_how_many_were_converted(
    suffixes: tuple[str, ...], image: str, converted: int, tmp_path: Path
) -> None:
    files = [save(tmp_path / "source" / f"{number}{suffix}", 32, 32) for number, suffix in enumerate(suffixes)]
    summary = pack(FolderListing(tmp_path / "source"), tmp_path / "set", "train", workers=1)
    assert (summary.image, summary.converted, summary.unreadable) == (image, converted, [])
    data = ShardSet.open(tmp_path / "set", "train")
    names = [fact["path"] for fact in facts(tmp_path / "set", "train")]
    for number, name in enumerate(names):
        original = (tmp_path / "source" / str(name)).read_bytes()
        if files[0].suffix == Path(str(name)).suffix:
            assert data.read(number) == original
        difference = decode(data.read(number), fast=False).astype(int) - decode(original, fast=False)
        assert np.abs(difference).max() <= (0 if image != "jpg" else 12)


def test_a_png_that_is_called_jpg_is_converted(tmp_path: Path) -> None:
    save(tmp_path / "source" / "a.png").rename(tmp_path / "source" / "a.jpg")
    save(tmp_path / "source" / "b.jpg")
    assert pack(FolderListing(tmp_path / "source"), tmp_path / "set", "train", workers=1).converted == 1
    data = ShardSet.open(tmp_path / "set", "train")
    assert all(data.read(sample).startswith(b"\xff\xd8\xff") for sample in range(2))


def test_a_second_split_joins_and_an_existing_one_is_refused(picture_folder: Path, tmp_path: Path) -> None:
    samples = FolderListing(picture_folder, labels="folder")
    out = tmp_path / "set"
    pack(samples, out, "train", classes=samples.classes, workers=1)
    before = contents(out)["train-000000.tar"]
    pack(samples[:5], out, "val", classes=samples.classes, workers=1)
    assert {name: split.samples for name, split in read_manifest(out).splits.items()} == {"train": 37, "val": 5}
    with pytest.raises(BadInput, match=r"already has a split 'val' of 5 samples"):
        pack(samples, out, "val", classes=samples.classes, workers=1)
    with pytest.raises(BadInput, match=r"other classes"):
        pack(samples, out, "test", classes=["x", "y"], workers=1)
    pack(samples, out, "val", classes=samples.classes, shard_samples=20, workers=1, overwrite=True)
    pack(samples[:5], out, "val", workers=1, overwrite=True)
    assert len(ShardSet.open(out, "val")) == 5
    assert contents(out)["train-000000.tar"] == before
    expected = {"manifest.json", "train-000000.tar", "train.index.npy", "train.labels.npy"}
    assert set(contents(out)) == expected | {"val-000000.tar", "val.index.npy", "val.labels.npy", "val.duplicates.txt"}


def test_two_packings_into_one_folder_are_refused(picture_folder: Path, tmp_path: Path) -> None:
    samples = FolderListing(picture_folder)

    def second(done: int, total: int) -> None:
        with pytest.raises(BadInput, match="another process is packing"):
            pack(samples, tmp_path / "set", "test", workers=1)

    pack(samples, tmp_path / "set", "train", workers=1, progress=second)
    assert list(read_manifest(tmp_path / "set").splits) == ["train"]


def test_a_full_disk_gets_a_sentence_and_what_is_finished_is_kept(
    picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = iter(range(10))

    def write_two(job: ShardJob) -> ShardResult:
        if next(jobs) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_shard(job)

    samples = FolderListing(picture_folder)
    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "write_shard", write_two)
        with pytest.raises(BadInput, match=r"the disk of .* is full: make room"):
            pack(samples, tmp_path / "set", "train", shard_samples=10, workers=1)
    assert pack(samples, tmp_path / "set", "train", shard_samples=10, workers=1).kept_shards == 2


def test_channel_statistics_are_those_of_the_pixels(small_shards: Path) -> None:
    data = ShardSet.open(small_shards, "train")
    pixels = [decode(data.read(sample), fast=False).reshape(-1, 3) / 255 for sample in range(len(data))]
    mean = np.mean([p.mean(0) for p in pixels], axis=0)
    std = np.sqrt(np.mean([(p**2).mean(0) for p in pixels], axis=0) - mean**2)
    assert data.mean == pytest.approx(mean, abs=1e-5)
    assert data.std == pytest.approx(std, abs=1e-5)


def test_a_listing_skips_what_is_hidden_or_no_picture(tmp_path: Path) -> None:
    for name in ("b/1.JPG", "a/deep/2.jpeg", "a/._3.jpg", ".hidden/4.jpg", "a/.5.jpg"):
        save(tmp_path / name, format="JPEG")
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    listing = FolderListing(tmp_path, labels="folder")
    assert [sample.name for sample in listing] == ["a/deep/2.jpeg", "b/1.JPG"]
    assert [sample.label for sample in listing] == [0, 1]
    assert listing.skipped == 1
    save(tmp_path / "top.jpg")
    with pytest.raises(BadInput, match=r"top\.jpg lies in no class folder"):
        FolderListing(tmp_path, labels="folder")


def test_a_split_may_lack_a_class_but_not_bring_a_new_one(tmp_path: Path) -> None:
    save(tmp_path / "b" / "1.jpg")
    assert [sample.label for sample in FolderListing(tmp_path, labels="folder", classes=("a", "b"))] == [1]
    with pytest.raises(BadInput, match=r"class 'b' that the set does not have: a, c"):
        FolderListing(tmp_path, labels="folder", classes=("a", "c"))


def test_bad_input_gets_a_sentence_and_leaves_nothing(picture_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="does not exist"):
        FolderListing(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="is empty"):
        FolderListing(tmp_path / "empty")
    samples = FolderListing(picture_folder)
    for option, value, message in (
        ("split", "a/b", "--split is 'a/b'"),
        ("shard_samples", 0, r"--shard-samples is 0, it must lie in \[1"),
        ("max_side", 0, "--max-side is 0"),
        ("quality", 101, "--quality is 101"),
        ("workers", 0, "--workers is 0"),
    ):
        with pytest.raises(BadInput, match=message):
            pack(samples, tmp_path / "set", **({"split": "train"} | {option: value}))  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="no pictures to pack"):
        pack([], tmp_path / "set", "train")
    with pytest.raises(BadInput, match=r"holds other files \(a\)"):
        pack(samples, picture_folder, "train")
    assert not (tmp_path / "set").exists()
    assert sorted(file.name for file in picture_folder.iterdir()) == ["a", "b", "c"]


def test_odd_file_names_do_not_break_the_json(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save(source / "a.jpg").rename(os.fsdecode(os.fsencode(source) + b"/caf\xe9\n.jpg"))
    pack(FolderListing(source), tmp_path / "set", "train", workers=1)
    assert facts(tmp_path / "set", "train")[0]["path"] == "caf�\\n.jpg"


def make_tar(file: Path, tar_format: int, names: list[str]) -> Path:
    with tarfile.open(file, "w", format=tar_format) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 100 + 300 * number
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return file


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("long", ["d/" * 60 + "b.jpg", "é" * 20 + ".jpg", "x" * 90 + ".jpg"])
def test_the_header_scan_finds_what_tarfile_finds(tar_format: int, long: str, tmp_path: Path) -> None:
    file = make_tar(tmp_path / "a.tar", tar_format, ["a.jpg", long, "c.json"])
    content = file.read_bytes()
    with tarfile.open(file) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    assert [tuple(member) for member in scan_tar(file)] == expected
    assert content[expected[1][1] : expected[1][1] + 400] == b"\1" * 400


def test_tars_that_cannot_be_indexed_are_refused_with_the_reason(tmp_path: Path) -> None:
    file = make_tar(tmp_path / "a.tar", tarfile.USTAR_FORMAT, ["a.jpg", "b.jpg"])
    content = file.read_bytes()
    file.write_bytes(content[:1700])
    with pytest.raises(BadInput, match=r"truncated: b\.jpg should end at byte 1,936, the file has 1,700"):
        scan_tar(file)
    file.write_text("<html>" * 200)
    with pytest.raises(BadInput, match="no tar"):
        scan_tar(file)
    shutil.make_archive(str(tmp_path / "b"), "gztar", tmp_path)
    with pytest.raises(BadInput, match=r"compressed \(gzip\)"):
        scan_tar(tmp_path / "b.tar.gz")
    if shutil.which("tar"):
        (tmp_path / "holes").write_bytes(b"")
        os.truncate(tmp_path / "holes", 10_000_000)
        subprocess.run(["tar", "-cSf", "c.tar", "holes"], cwd=tmp_path, check=True)
        with pytest.raises(BadInput, match="sparse"):
            scan_tar(tmp_path / "c.tar")


def test_workers_end_when_the_packing_is_killed(picture_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "packing.py"
    script.write_text(
        PACKING.replace("samples = Fol", "import time; samples = Fol").replace(
            "print(done, flush=True)", "time.sleep(9 * (done > 0))"
        )
    )
    process = subprocess.Popen(
        [sys.executable, str(script), str(picture_folder), str(tmp_path / "set")], start_new_session=True
    )
    try:
        for _ in range(200):
            if list((tmp_path / "set" / ".packing-train").glob("*.done.json")):
                break
            time.sleep(0.1)
        workers = _members_of_session(process.pid) - {process.pid}
        assert workers
    finally:
        process.kill()
        process.wait()
    for _ in range(100):
        if not _members_of_session(process.pid):
            break
        time.sleep(0.1)
    assert not _members_of_session(process.pid)


def _members_of_session(session: int) -> set[int]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.add(int(folder.name))
    return found


def test_a_missing_picture_says_nothing_of_the_format(tmp_path: Path) -> None:
    png = save(tmp_path / "source" / "a.png")
    samples = [*FolderListing(tmp_path / "source"), SourceSample("row 14", Missing("row 14 names no file"))]
    summary = pack(samples, tmp_path / "set", "train", workers=1)
    assert (summary.image, summary.converted, len(summary.unreadable)) == ("png", 0, 1)
    assert ShardSet.open(tmp_path / "set", "train").read(0) == png.read_bytes()


def test_a_split_is_kept_only_where_the_same_was_packed_in_the_same_way(picture_folder: Path, tmp_path: Path) -> None:
    samples = FolderListing(picture_folder)
    first = pack(samples, tmp_path / "set", "train", workers=1)
    before = contents(tmp_path / "set")
    again = pack(samples, tmp_path / "set", "train", workers=1, keep=True)
    assert (again.was_there, again.samples, again.bytes, first.was_there) == (True, 37, first.bytes, False)
    assert contents(tmp_path / "set") == before
    for other, options in ((samples, {"max_side": 45}), (samples[:5], {})):
        with pytest.raises(BadInput, match="already has a split 'train'"):
            pack(other, tmp_path / "set", "train", workers=1, keep=True, **options)  # type: ignore[arg-type]


def test_shards_of_a_stated_size_are_no_larger_and_nearly_full(tmp_path: Path) -> None:
    for number in range(140):
        save(tmp_path / "source" / f"{number}.png", 40 + 4 * (number % 30), 60, seed=number)
    samples = FolderListing(tmp_path / "source")
    for shard_samples, workers in ((None, 2), (None, 1), (5, 1)):
        out = tmp_path / f"set {shard_samples} {workers}"
        summary = pack(samples, out, "train", shard_mb=0.1, shard_samples=shard_samples, workers=workers)
        assert summary.samples == 140
        shards = read_manifest(out).splits["train"].shards
        assert len(shards) > 3
        assert all(shard.bytes <= 100_000 for shard in shards)
        data = ShardSet.open(out, "train")
        data.check_sizes()
        assert sorted(data.read(number) for number in range(140)) == sorted(
            file.read_bytes() for file in (tmp_path / "source").iterdir()
        )
        if shard_samples is None:
            assert all(shard.bytes >= 70_000 for shard in shards[:-1])
        else:
            assert all(shard.samples <= 5 for shard in shards)
    assert contents(tmp_path / "set None 1") == contents(tmp_path / "set None 2")


def test_a_picture_larger_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    (tmp_path / "source").mkdir()
    for number in range(3):
        Image.fromarray(noise).save(tmp_path / "source" / f"{number}.png")
    pack(FolderListing(tmp_path / "source"), tmp_path / "set", "train", shard_mb=0.1, workers=1)
    shards = read_manifest(tmp_path / "set").splits["train"].shards
    assert [(shard.name, shard.samples) for shard in shards] == [(f"train-{n:06d}.tar", 1) for n in range(3)]
    with pytest.raises(BadInput, match=r"--shard-size is 0\.01, it must lie in \[0\.1, 1000000\]"):
        pack(FolderListing(tmp_path / "source"), tmp_path / "set", "test", shard_mb=0.01, workers=1)


def test_a_killed_packing_by_size_goes_on(picture_folder: Path, tmp_path: Path) -> None:
    kwargs = {"shard_mb": 0.1, "shard_samples": 7, "workers": 1}
    samples = FolderListing(picture_folder)
    pack(samples, tmp_path / "whole", "train", **kwargs)  # type: ignore[arg-type]

    def stop(done: int, total: int) -> None:
        if done >= 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(samples, tmp_path / "set", "train", **kwargs, progress=stop)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="the same pictures with shard_samples 7, shard_bytes 100000"):
        pack(samples, tmp_path / "set", "train", workers=1)
    assert pack(samples, tmp_path / "set", "train", **kwargs).kept_shards == 2  # type: ignore[arg-type]
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_a_lock_that_another_packing_gives_up_just_then_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = fcntl.flock

    def end_of_the_other(number: int, how: int) -> None:
        (tmp_path / ".packing.lock").unlink()
        take(number, how)

    monkeypatch.setattr("foreseen.files.fcntl.flock", end_of_the_other)
    with pytest.raises(BadInput, match="another process is packing"), lock_folder(tmp_path):
        pytest.fail("a third packing would take a lock of its own")
