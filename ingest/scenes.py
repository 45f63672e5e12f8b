"""Captioned pictures from a small grammar: what the demo trains on and what its oracle can check.

    one object    a large yellow star at the top left on a white background
    two objects   a small red circle above a large blue square on a green background

A scene is a function of (seed, set, index) and its picture a function of the scene: nothing is stored. Every picture
differs in place, size, tilt, hue and a faint gradient, even where captions agree. A two-object scene has one large and
one small object; `Scene.dominant` is the large one, the only one where there is one.

What is held out of training, for ever and for every seed:
    whole captions     one in eight, by a hash of the caption; their attribute pairs do occur in training
    attribute pairs    HELDOUT_COLOUR_BACKGROUND and HELDOUT_COLOUR_SHAPE, of either object
"""

import colorsys
import functools
import hashlib
import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

SetName = Literal["training", "heldout_captions", "heldout_pairs", "copies"]
Transform = Literal["crop", "jpeg", "blur", "brightness", "flip", "shrink"]
TRANSFORMS: tuple[Transform, ...] = get_args(Transform)

RGB = tuple[int, int, int]
SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("large", "small")
# The colours lie near the corners of the RGB cube, so that a coarse reading of a coarse picture tells them apart.
SHAPE_COLOURS: dict[str, RGB] = {
    "red": (222, 38, 42),
    "yellow": (250, 212, 40),
    "green": (40, 165, 70),
    "cyan": (60, 205, 225),
    "blue": (42, 72, 214),
    "purple": (165, 50, 185),
}
BACKGROUND_COLOURS: dict[str, RGB] = {
    "white": (246, 246, 244),
    "black": (20, 20, 24),
    "grey": (132, 132, 136),
    "green": (40, 165, 70),
    "blue": (42, 72, 214),
    "yellow": (250, 212, 40),
}
# Phrase in the caption → centre of a lone object, in picture coordinates (x right, y down), before its size moves it.
PLACES: dict[str, tuple[float, float]] = {
    "at the top left": (0.0, 0.0),
    "at the top right": (1.0, 0.0),
    "in the centre": (0.5, 0.5),
    "at the bottom left": (0.0, 1.0),
    "at the bottom right": (1.0, 1.0),
}
# Phrase → direction from the second object to the first.
RELATIONS: dict[str, tuple[int, int]] = {
    "above": (0, -1),
    "below": (0, 1),
    "left of": (-1, 0),
    "right of": (1, 0),
}
HELDOUT_COLOUR_BACKGROUND = frozenset(
    {
        ("red", "green"),
        ("yellow", "black"),
        ("green", "white"),
        ("cyan", "blue"),
        ("purple", "grey"),
        ("blue", "yellow"),
    }
)
HELDOUT_COLOUR_SHAPE = frozenset({("red", "star"), ("blue", "triangle"), ("yellow", "square"), ("purple", "circle")})

_TWO_OBJECTS_SHARE = 0.3
_LARGE_SHARE = 0.8
_HELDOUT_CAPTIONS_ONE_IN = 8
_OVERSAMPLE = 4


@dataclass(frozen=True)
class Thing:
    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Attributes in caption order: `things[0]` is named first. `variation` moves pixels, not words."""

    things: tuple[Thing, ...]
    placement: str
    background: str
    variation: int = field(default=0, compare=False)

    @property
    def caption(self) -> str:
        rest = "" if len(self.things) == 1 else f" {self.things[1]}"
        return f"{self.things[0]} {self.placement}{rest} on a {self.background} background"

    @property
    def dominant(self) -> Thing:
        return next((thing for thing in self.things if thing.size == "large"), self.things[0])

    @property
    def dominant_position(self) -> tuple[int, int]:
        """Which third of the picture the dominant object's centre is drawn to: (-1|0|1, -1|0|1), x right, y down."""
        if len(self.things) == 1:
            x, y = PLACES[self.placement]
            return round(2 * x - 1), round(2 * y - 1)
        dx, dy = RELATIONS[self.placement]
        return (dx, dy) if self.dominant is self.things[0] else (-dx, -dy)

    @property
    def attribute_pairs(self) -> frozenset[tuple[str, str, str]]:
        """What must have been seen together for a caption to be a new combination of known pairs."""
        pairs = {("shape×background", thing.shape, self.background) for thing in self.things}
        for thing in self.things:
            pairs.add(("colour×shape", thing.colour, thing.shape))
            pairs.add(("colour×background", thing.colour, self.background))
            pairs.add(("colour×placement", thing.colour, self.placement))
            pairs.add(("shape×placement", thing.shape, self.placement))
        return frozenset(pairs)


@dataclass(frozen=True)
class Copy:
    """A row of the evaluation set `copies`: the training index that it was made from and how, or neither."""

    scene: Scene
    training_index: int | None
    transform: Transform | None


def parse_caption(caption: str) -> Scene:
    """The attributes that a caption names. ValueError for what the grammar does not make."""
    head, separator, tail = caption.removesuffix(" background").rpartition(" on a ")
    words = head.split(" ")
    try:
        if not separator or words[0] != "a" or tail not in BACKGROUND_COLOURS:
            raise ValueError
        first, rest = Thing(*words[1:4]), " ".join(words[4:])
        if rest in PLACES:
            scene = Scene((first,), rest, tail)
        else:
            relation, _, second = rest.rpartition(" a ")
            scene = Scene((first, Thing(*second.split(" "))), relation, tail)
        known = all(t.size in SIZES and t.colour in SHAPE_COLOURS and t.shape in SHAPES for t in scene.things)
        if not known or (rest not in PLACES and scene.placement not in RELATIONS) or scene.caption != caption:
            raise ValueError
    except (ValueError, TypeError):
        raise ValueError(f"{caption!r} is not a caption of the scene grammar") from None
    return scene


def is_heldout_caption(caption: str) -> bool:
    digest = hashlib.blake2b(caption.encode(), digest_size=8, person=b"unclip-scenes").digest()
    return int.from_bytes(digest, "big") % _HELDOUT_CAPTIONS_ONE_IN == 0


def has_heldout_pair(scene: Scene) -> bool:
    return any(
        (thing.colour, scene.background) in HELDOUT_COLOUR_BACKGROUND
        or (thing.colour, thing.shape) in HELDOUT_COLOUR_SHAPE
        for thing in scene.things
    )


def _pick(rng: random.Random, options: tuple[str, ...]) -> str:
    return options[int(rng.random() * len(options))]


def _any_scene(rng: random.Random) -> Scene:
    # Only rng.random(): its sequence is promised to stay, that of choice() and shuffle() is not.
    background = _pick(rng, tuple(BACKGROUND_COLOURS))
    colours = tuple(colour for colour in SHAPE_COLOURS if colour != background)
    first = _pick(rng, colours)
    variation = int(rng.random() * 2**48)
    if rng.random() >= _TWO_OBJECTS_SHARE:
        size = SIZES[rng.random() >= _LARGE_SHARE]
        return Scene((Thing(size, first, _pick(rng, SHAPES)),), _pick(rng, tuple(PLACES)), background, variation)
    second = _pick(rng, tuple(colour for colour in colours if colour != first))
    large_first = rng.random() < 0.5
    things = (
        Thing(SIZES[not large_first], first, _pick(rng, SHAPES)),
        Thing(SIZES[large_first], second, _pick(rng, SHAPES)),
    )
    return Scene(things, _pick(rng, tuple(RELATIONS)), background, variation)


def _random(key: str) -> random.Random:
    return random.Random(f"unclip scenes/{key}")  # noqa: S311


def _candidates(seed: int, set_name: str, index: int) -> Iterator[Scene]:
    rng = _random(f"{seed}/{set_name}/{index}")
    while True:
        yield _any_scene(rng)


def training_scene(seed: int, index: int) -> Scene:
    for scene in _candidates(seed, "training", index):
        if not has_heldout_pair(scene) and not is_heldout_caption(scene.caption):
            return scene
    raise AssertionError("the stream of candidates does not end")


@functools.lru_cache(maxsize=4)
def _training_pairs(seed: int, count: int) -> frozenset[tuple[str, str, str]]:
    return frozenset().union(*(training_scene(seed, index).attribute_pairs for index in range(count)))


def heldout_caption_scene(seed: int, index: int, *, training_count: int) -> Scene:
    """A caption that no training row has, of attribute pairs that the first `training_count` rows all have."""
    seen = _training_pairs(seed, min(training_count, 20_000))
    for attempt, scene in enumerate(_candidates(seed, "heldout_captions", index)):
        new_caption = is_heldout_caption(scene.caption) and not has_heldout_pair(scene)
        # A training set of a handful of scenes cannot cover the pairs; then the caption alone is new.
        if new_caption and (attempt > 2000 or scene.attribute_pairs <= seen):
            return scene
    raise AssertionError("the stream of candidates does not end")


def heldout_pair_scene(seed: int, index: int) -> Scene:
    """A scene whose dominant object has an attribute pair that no training row has."""
    for scene in _candidates(seed, "heldout_pairs", index):
        if has_heldout_pair(Scene((scene.dominant,), scene.placement, scene.background)):
            return scene
    raise AssertionError("the stream of candidates does not end")


def copy_scene(seed: int, index: int, *, training_count: int, copied_share: float) -> Copy:
    """Row `index` of the set `copies`. The unrelated ones show attribute pairs that training never shows."""
    copied_before, copied = int(index * copied_share), int((index + 1) * copied_share)
    if copied == copied_before:
        for scene in _candidates(seed, "copies", index):
            if len(scene.things) == 2 and has_heldout_pair(Scene((scene.dominant,), scene.placement, scene.background)):
                return Copy(scene, None, None)
    rng = _random(f"{seed}/copy/{index}")
    training_index = int(rng.random() * training_count)
    return Copy(training_scene(seed, training_index), training_index, TRANSFORMS[copied_before % len(TRANSFORMS)])


def _shifted(colour: RGB, rng: random.Random) -> RGB:
    hue, light, saturation = colorsys.rgb_to_hls(*(channel / 255 for channel in colour))
    hue += (rng.random() - 0.5) * 0.024
    light = min(0.97, max(0.03, light + (rng.random() - 0.5) * 0.05))
    red, green, blue = colorsys.hls_to_rgb(hue % 1, light, saturation)
    return round(255 * red), round(255 * green), round(255 * blue)


def _background(colour: RGB, size: int, rng: random.Random) -> Image.Image:
    corners = Image.new("RGB", (2, 2))
    shift = [round((rng.random() - 0.5) * 22) for _ in range(4)]
    for corner, amount in enumerate(shift):
        shade = tuple(min(255, max(0, channel + amount)) for channel in colour)
        corners.putpixel((corner % 2, corner // 2), shade)
    # Between the centres of the four pixels: the gradient then runs over the whole picture.
    return corners.resize((size, size), Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))


def _outline(shape: str, tilt: float) -> list[tuple[float, float]]:
    """Corners of a shape of unit radius around the origin."""
    if shape == "square":
        return [(math.cos(tilt + a * math.pi / 2), math.sin(tilt + a * math.pi / 2)) for a in (0.5, 1.5, 2.5, 3.5)]
    if shape == "triangle":
        angles = [tilt - math.pi / 2 + a * 2 * math.pi / 3 for a in range(3)]
        # Lowered, so that the box around the triangle, not its circumcircle, is centred.
        return [(1.08 * math.cos(a), 1.08 * math.sin(a) + 0.24) for a in angles]
    radii = (1.08, 0.46)
    return [
        (
            radii[k % 2] * math.cos(tilt - math.pi / 2 + k * math.pi / 5),
            radii[k % 2] * math.sin(tilt - math.pi / 2 + k * math.pi / 5),
        )
        for k in range(10)
    ]


def _draw_thing(picture: Image.Image, thing: Thing, x: float, y: float, radius: float, rng: random.Random) -> None:
    """x, y, radius as shares of the picture's side."""
    side = picture.width
    left, top = math.floor((x - 1.1 * radius) * side), math.floor((y - 1.1 * radius) * side)
    extent = math.ceil(2.2 * radius * side) + 1
    scale = radius * side * _OVERSAMPLE
    centre_x, centre_y = (x * side - left) * _OVERSAMPLE, (y * side - top) * _OVERSAMPLE
    mask = Image.new("L", (extent * _OVERSAMPLE, extent * _OVERSAMPLE))
    canvas = ImageDraw.Draw(mask)
    tilt = (rng.random() - 0.5) * 0.3
    if thing.shape == "circle":
        canvas.ellipse((centre_x - scale, centre_y - scale, centre_x + scale, centre_y + scale), fill=255)
    else:
        canvas.polygon(
            [(centre_x + scale * px, centre_y + scale * py) for px, py in _outline(thing.shape, tilt)], fill=255
        )
    picture.paste(_shifted(SHAPE_COLOURS[thing.colour], rng), (left, top), mask.reduce(_OVERSAMPLE))


def draw(scene: Scene, size: int = 256) -> Image.Image:
    """The scene's picture, `size`×`size`, RGB, antialiased."""
    rng = _random(f"variation/{scene.variation}")
    picture = _background(_shifted(BACKGROUND_COLOURS[scene.background], rng), size, rng)

    def jitter(amount: float) -> float:
        return (2 * rng.random() - 1) * amount

    if len(scene.things) == 1:
        thing = scene.things[0]
        radius = 0.27 + jitter(0.025) if thing.size == "large" else 0.13 + jitter(0.015)
        margin = 0.33 if thing.size == "large" else 0.22
        place_x, place_y = PLACES[scene.placement]
        x = margin + place_x * (1 - 2 * margin) + jitter(0.03)
        y = margin + place_y * (1 - 2 * margin) + jitter(0.03)
        _draw_thing(picture, thing, x, y, radius, rng)
        return picture

    dx, dy = RELATIONS[scene.placement]
    for thing, sign in zip(scene.things, (1, -1), strict=True):
        large = thing.size == "large"
        radius = 0.255 + jitter(0.02) if large else 0.115 + jitter(0.012)
        along = (0.16 if large else 0.33) * sign
        across = jitter(0.06 if large else 0.12)
        x = 0.5 + dx * along + (across if dx == 0 else jitter(0.02))
        y = 0.5 + dy * along + (across if dy == 0 else jitter(0.02))
        _draw_thing(picture, thing, x, y, radius, rng)
    return picture


def transformed(picture: Image.Image, transform: Transform) -> Image.Image:
    """A near-duplicate, as the web makes them."""
    side = picture.width
    if transform == "crop":
        edge = round(0.06 * side)
        return picture.crop((edge, edge, side - edge // 2, side - edge // 2)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
    if transform == "blur":
        return picture.filter(ImageFilter.GaussianBlur(side / 100))
    if transform == "brightness":
        return ImageEnhance.Brightness(picture).enhance(0.85)
    if transform == "flip":
        return ImageOps.mirror(picture)
    if transform == "shrink":
        return picture.resize((side // 2, side // 2), Image.Resampling.BOX)
    packed = io.BytesIO()
    picture.save(packed, "JPEG", quality=25)
    return Image.open(packed).convert("RGB")
