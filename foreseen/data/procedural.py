"""Procedural pets: cartoon animal heads drawn from a seed, so that every recipe runs without a download.

A breed is an ear shape and a coat pattern, and the face shape follows from the two. Everything else is drawn anew for
each picture (pose, colours, light, background, what stands in front), so neither colours nor single pixels tell the
breed; `benchmarks/procedural_shortcuts.py` measures both. A picture is a pure function of (seed, number, size), and
every length is in parts of the head or of the picture, so the same number shows the same pet at any size.

Shapes are signed distances, negative inside, painted with the coverage clip(0.5 - distance in pixels, 0, 1), which
gives smooth edges without supersampling. Planes are [H, W]; pictures are [C, H, W] in [0, 1] until the last step.
"""

import colorsys
import errno
import io
import math
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foreseen.data.pack import pack
from foreseen.data.parallel import count_cpus
from foreseen.data.source import Blob, SourceSample
from foreseen.errors import BadInput
from foreseen.keys import Keys, sample_keys, subkeys, uniform

Plane = NDArray[np.floating[Any]]
Picture = NDArray[np.floating[Any]]
Colour = NDArray[np.floating[Any]]
Traits = dict[str, float]

PET, BACKGROUND, BORDER = 1, 2, 3  # the values of Oxford-IIIT Pet's trimaps
MIN_SIZE, MAX_SIZE = 32, 1024

RANGES: dict[str, tuple[float, float]] = {
    # Pose: the head's centre and unit (about half a head) in parts of the picture, its turn in radians, its skew.
    "x": (0.47, 0.53),
    "y": (0.58, 0.63),
    "unit": (0.31, 0.34),
    "turn": (-0.12, 0.12),
    "aspect": (0.93, 1.07),
    "shear": (-0.06, 0.06),
    "yaw": (-0.12, 0.12),
    "pitch": (-0.06, 0.06),
    # Each ear by itself: radians, and a factor on its length.
    "left_ear_turn": (-0.16, 0.16),
    "right_ear_turn": (-0.16, 0.16),
    "left_ear_length": (0.9, 1.1),
    "right_ear_length": (0.9, 1.1),
    # Coat patterns in head units; phases in periods.
    "bar_period": (0.34, 0.42),
    "bar_phase": (0, 1),
    "bar_lean": (-0.2, 0.2),
    "bar_bend": (0.1, 0.3),
    "spot_period": (0.42, 0.5),
    "spot_x": (0, 1),
    "spot_y": (0, 1),
    "blaze": (0.08, 0.14),
    "mask_top": (0.55, 0.7),
    "mask_bottom": (0.1, 0.25),
    "mask_slant": (0, 0.3),
    # Features in head units; lids below 0.25 are shut, above 1 wide open.
    "eye_x": (0.38, 0.46),
    "eye_y": (0.1, 0.2),
    "eye": (0.13, 0.17),
    "lids": (0.1, 1.6),
    "gaze": (-0.4, 0.4),
    "nose": (0.1, 0.15),
    # Colours. The pattern is always the darker one: with either polarity a small ViT learns little from few labels.
    "coat_hue": (0, 1),
    "coat_saturation": (0, 0.3),
    "coat_value": (0.7, 0.98),
    "pattern_hue": (-0.05, 0.05),
    "pattern_value": (0.15, 0.35),
    "ear_value": (0.75, 0.95),
    "outline_value": (0.25, 0.5),
    "muzzle_whiteness": (0.3, 0.6),
    "iris_hue": (0, 1),
    "iris_saturation": (0.3, 0.8),
    "iris_value": (0.6, 0.95),
    # Background: two colours, and whether they blend, alternate in stripes or in a checkerboard.
    "ground": (0, 1),
    "ground_turn": (0, math.pi),
    "ground_period": (0.12, 0.4),
    "ground_phase": (0, 1),
    "ground_sharpness": (1, 6),
    "ground_one_hue": (0, 1),
    "ground_one_saturation": (0, 0.2),
    "ground_one_value": (0.1, 0.95),
    "ground_two_hue": (0, 1),
    "ground_two_saturation": (0, 0.2),
    "ground_two_value": (0.1, 0.95),
    # What stands in front: a bar, a ball or, mostly, nothing; parts of the picture.
    "occluder": (0, 1),
    "occluder_x": (0.1, 0.9),
    "occluder_y": (0.15, 0.95),
    "occluder_turn": (0, math.pi),
    "bar_width": (0.06, 0.12),
    "ball_radius": (0.08, 0.15),
    "occluder_hue": (0, 1),
    "occluder_saturation": (0, 0.4),
    "occluder_value": (0.1, 0.95),
    # Light and camera: change of light across the picture, gains, contrast, fur's and the sensor's noise. Strong
    # changes of light are what keeps raw pixels from telling the breed, so that the pose can stay steady.
    "light_x": (-0.6, 0.6),
    "light_y": (-0.6, 0.6),
    "exposure": (0.55, 1.1),
    "red": (0.93, 1.07),
    "blue": (0.93, 1.07),
    "gamma": (0.8, 1.3),
    "fur": (0.02, 0.06),
    "noise": (0.01, 0.06),
}
"""Every trait that varies from picture to picture, with the bounds of its uniform draw."""

FIRST_TEST_NUMBER = 12 * 10**9  # far enough that no train split reaches it
PETS_PER_FILE = 500
SOURCE = "foreseen procedural pets"

STRIPED_GROUNDS, CHECKED_GROUNDS = 0.06, 0.06
BARS_IN_FRONT, BALLS_IN_FRONT = 0.06, 0.08
OUTLINE = 0.05  # head units
SKIN = np.array([0.95, 0.6, 0.6], dtype=np.float32).reshape(3, 1, 1)
BLACK = np.full((3, 1, 1), 0.06, dtype=np.float32)


class Ear(NamedTuple):
    """An ear shape: its root in parts of the face's half axes, and its size in head units."""

    x: float
    y: float
    turn: float
    """Radians from straight up, outwards."""
    length: float
    half_width: float
    is_pointed: bool = False
    is_in_front: bool = False


EARS = {
    "pointed": Ear(x=0.60, y=-0.62, turn=0.38, length=0.86, half_width=0.44, is_pointed=True),
    "round": Ear(x=0.68, y=-0.68, turn=0.75, length=0.66, half_width=0.40),
    "floppy": Ear(x=0.72, y=-0.72, turn=2.75, length=1.25, half_width=0.27, is_in_front=True),
    "long": Ear(x=0.40, y=-0.80, turn=0.14, length=1.06, half_width=0.22),
}
COATS = ("barred", "spotted", "masked")
FACES = ((0.92, 0.90), (0.76, 1.02), (1.08, 0.80))
"""Half axes across and down in head units: round, long, wide."""

BREEDS: tuple[str, ...] = tuple(f"{ear}-{coat}" for ear, coat in product(EARS, COATS))


@dataclass(frozen=True)
class ProceduralPet:
    """One picture and what is known of it."""

    image: NDArray[np.uint8]
    """RGB, [size, size, 3]."""
    mask: NDArray[np.uint8]
    """Trimap [size, size] of what is visible: 1 pet, 2 background, 3 the border between them."""
    head_box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels, the last two exclusive: head and ears, also where something hides them."""
    label: int
    """Index into BREEDS."""


class Canvas(NamedTuple):
    """The pixels in head coordinates: u to the right and v down, 0 in the middle of the face."""

    u: Plane
    v: Plane
    unit_px: float


def draw_pet(seed: int, number: int, *, size: int = 48) -> ProceduralPet:
    """Draw one pet; the same arguments give the same bytes.

    Args:
        seed: names the set.
        number: the picture's place in the set, from 0; its label is number modulo the number of breeds.
        size: side of the square picture in pixels, 32 to 1024.

    Raises:
        BadInput: size lies outside its bounds, or number is negative.
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise BadInput(f"procedural pets have {MIN_SIZE} to {MAX_SIZE} pixels a side, not size={size}")
    if number < 0:
        raise BadInput(f"procedural pets are numbered from 0, not number={number}")
    label = number % len(BREEDS)
    ear_index, coat_index = divmod(label, len(COATS))
    ear, coat = list(EARS.values())[ear_index], COATS[coat_index]
    face = FACES[(ear_index + coat_index) % len(FACES)]

    key = subkeys(sample_keys(seed, np.array([number], dtype=np.int64)), "procedural_pet")
    draws = uniform(key, "traits", len(RANGES))[0].tolist()
    traits = {name: low + (high - low) * draw for (name, (low, high)), draw in zip(RANGES.items(), draws, strict=True)}

    canvas = place_head(traits, size)
    ears = ear_distance(traits, canvas, ear, face)
    head = ellipse(canvas.u, canvas.v, *face) * canvas.unit_px
    pet = np.minimum(ears, head)
    image = background(traits, size)
    if ear.is_in_front:
        paint_head(image, traits, key, canvas, head, coat, face)
        paint_ears(image, traits, canvas, ears, has_inside=False)
    else:
        paint_ears(image, traits, canvas, ears, has_inside=True)
        paint_head(image, traits, key, canvas, head, coat, face)
    occluder = occluder_distance(traits, size)
    paint(image, occluder, colour(traits, "occluder"))
    return ProceduralPet(photograph(image, traits, key), trimap(np.maximum(pet, -occluder)), bounding_box(pet), label)


def place_head(traits: Traits, size: int) -> Canvas:
    """Where the head stands, how large, how turned and how skewed."""
    at = pixel_centres(size)
    dx, dy = (at - traits["x"]) / traits["unit"], (at[:, None] - traits["y"]) / traits["unit"]
    sine, cosine = math.sin(traits["turn"]), math.cos(traits["turn"])
    u, v = cosine * dx + sine * dy, cosine * dy - sine * dx
    return Canvas(u / traits["aspect"] + traits["shear"] * v, v * traits["aspect"], traits["unit"] * size)


def pixel_centres(size: int) -> Plane:
    """Where the pixels of a row or column lie, in parts of the picture, [size]."""
    return (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)


def ellipse(x: Plane, y: Plane, half_width: float, half_height: float) -> Plane:
    """Signed distance to an ellipse around the origin, in the unit of x: f / |grad f|, exact to first order."""
    x, y = x / half_width, y / half_height
    norm = np.sqrt(x * x + y * y)
    x, y = x / half_width, y / half_height
    slope = np.sqrt(x * x + y * y)
    distance: Plane = norm * (norm - 1) / np.maximum(slope, 1e-6)
    return distance


def ear_distance(traits: Traits, canvas: Canvas, ear: Ear, face: tuple[float, float]) -> Plane:
    """Signed distance to both ears, in pixels."""
    is_right = (canvas.u > 0).astype(np.float32)
    turn = ear.turn + traits["left_ear_turn"] + is_right * (traits["right_ear_turn"] - traits["left_ear_turn"])
    stretch = traits["left_ear_length"] + is_right * (traits["right_ear_length"] - traits["left_ear_length"])
    x, y = np.abs(canvas.u) - ear.x * face[0], canvas.v - ear.y * face[1]
    sine, cosine = np.sin(turn), np.cos(turn)
    along, across = (x * sine - y * cosine) / stretch, np.abs(x * cosine + y * sine)
    if ear.is_pointed:
        # A triangle: both flanks as one half plane of |across|, and a base a little inside the head.
        flank = (across * ear.length + (along - ear.length) * ear.half_width) / math.hypot(ear.length, ear.half_width)
        distance: Plane = np.maximum(flank, -0.3 - along) - 0.03
    else:
        distance = ellipse(along - 0.38 * ear.length, across, 0.5 * ear.length, ear.half_width)
    return distance * canvas.unit_px


def paint_ears(image: Picture, traits: Traits, canvas: Canvas, ears: Plane, *, has_inside: bool) -> None:
    """Paint outline and fur of both ears, and the bare skin inside those that stand."""
    coat = colour(traits, "coat")
    paint(image, ears, coat * traits["outline_value"])
    paint(image, ears + OUTLINE * canvas.unit_px, coat * traits["ear_value"])
    if has_inside:
        paint(image, ears + 0.13 * canvas.unit_px, coat * SKIN)


def paint_head(
    image: Picture, traits: Traits, key: Keys, canvas: Canvas, head: Plane, coat: str, face: tuple[float, float]
) -> None:
    """Paint the face from the outline to the eyes; yaw and pitch move what is on it, not its edge."""
    light = colour(traits, "coat")
    dark = traits["pattern_value"] * colour(traits | {"coat_hue": traits["coat_hue"] + traits["pattern_hue"]}, "coat")
    unit = canvas.unit_px
    u, v = canvas.u - traits["yaw"] * face[0], canvas.v - traits["pitch"]
    inside = head + OUTLINE * unit
    paint(image, head, light * traits["outline_value"])
    paint(image, inside, light)
    paint(image, np.maximum(inside, coat_distance(traits, key, coat, u, v) * unit), dark)

    below = v - 0.45 * face[1]
    muzzle = ellipse(u, below, 0.42 * face[0], 0.38 * face[1]) * unit
    paint(image, np.maximum(inside, muzzle), light + traits["muzzle_whiteness"] * (1 - light))
    paint(image, ellipse(u, below + 0.14, traits["nose"] * 1.3, traits["nose"]) * unit, BLACK)
    paint(image, np.maximum(np.abs(u) - 0.025, np.abs(below - 0.08) - 0.12) * unit, BLACK)

    eye, lids = traits["eye"], min(max(traits["lids"], 0.25), 1.0)
    x, y = np.abs(u) - traits["eye_x"] * face[0], v + traits["eye_y"]
    paint(image, ellipse(x, y, eye + 0.03, (eye + 0.03) * lids) * unit, BLACK)
    if lids > 0.25:
        paint(image, ellipse(x, y, eye, eye * lids) * unit, colour(traits, "iris"))
        gaze = np.sign(u) * (traits["gaze"] * eye)
        paint(image, ellipse(x - gaze, y, eye * 0.5, eye * 0.75 * lids) * unit, BLACK)


def coat_distance(traits: Traits, key: Keys, coat: str, u: Plane, v: Plane) -> Plane:
    """Signed distance to the dark pattern of a coat, in head units; each covers about two fifths of a face."""
    if coat == "barred":
        place = (u * (1 - traits["bar_bend"] * v) + traits["bar_lean"] * v) / traits["bar_period"] + traits["bar_phase"]
        bars: Plane = (np.abs(place - np.floor(place) - 0.5) - 0.21) * traits["bar_period"]
        return bars
    if coat == "spotted":
        return spot_distance(traits, key, u, v)
    side = np.abs(u)
    brow, cheek = -v - traits["mask_top"], v - traits["mask_bottom"] - traits["mask_slant"] * side
    eye_mask: Plane = np.maximum(np.maximum(brow, cheek), traits["blaze"] - side)
    return eye_mask


def spot_distance(traits: Traits, key: Keys, u: Plane, v: Plane) -> Plane:
    """Signed distance to discs on a jittered brick grid, one to a cell and none across an edge, in head units."""
    cells = 10  # covers heads of 4 units at the smallest period
    middle = cells // 2
    row = v / traits["spot_period"] + (traits["spot_y"] + middle)
    top = np.floor(row)
    column = u / traits["spot_period"] + (traits["spot_x"] + middle) + top % 2 * 0.5
    left = np.floor(column)
    cell = (np.clip(top, 0, cells - 1) * cells + np.clip(left, 0, cells - 1)).astype(np.intp)
    x, y, radius = (draws[cell] for draws in uniform(key, "spots", 3 * cells * cells).reshape(3, -1))
    dx, dy = column - left - 0.42 - 0.16 * x, row - top - 0.42 - 0.16 * y
    distance: Plane = (np.sqrt(dx * dx + dy * dy) - 0.3 - 0.12 * radius) * traits["spot_period"]
    return distance


def background(traits: Traits, size: int) -> Picture:
    """Two colours that blend across the picture, or alternate in stripes or in a checkerboard."""
    one, two = colour(traits, "ground_one"), colour(traits, "ground_two")
    at = pixel_centres(size) - 0.5
    sine, cosine = math.sin(traits["ground_turn"]), math.cos(traits["ground_turn"])
    along, across = cosine * at + sine * at[:, None], cosine * at[:, None] - sine * at
    if traits["ground"] >= STRIPED_GROUNDS + CHECKED_GROUNDS:
        share = traits["ground_sharpness"] * (along + 0.4 * traits["ground_phase"] - 0.2) + 0.5
        return one + np.clip(share, 0, 1) * (two - one)
    turns = 2 * math.pi / traits["ground_period"]
    wave = np.sin(along * turns + 2 * math.pi * traits["ground_phase"])
    if traits["ground"] < CHECKED_GROUNDS:
        wave *= np.sin(across * turns)
    share = np.clip(wave * (size * traits["ground_period"] / 4) + 0.5, 0, 1)
    return one + share * (0.5 * (two - one))


def occluder_distance(traits: Traits, size: int) -> Plane:
    """Signed distance in pixels to the bar or ball before some pets; one picture away where there is none."""
    at = pixel_centres(size)
    dx, dy = at - traits["occluder_x"], at[:, None] - traits["occluder_y"]
    if traits["occluder"] < BARS_IN_FRONT:
        across = math.cos(traits["occluder_turn"]) * dx + math.sin(traits["occluder_turn"]) * dy
        return (np.abs(across) - 0.5 * traits["bar_width"]) * size
    if traits["occluder"] < BARS_IN_FRONT + BALLS_IN_FRONT:
        ball: Plane = (np.sqrt(dx * dx + dy * dy) - traits["ball_radius"]) * size
        return ball
    return np.full((size, size), size, dtype=np.float32)


def colour(traits: Traits, name: str) -> Colour:
    """The RGB colour [C, 1, 1] of the traits NAME_hue, NAME_saturation and NAME_value."""
    rgb = colorsys.hsv_to_rgb(traits[f"{name}_hue"], traits[f"{name}_saturation"], traits[f"{name}_value"])
    return np.array(rgb, dtype=np.float32).reshape(3, 1, 1)


def paint(image: Picture, distance: Plane, tint: Colour) -> None:
    """Lay a colour over the picture where the distance in pixels is negative."""
    image += np.clip(0.5 - distance, 0, 1) * (tint - image)


def photograph(image: Picture, traits: Traits, key: Keys) -> NDArray[np.uint8]:
    """Light from one side, the fur's streaks, white balance, contrast, sensor noise; then 8 bits, [H, W, C]."""
    size = image.shape[-1]
    at = pixel_centres(size) - 0.5
    light = traits["exposure"] * (1 + traits["light_x"] * at + traits["light_y"] * at[:, None])
    light += traits["fur"] * streaks(key, size)
    gains = np.array([traits["red"], 1, traits["blue"]], dtype=np.float32).reshape(3, 1, 1)
    image = np.clip(image * light * gains, 0, 1) ** traits["gamma"]
    image += traits["noise"] * (uniform(key, "noise", image.size).reshape(image.shape) - 0.5)
    return np.ascontiguousarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))


def streaks(key: Keys, size: int) -> Plane:
    """Standing or lying streaks in [-1, 1]: a lattice three times finer across than along, interpolated."""
    *lattice, is_lying = 2 * uniform(key, "fur", 12 * 36 + 1)[0] - 1
    rows, columns = (36, 12) if is_lying > 0 else (12, 36)
    return stretch(stretch(np.array(lattice).reshape(rows, columns), size).T, size).T


def stretch(lattice: Plane, rows: int) -> Plane:
    """Interpolate linearly between the rows of an array until it has as many as asked."""
    at = pixel_centres(rows) * (len(lattice) - 1)
    low = at.astype(np.intp)
    share = (at - low).astype(np.float32)[:, None]
    return lattice[low] * (1 - share) + lattice[low + 1] * share


def trimap(distance: Plane) -> NDArray[np.uint8]:
    """Pet inside, background outside, and the border a fiftieth of the picture to either side of the outline."""
    width_px = 0.02 * len(distance)
    return np.where(distance < -width_px, PET, np.where(distance > width_px, BACKGROUND, BORDER)).astype(np.uint8)


def bounding_box(distance: Plane) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the pixels inside, the last two exclusive."""
    columns, rows = (np.flatnonzero((distance < 0).any(axis=axis)) for axis in (0, 1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def write_procedural_pets(
    out: Path, *, train: int, test: int, size: int, seed: int = 0, workers: int | None = None
) -> None:
    """Draw a packed set with the splits `train` and `test`; it appears at once and whole, or not at all.

    Beside each picture (JPEG, quality 95, full colour) stand its label, `trimap.png` and, in the json, `head_box`.
    The test pictures are the same however many are for training.

    Args:
        out: the set's folder, which must not exist yet.
        train, test: pictures in either split; equally many of each breed if they are multiples of a dozen.
        size: side of the pictures in pixels, 32 to 1024.
        seed: of the pictures and of their order.
        workers: processes; None is one a CPU, 1 works in this process. The result does not depend on it. From a
            script, more than one needs the usual `if __name__ == "__main__":`.

    Raises:
        BadInput: out exists, or a number lies outside its bounds.
    """
    if out.exists():
        raise BadInput(f"{out} exists already: give a new folder for the procedural pets, or delete it")
    for split, pictures in (("train", train), ("test", test)):
        if not 1 <= pictures <= FIRST_TEST_NUMBER:
            raise BadInput(f"{split}={pictures} procedural pets cannot be drawn: give 1 to {FIRST_TEST_NUMBER:,}")
    workers = count_cpus() if workers is None else workers
    draw_pet(seed, 0, size=size)  # refuses a wrong size before a process is started
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as work:
        for split, first, pictures in (("train", 0, train), ("test", FIRST_TEST_NUMBER, test)):
            samples = draw_samples(Path(work), range(first, first + pictures), size, seed, workers)
            pack(samples, Path(work, "set"), split, classes=BREEDS, seed=seed, workers=workers, source=SOURCE)
        try:
            os.replace(Path(work, "set"), out)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise BadInput(f"{out} was written by another process meanwhile: use that set, or delete it") from None


def draw_samples(work: Path, numbers: range, size: int, seed: int, workers: int) -> list[SourceSample]:
    """Draw pets into a folder, a few hundred to a file."""
    parts = [numbers[at : at + PETS_PER_FILE] for at in range(0, len(numbers), PETS_PER_FILE)]
    jobs = [(work / f"{part[0]:012d}", part, size, seed) for part in parts]
    if workers == 1 or len(jobs) == 1:
        return [sample for job in jobs for sample in draw_file(*job)]
    # Spawned, as in `pack`: a fork copies the locks of whatever threads the caller has.
    with ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn")) as pool:
        return [sample for samples in pool.map(draw_file, *zip(*jobs, strict=True)) for sample in samples]


def draw_file(file: Path, numbers: range, size: int, seed: int) -> list[SourceSample]:
    """Draw pets and write their pictures and trimaps into one file."""
    samples = []
    with open(file, "wb") as out:

        def write(data: bytes) -> Blob:
            start = out.tell()
            out.write(data)
            return Blob(str(file), len(data), start)

        for number in numbers:
            pet = draw_pet(seed, number, size=size)
            image = write(encode(pet.image, "JPEG", quality=95, subsampling=0))
            mask = write(encode(pet.mask, "PNG"))
            name = f"{BREEDS[pet.label]}/{number:012d}.jpg"
            sample = SourceSample(name, image, pet.label, boxes={"head_box": pet.head_box}, masks={"trimap.png": mask})
            samples.append(sample)
    return samples


def encode(pixels: NDArray[np.uint8], name: str, **options: int) -> bytes:
    """The bytes of a picture file."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, name, **options)
    return out.getvalue()
