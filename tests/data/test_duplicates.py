"""Exact duplicates are named when packing, near ones on request; what only looks alike to a checksum is not claimed."""

import io
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from foreseen.data import duplicates as duplicates_module
from foreseen.data import near_duplicates as near_module
from foreseen.data.check import check_set
from foreseen.data.check_duplicates import check_duplicates
from foreseen.data.duplicates import Pair, exact_duplicates
from foreseen.data.manifest import Manifest, Shard, Split, read_manifest, write_manifest
from foreseen.data.near_duplicates import _alike, near_duplicates, perceptual_hashes
from foreseen.data.pack import pack
from foreseen.data.pets import pack_pets
from foreseen.data.shards import INDEX_ROW, ShardSet
from foreseen.data.source import FolderListing


def scene(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """A picture with shapes of its own, as different from those of other seeds as photographs are."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 7, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def folder(root: Path, pictures: dict[str, bytes]) -> Path:
    for name, data in pictures.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def jpeg(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def open_splits(path: Path, *splits: str) -> list[ShardSet]:
    return [ShardSet.open(path, split) for split in splits]


def test_packing_reports_duplicates_within_a_split_and_leaks_across(tmp_path: Path) -> None:
    a, b, c = (jpeg(scene(seed)) for seed in range(3))
    train = folder(tmp_path / "a", {"one.jpg": a, "again.jpg": a, "third time.jpg": a, "two.jpg": b})
    summary = pack(FolderListing(train), tmp_path / "set", "train", workers=1)
    assert (summary.samples, summary.duplicates) == (4, {"train": 2}), "duplicates are kept"
    test = folder(tmp_path / "b", {"x.jpg": b, "y.jpg": c, "z.jpg": a})
    summary = pack(FolderListing(test), tmp_path / "set", "test", workers=1)
    assert summary.duplicates == {"train": 2}
    lines = (tmp_path / "set" / "test.duplicates.txt").read_text().splitlines()
    assert lines[0] == "x.jpg\ttrain\ttwo.jpg"
    assert lines[1].startswith("z.jpg\ttrain\t")
    within = (tmp_path / "set" / "train.duplicates.txt").read_text().splitlines()
    assert {line.split("\t")[0] for line in within} | {line.split("\t")[2] for line in within} == {
        "one.jpg", "again.jpg", "third time.jpg",
    }  # fmt: skip
    (test / "x.jpg").unlink()
    (test / "z.jpg").unlink()
    assert pack(FolderListing(test), tmp_path / "set", "test", workers=1, overwrite=True).duplicates == {}
    assert not (tmp_path / "set" / "test.duplicates.txt").exists()


def test_a_picture_that_is_in_three_splits_is_paired_with_each(tmp_path: Path) -> None:
    same = jpeg(scene(0))
    for split in ("train", "val", "test"):
        source = folder(tmp_path / split, {f"{split}.jpg": same, f"{split}-2.jpg": jpeg(scene(hash(split) % 999 + 5))})
        pack(FolderListing(source), tmp_path / "set", split, workers=1)
    found = exact_duplicates(open_splits(tmp_path / "set", "train", "val", "test"))
    assert sorted(zip(found["set"].tolist(), found["other_set"].tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2)]


def set_of_bytes(path: Path, pictures: list[bytes], crc32: int) -> ShardSet:
    """A split whose index gives every picture the same checksum."""
    path.mkdir()
    index = np.zeros(len(pictures), INDEX_ROW)
    with open(path / "train-000000.tar", "wb") as out:
        for row, data in enumerate(pictures):
            out.seek(512 * (2 * row + 1))
            index[row] = (2 * row + 1, len(data), crc32)
            out.write(data)
    np.save(path / "train.index.npy", index)
    shard = Shard("train-000000.tar", len(pictures), (path / "train-000000.tar").stat().st_size)
    split = Split(len(pictures), (shard,), "jpg", "train.index.npy", "", None, None, None, None, None, None)
    write_manifest(path, Manifest({"train": split}))
    return ShardSet.open(path, "train")


def test_a_checksum_that_agrees_by_chance_is_not_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreseen.data.shards.zlib.crc32", lambda data: 7)
    data = set_of_bytes(tmp_path / "set", [b"one picture", b"two picture", b"one picture"], crc32=7)
    found = exact_duplicates([data])
    assert found[["sample", "other"]].tolist() == [(0, 2)]


def test_pictures_whose_checksum_is_not_known_are_not_compared(tmp_path: Path) -> None:
    assert len(exact_duplicates([set_of_bytes(tmp_path / "set", [b"same", b"same"], crc32=0)])) == 0


def test_a_shard_that_has_gone_does_not_stop_the_comparison(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", {"a.jpg": jpeg(scene(0)), "b.jpg": jpeg(scene(0))})
    for split in ("train", "test"):
        pack(FolderListing(source), tmp_path / "set", split, workers=1)
    sets = open_splits(tmp_path / "set", "train", "test")
    os.unlink(tmp_path / "set" / "train-000000.tar")
    assert exact_duplicates(sets)[["set", "other_set"]].tolist() == [(1, 1)]
    (tmp_path / "set" / "train.index.npy").unlink()
    assert pack(FolderListing(source), tmp_path / "set", "val", workers=1).duplicates == {"test": 2, "val": 1}


def test_many_repeats_of_one_picture_give_as_many_pairs_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, samples = np.zeros(300, np.int64), np.arange(300)
    hashes = np.repeat(np.arange(3, dtype=np.uint64), 100)[:, None].repeat(2, 1)
    monkeypatch.setattr(duplicates_module, "_hash_candidates", lambda sets: (numbers, samples, hashes))
    found = exact_duplicates([None])  # type: ignore[list-item]
    assert len(found) == 297
    assert set(found["sample"].tolist()) == {0, 100, 200}


# Near duplicates


def variants(image: Image.Image) -> dict[str, bytes]:
    """One shot as it comes back from the web."""
    width, height = image.size
    small = image.resize((width // 2, height // 2), Image.Resampling.LANCZOS)
    cropped = image.crop((width // 50, height // 50, width - width // 50, height - height // 50))
    return {
        "original.jpg": jpeg(image, quality=95), "again.jpg": jpeg(image, quality=30), "small.jpg": jpeg(small),
        "cropped.jpg": jpeg(cropped), "brighter.jpg": jpeg(Image.eval(image, lambda value: min(255, value * 9 // 8))),
    }  # fmt: skip


@pytest.fixture(scope="module")
def looks_alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits of 60 pictures; five versions of one shot in train and, of another, two in test and one in train."""
    root = tmp_path_factory.mktemp("alike")
    train = {f"{seed}.jpg": jpeg(scene(seed)) for seed in range(100, 160)} | variants(scene(1))
    test = {f"{seed}.jpg": jpeg(scene(seed)) for seed in range(200, 260)}
    train["leak.jpg"] = jpeg(scene(2))
    test |= {"leaked.jpg": jpeg(scene(2), quality=40), "leaked in a mirror.jpg": jpeg(ImageOps.mirror(scene(2)))}
    blank = jpeg(Image.new("RGB", (64, 64), "white"))
    test |= {"blank.jpg": blank, "blank too.jpg": jpeg(Image.new("RGB", (70, 70), "white"))}
    for split, pictures in (("train", train), ("test", test)):
        pack(FolderListing(folder(root / split, pictures)), root / "set", split, workers=1)
    return root / "set"


def named(sets: list[ShardSet], found: np.ndarray) -> set[frozenset[str]]:
    return {
        frozenset({str(sets[a].facts(i)["path"]), str(sets[b].facts(j)["path"])})
        for a, i, b, j in found[["set", "sample", "other_set", "other"]].tolist()
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_versions_of_one_shot_are_found_within_and_across_splits_and_nothing_else(
    looks_alike: Path, workers: int
) -> None:  # fmt: skip
    sets = open_splits(looks_alike, "train", "test")
    seen: list[tuple[int, int]] = []
    found = near_duplicates(sets, workers, progress=lambda *numbers: seen.append(numbers))
    assert seen[-1] == (len(sets[0]) + len(sets[1]),) * 2
    pairs = named(sets, found.pairs)
    versions = set(variants(scene(1)))
    assert frozenset({"leak.jpg", "leaked.jpg"}) in pairs
    assert set().union(*pairs) == versions | {"leak.jpg", "leaked.jpg"}
    assert (found.plain, found.unreadable) == (2, 0)
    assert (found.pairs["likeness"] > 0.9).all()
    assert (found.pairs["distance"] <= 10).all()


def test_mirror_images_are_found_when_asked_for(looks_alike: Path) -> None:
    sets = open_splits(looks_alike, "train", "test")
    pairs = named(sets, near_duplicates(sets, 1, mirrored=True).pairs)
    assert frozenset({"leak.jpg", "leaked in a mirror.jpg"}) in pairs
    assert not any("leaked in a mirror.jpg" in pair for pair in named(sets, near_duplicates(sets, 1).pairs))


def test_unreadable_pictures_are_counted_and_passed_over(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", {"a.jpg": jpeg(scene(0)), "b.jpg": jpeg(scene(0), quality=50)})
    pack(FolderListing(source), tmp_path / "set", "train", workers=1)
    index = np.load(tmp_path / "set" / "train.index.npy")
    index["crc32"][0] ^= 1
    np.save(tmp_path / "set" / "train.index.npy", index)
    found = near_duplicates(open_splits(tmp_path / "set", "train"), 1)
    assert (len(found.pairs), found.unreadable) == (0, 1)


@pytest.mark.parametrize("distance", [0, 1, 2, 3, 6, 7, 8, 9, 10])
def test_the_look_up_finds_every_pair_that_comparing_all_with_all_finds(
    distance: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 300, dtype=np.int64).astype(np.uint64)
    near = hashes[:200].copy()
    for row in range(200):
        for bit in rng.choice(64, row % 13, replace=False):
            near[row] ^= np.uint64(1) << np.uint64(bit)
    everything = np.unique(rng.permutation(np.concatenate([hashes, near])))
    bits = np.unpackbits((everything[:, None] ^ everything).view(np.uint8).reshape(len(everything), -1, 8), axis=2).sum(
        2
    )
    expected = np.argwhere(np.triu(bits <= distance, 1))
    assert len(expected) >= 15 * distance
    monkeypatch.setattr(near_module, "_BLOCK", 50)
    np.testing.assert_array_equal(_alike(everything, distance), expected)


def test_a_pair_is_found_wherever_its_different_bits_lie() -> None:
    """Ten bits, shared out among the four parts in every way; other pairs are too far apart to be found."""
    shares = [share for share in itertools.product(range(11), repeat=4) if sum(share) == 10]
    hashes = np.random.default_rng(1).integers(0, 2**63, len(shares), dtype=np.int64).astype(np.uint64)
    flips = [sum(((1 << bits) - 1) << 16 * part for part, bits in enumerate(share)) for share in shares]
    found = _alike(np.concatenate([hashes, hashes ^ np.array(flips, np.uint64)]), 10)
    np.testing.assert_array_equal(found, np.arange(len(shares))[:, None] + [0, len(shares)])


def test_a_thousand_equal_hashes_give_a_thousand_pairs_and_not_half_a_million() -> None:
    assert len(_alike(np.full(1000, 12345, np.uint64), 10)) == 999


def test_the_mirrored_hash_is_the_hash_of_the_mirror_image() -> None:
    grey = np.asarray(scene(3).convert("L").resize((32, 32)), np.float32)
    upright, mirrored = perceptual_hashes(grey)
    assert perceptual_hashes(grey[:, ::-1]).tolist() == [mirrored, upright]


@pytest.mark.slow
def test_the_pets_hold_24_near_duplicates_across_train_and_test(pets_archives: Path, tmp_path: Path) -> None:
    """All 51 pairs were looked at: most show one shot, some nine another moment of one scene, and none two scenes."""
    pack_pets(tmp_path, pets_archives, workers=2)
    assert read_manifest(tmp_path).splits.keys() == {"train", "test"}
    found = check_set(tmp_path, decode=False, workers=2)
    check_duplicates(found, tmp_path, workers=2)
    across = [pair for pair in found.faults if isinstance(pair, Pair)]
    assert (len(across) + len(found.duplicates), len(across)) == (51, 24)
    surely = [pair for pair in across if pair.likeness > 0.98]
    assert (len(surely) + sum(pair.likeness > 0.98 for pair in found.duplicates), len(surely)) == (42, 23)
    assert all(pair.path.endswith(".jpg") and pair.other_path.endswith(".jpg") for pair in across), "names of files"
    assert all(pair.split != pair.other_split for pair in across)
