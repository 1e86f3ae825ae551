"""Drawn pictures with questions about them, for the training and the evaluation of nano-vision.

A *thing* is a shape or a digit in a colour.  Some pairs of thing and colour are held out: they are
never drawn in training.  This module needs Pillow.

    >>> picture = draw(random.Random(0), held_out=True, kind="one", ratio=(8, 8))
    >>> picture.question, picture.answer
    ('What colour is it?', 'green')
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (236, 200, 20),
    "purple": (140, 50, 170),
    "pink": (245, 120, 185),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "ring")
DIGITS = tuple("0123456789")
PLACES = ("first", "second")
UNIT = 24  # pixels of a drawing for each soft token along a side
# One thing; two of them side by side; some equal shapes to count; two pictures; a film of three
# frames.
KINDS = ("one", "two", "count", "pictures", "film")
# Rows and columns of soft tokens, all of at most 70.
RATIOS = ((8, 8), (7, 9), (9, 7), (6, 11), (5, 14))


@dataclass(frozen=True)
class Picture:
    """A question about one or more images, and its one right answer.

    ``things`` are those of all images, from left to right.  ``seconds`` are the times of a film's
    frames.
    """

    images: tuple[Image.Image, ...]
    question: str
    answer: str
    things: tuple[Thing, ...]
    seconds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Thing:
    kind: str
    colour: str

    @property
    def name(self) -> str:
        return f"a {self.colour} {self.kind}"

    @property
    def is_held_out(self) -> bool:
        """Whether the pair of kind and colour is held out, as one pair in ten is."""
        return hashlib.sha256(self.name.encode()).digest()[0] % 10 == 0


def draw(rng: random.Random, held_out: bool, kind: str, ratio: tuple[int, int]) -> Picture:
    """Draw a question and its images.

    Args:
        rng: The source of random numbers.
        held_out: Whether at least one thing is one that training never shows.
        kind: The kind of question.
        ratio: The rows and columns of soft tokens of an image.
    """
    if kind == "count":
        return _count(rng, held_out, ratio)
    amount = {"one": 1, "two": 2, "pictures": 2, "film": 3}[kind]
    things: list[Thing] = []
    for place in range(amount):
        taken = [thing.kind for thing in things]
        things.append(_thing(rng, held_out and place == 0, DIGITS + SHAPES, taken))
    rng.shuffle(things)
    place = next(
        (i for i, thing in enumerate(things) if thing.is_held_out), rng.randrange(amount)
    )  # the thing that the question is about
    if kind == "one":
        what = "digit" if things[0].kind in DIGITS else "shape"
        question, answer = rng.choice(
            (
                ("What is in the picture?", things[0].name),
                ("What colour is it?", things[0].colour),
                (f"Which {what} is it?", things[0].kind),
            )
        )
        return Picture((_scene(rng, things, ratio),), question, answer, tuple(things))
    if kind == "two":
        question, answer = rng.choice(
            (
                (f"What is on the {('left', 'right')[place]}?", things[place].name),
                (f"What colour is the {things[place].kind}?", things[place].colour),
            )
        )
        return Picture((_scene(rng, things, ratio),), question, answer, tuple(things))
    scenes = tuple(_scene(rng, [thing], ratio) for thing in things)
    if kind == "film":
        return Picture(
            scenes,
            f"What is shown at 00:0{place}?",
            things[place].name,
            tuple(things),
            tuple(range(amount)),
        )
    question, answer = rng.choice(
        (
            (f"Which picture shows {things[place].name}?", f"the {PLACES[place]}"),
            (f"What is in the {PLACES[place]} picture?", things[place].name),
        )
    )
    return Picture(scenes, question, answer, tuple(things))


def _thing(rng: random.Random, held_out: bool, kinds: tuple[str, ...], taken: list[str]) -> Thing:
    while True:
        thing = Thing(rng.choice(kinds), rng.choice(tuple(COLOURS)))
        if thing.is_held_out == held_out and thing.kind not in taken:
            return thing


def _count(rng: random.Random, held_out: bool, ratio: tuple[int, int]) -> Picture:
    thing = _thing(rng, held_out, SHAPES, [])
    image = _paper(rng, ratio)
    amount = rng.randint(1, 4)
    width, height = image.size
    spots = rng.sample([(column, row) for column in range(3) for row in range(2)], amount)
    for column, row in spots:
        side = min(width / 3, height / 2)
        centre = (width * (column + 0.5) / 3, height * (row + 0.5) / 2)
        _paint(rng, image, thing, centre, side * rng.uniform(0.65, 0.85), side * 0.05)
    return Picture((image,), f"How many {thing.kind}s are there?", str(amount), (thing,) * amount)


def _scene(rng: random.Random, things: list[Thing], ratio: tuple[int, int]) -> Image.Image:
    """Draw an image.

    Args:
        rng: The source of random numbers.
        things: The things, from left to right.
        ratio: The rows and columns of soft tokens of the image.
    """
    image = _paper(rng, ratio)
    width, height = image.size
    for place, thing in enumerate(things):
        share = width / len(things)
        side = min(share, height)
        _paint(
            rng,
            image,
            thing,
            (share * (place + 0.5), height / 2),
            side * rng.uniform(0.65, 0.92),
            side * 0.05,
        )
    return image


def _paper(rng: random.Random, ratio: tuple[int, int]) -> Image.Image:
    shade = rng.randint(215, 255)
    tint = tuple(min(255, shade + rng.randint(-12, 12)) for _ in range(3))
    return Image.new("RGB", (ratio[1] * UNIT, ratio[0] * UNIT), tint)


def _paint(
    rng: random.Random,
    image: Image.Image,
    thing: Thing,
    centre: tuple[float, float],
    size: float,
    shift: float,
) -> None:
    """Draw one thing, a bit moved and turned.

    Args:
        rng: The source of colour, angle and place.
        image: The image to draw on.
        thing: What to draw.
        centre: Its middle (x, y), in pixels.
        size: Its height in pixels.
        shift: The most pixels by which the middle moves along each axis.
    """
    colour = tuple(
        max(0, min(255, value + rng.randint(-14, 14))) for value in COLOURS[thing.colour]
    )
    mask = _mask(thing.kind, size)
    edge = mask.width
    half = edge / 2
    mask = mask.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR)
    at = (
        round(centre[0] + rng.uniform(-shift, shift) - half),
        round(centre[1] + rng.uniform(-shift, shift) - half),
    )
    image.paste(colour, (*at, at[0] + edge, at[1] + edge), mask)


def _mask(kind: str, size: float) -> Image.Image:
    """A square image of a shape or digit, white on black, ``size`` pixels high."""
    edge = math.ceil(size * 1.5)
    mask = Image.new("L", (edge, edge))
    pen = ImageDraw.Draw(mask)
    half = edge / 2
    radius = size / 2
    if kind in DIGITS:
        font = ImageFont.load_default(size * 1.15)
        pen.text((half, half), kind, fill=255, font=font, anchor="mm")
    elif kind == "square":
        pen.rectangle(_box(half, 0.85 * radius), fill=255)
    elif kind == "triangle":
        low = half + 0.8 * radius
        pen.polygon([(half, half - radius), (half + radius, low), (half - radius, low)], fill=255)
    elif kind == "star":
        pen.polygon(_star(half, radius), fill=255)
    else:
        pen.ellipse(_box(half, radius), fill=255)
        if kind == "ring":
            pen.ellipse(_box(half, 0.55 * radius), fill=0)
    return mask


def _box(centre: float, reach: float) -> tuple[float, float, float, float]:
    """The square of ``reach`` pixels to each side of the middle."""
    return (centre - reach, centre - reach, centre + reach, centre + reach)


def _star(half: float, radius: float) -> list[tuple[float, float]]:
    """The ten corners of a star; outer and inner corners alternate."""
    corners = []
    for number in range(10):
        angle = math.tau * number / 10
        x = half + radius * math.sin(angle)
        y = half - radius * math.cos(angle)
        if number % 2:
            x = half + (x - half) * 0.4
            y = half + (y - half) * 0.4
        corners.append((x, y))
    return corners
