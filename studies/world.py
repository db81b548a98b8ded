"""A drawn world in which a question's level matters and colour alone does not tell things apart.

A scene is a textured ground under a slope of light, one object or three, each with a pattern and a small figure in its
core, and one tiny mark. All of them share one palette that is drawn anew for every scene, and all patches of a scene
have one mean colour: things differ from the ground as camouflage does, by texture and outline. Facts are drawn
independently of each other, so that no question can be answered without the picture.

Shapes: S scenes, h x w pixels, N patches of the grid.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np

SIZE, PATCH = 96, 8  # pixels per side of a picture and of a patch
GRID = SIZE // PATCH
GROUNDS = ("waves", "grass", "dunes", "gravel")
TIMES = ("morning", "noon", "evening")
NUMBERS = {"few": 1, "many": 3}
SHAPES = ("circle", "square", "triangle", "diamond")
PATTERNS = ("striped", "dotted", "checked", "plain")
CORES = ("hole", "slit", "bolt")
MARKS = ("cross", "dot", "bar", "ring")
INKS = {"black": 20, "white": 235}
YES_NO = ("yes", "no")
LEVELS = ("coarse", "medium", "fine", "pixel")

REACH = 12  # half the width of an object, in pixels: 3 x 3 patches
FIGURE = 4  # of a mark and of what is in an object's core: one patch
CELL = GRID // 3  # objects and mark stand in different cells of a 3 x 3 layout, each of so many patches a side
CELLS = tuple((CELL * column, CELL * row) for row in range(3) for column in range(3))
LUMINANCES = (80, 115, 155, 200)
TONES = ((3, 1), (3, 0), (2, 0), (2, 1))  # of the palette, that an object may have
RIM = 0.45  # brightness of an object's rim, of that of its lighter tone

# First seeds of the splits; a split never reaches the next one's. Those from 20,000,000 were the test split of an
# earlier world, which docs/study.md tells of.
SPLITS = {"train": 0, "validation": 10_000_000, "test": 30_000_000}
SPLIT_SIZE = 10_000_000


@dataclass(frozen=True)
class Thing:
    """An object: shape, pattern, the figure in its core, two tones of the palette, lighter first, and its centre."""

    shape: str
    pattern: str
    core: str
    tones: tuple[int, int]
    centre: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """Everything that is in a picture; two equal scenes are drawn equal, to the pixel."""

    ground: str
    time: str
    number: str
    things: tuple[Thing, ...]
    mark: str
    ink: str
    mark_centre: tuple[int, int]
    seed: int

    def draw(self) -> np.ndarray:
        """The picture, (96, 96, 3) uint8."""
        random = np.random.default_rng(self.seed)
        palette_43 = _palette(random)
        ground_43 = random.permutation(palette_43)
        picture_hw3 = ground_43[_ground_mask(self.ground, random).astype(np.int64)]
        for thing in self.things:
            _draw_thing(picture_hw3, thing, palette_43)
        _draw_figure(picture_hw3, MARK_FIGURES[self.mark], self.mark_centre, INKS[self.ink])
        _level_patches(picture_hw3)
        picture_hw3 *= _light(self.time)[..., None]
        picture_hw3 += random.normal(0, 3, picture_hw3.shape)
        return picture_hw3.clip(0, 255).astype(np.uint8)

    def patch_words(self) -> list[list[str]]:
        """What each patch shows, in words: an object's looks, in its middle its core too; the mark; the ground."""
        words = [["ground", self.ground, self.time] for _ in range(GRID * GRID)]
        for thing in self.things:
            for patch in _patches_within(thing.centre, REACH):
                words[patch] = [thing.pattern, thing.shape]
            for patch in _patches_within(thing.centre, FIGURE):
                words[patch] = [thing.pattern, thing.shape, thing.core]
        for patch in _patches_within(self.mark_centre, FIGURE):
            words[patch] = ["tiny", self.ink, self.mark]
        return words

    def patches(self, kind: str, subject: str | None) -> list[int]:
        """The patches that show what a question of this kind is about: all, those of its object, of the mark."""
        if KIND_LEVEL[kind] == "coarse":
            return list(range(GRID * GRID))
        if kind in ("mark", "ink", "has_mark"):
            return _patches_within(self.mark_centre, FIGURE)
        thing = next((thing for thing in self.things if subject in (thing.shape, thing.pattern)), None)
        return [] if thing is None else _patches_within(thing.centre, FIGURE if kind == "core_of" else REACH)


@dataclass(frozen=True)
class Question:
    """A question, its answer (one word), its kind, and the shape or pattern that it names, if any."""

    text: str
    answer: str
    kind: str
    subject: str | None = None

    @property
    def level(self) -> str:
        return KIND_LEVEL[self.kind]


ANSWERS = {
    "ground": GROUNDS, "time": TIMES, "number": tuple(NUMBERS),
    "shape_of": SHAPES, "pattern_of": PATTERNS, "has_shape": YES_NO, "has_pattern": YES_NO, "has_pair": YES_NO,
    "core_of": CORES,
    "mark": MARKS, "ink": tuple(INKS), "has_mark": YES_NO,
}  # fmt: skip
KIND_LEVEL = {
    "ground": "coarse", "time": "coarse", "number": "coarse",
    "shape_of": "medium", "pattern_of": "medium", "has_shape": "medium", "has_pattern": "medium", "has_pair": "medium",
    "core_of": "fine",
    "mark": "pixel", "ink": "pixel", "has_mark": "pixel",
}  # fmt: skip
PRESENCE = tuple(kind for kind, answers in ANSWERS.items() if answers == YES_NO)
PHRASINGS = {
    "ground": ("what is the ground ?", "what covers the ground ?"),
    "time": ("what time is it ?", "which time of day ?"),
    "number": ("few or many objects ?", "how many objects ?"),
    "shape_of": ("shape of the {} object ?", "which shape is {} ?"),
    "pattern_of": ("pattern of the {} ?", "how is the {} filled ?"),
    "has_shape": ("is there a {} ?", "can you see a {} ?"),
    "has_pattern": ("is there a {} object ?", "is any object {} ?"),
    "has_pair": ("is there a {} ?", "can you see a {} ?"),
    "core_of": ("what is inside the {} ?", "core of the {} ?"),
    "mark": ("what is the tiny mark ?", "which tiny mark ?"),
    "ink": ("ink of the tiny mark ?", "which ink has the mark ?"),
    "has_mark": ("is there a tiny {} ?", "is the mark a {} ?"),
}


def seeds(split: str, count: int, first: int = 0) -> range:
    """
    The seeds of scenes `first` to `first + count` of a split.

    Raises:
        ValueError: an unknown split, or scenes beyond its end.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {tuple(SPLITS)}")
    if first < 0 or count < 0 or first + count > SPLIT_SIZE:
        raise ValueError(f"{split} has {SPLIT_SIZE} scenes; scenes {first} to {first + count} are not among them")
    return range(SPLITS[split] + first, SPLITS[split] + first + count)


def make_scene(seed: int) -> Scene:
    random = Random(f"scene {seed}")
    number = random.choice(tuple(NUMBERS))
    count = NUMBERS[number]
    *cells, mark_cell = random.sample(CELLS, count + 1)
    shapes, patterns = random.sample(SHAPES, count), random.sample(PATTERNS, count)
    return Scene(
        ground=random.choice(GROUNDS),
        time=random.choice(TIMES),
        number=number,
        things=tuple(
            Thing(shape, pattern, random.choice(CORES), random.choice(TONES), _centre(cell, random, 1, 2))
            for shape, pattern, cell in zip(shapes, patterns, cells)
        ),
        mark=random.choice(MARKS),
        ink=random.choice(tuple(INKS)),
        mark_centre=_centre(mark_cell, random, 0, CELL - 1),
        seed=seed,
    )


def make_questions(scene: Scene) -> list[Question]:
    """One question of each kind, in the order of `ANSWERS`; what it names and its phrasing are the seed's."""
    random = Random(f"questions {scene.seed}")
    return [_question(kind, scene, random) for kind in ANSWERS]


def sentences(scene: Scene) -> list[str]:
    """The scene in words: every fact once, one sentence for each thing, in no order that means anything."""
    random = Random(f"sentences {scene.seed}")
    told = [f"the ground is {scene.ground} .", f"it is {scene.time} .", f"{scene.number} objects ."]
    told.append(random.choice((f"a tiny {scene.ink} {scene.mark} .", f"a tiny {scene.mark} in {scene.ink} .")))
    for thing in scene.things:
        told.append(
            random.choice(
                (
                    f"a {thing.pattern} {thing.shape} with a {thing.core} .",
                    f"a {thing.shape} is {thing.pattern} and has a {thing.core} .",
                )
            )
        )
    random.shuffle(told)
    return told


def draw_all(scenes: Iterable[Scene]) -> np.ndarray:
    """(S,h,w,3) uint8."""
    return np.stack([scene.draw() for scene in scenes])


def patch_colours(pictures_Shw3: np.ndarray) -> np.ndarray:
    """The mean colour of each patch in [0, 1], (S,N,3) fp32."""
    count = len(pictures_Shw3)
    tiles = pictures_Shw3.reshape(count, GRID, PATCH, GRID, PATCH, 3)  # (S,h,w,3) -> (S,H,p,W,p,3)
    return (tiles.mean((2, 4)) / 255).reshape(count, GRID * GRID, 3).astype(np.float32)


def _question(kind: str, scene: Scene, random: Random) -> Question:
    subject = answer = None
    thing = random.choice(scene.things)
    if kind in ("ground", "time", "number", "mark", "ink"):
        answer = getattr(scene, kind)
    elif kind == "shape_of":
        subject, answer = thing.pattern, thing.shape
    elif kind in ("pattern_of", "core_of"):
        subject, answer = thing.shape, thing.pattern if kind == "pattern_of" else thing.core
    else:
        answer = random.choice(YES_NO)
        subject = _presence_subject(kind, scene, answer == "yes", random)
    return Question(random.choice(PHRASINGS[kind]).format(subject), answer, kind, subject)


def _presence_subject(kind: str, scene: Scene, present: bool, random: Random) -> str:
    """A thing that is there, or one that is not; an absent pair has a shape or a pattern that is there."""
    if kind == "has_pair":
        there = [f"{thing.pattern} {thing.shape}" for thing in scene.things]
        shapes, patterns = [thing.shape for thing in scene.things], [thing.pattern for thing in scene.things]
        near = [f"{p} {s}" for p in PATTERNS for s in SHAPES if p in patterns or s in shapes]
    elif kind == "has_mark":
        there, near = [scene.mark], MARKS
    else:
        part = kind.removeprefix("has_")
        there, near = [getattr(thing, part) for thing in scene.things], SHAPES if part == "shape" else PATTERNS
    return random.choice(there if present else [name for name in near if name not in there])


def _centre(cell: tuple[int, int], random: Random, first: int, last: int) -> tuple[int, int]:
    """The middle of one of a cell's patches, (x, y) in pixels: things stand on the patches' own grid."""
    x, y = ((side + random.randint(first, last)) * PATCH + PATCH // 2 for side in cell)
    return x, y


def _patches_within(centre: tuple[int, int], reach: int) -> list[int]:
    """Patches in the square around a centre."""
    columns, rows = (range((place - reach) // PATCH, (place + reach) // PATCH) for place in centre)
    return [GRID * row + column for row in rows for column in columns]


def _palette(random: np.random.Generator) -> np.ndarray:
    """Four tones of any hue (4,3), from dark to light, so that all pairs can be told apart."""
    hues_43 = random.uniform(0.5, 1.5, (4, 3))
    hues_43 /= hues_43.mean(1, keepdims=True)
    return hues_43 * np.array(LUMINANCES)[:, None]


@cache
def _coordinates() -> tuple[np.ndarray, np.ndarray]:
    y_hw, x_hw = np.mgrid[:SIZE, :SIZE]
    return x_hw, y_hw


@cache
def _light(time: str) -> np.ndarray:
    """Brightness (h,w): a slope from the left in the morning, from the right in the evening, of the same mean."""
    slope = {"morning": -0.9, "noon": 0.0, "evening": 0.9}[time]
    return 0.85 + slope * (_coordinates()[0] / (SIZE - 1) - 0.5)


def _ground_mask(ground: str, random: np.random.Generator) -> np.ndarray:
    """Which pixels (h,w) have the ground's second tone."""
    x_hw, y_hw = _coordinates()
    x_hw, y_hw = x_hw + random.integers(0, 48), y_hw + random.integers(0, 48)
    if ground == "waves":
        return (y_hw + np.rint(2 * np.sin(x_hw / 4)).astype(int)) % 7 < 3
    if ground == "grass":
        return (x_hw + y_hw // 5 % 2 * 3) % 6 < 2
    if ground == "dunes":
        return (x_hw + y_hw) % 8 < 4
    return (x_hw % 6 - 3) ** 2 + (y_hw % 6 - 3) ** 2 < 4


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if shape == "circle":
        return x**2 + y**2 <= 11.6**2
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 10
    if shape == "diamond":
        return abs(x) + abs(y) <= 12
    return (abs(y) <= 11) & (2 * abs(x) <= y + 12)  # triangle, its top above


def _pattern(pattern: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if pattern == "striped":
        return (x - y) % 8 < 4
    if pattern == "dotted":
        return (x % 4 < 2) & (y % 4 < 2)
    if pattern == "checked":
        return (x // 4 + y // 4) % 2 == 0
    return np.zeros_like(x, dtype=bool)


def _draw_thing(picture_hw3: np.ndarray, thing: Thing, palette_43: np.ndarray):
    """Lighter tone, darker pattern on it, a dark rim of 2 pixels, and in the core a black figure."""
    x_hw, y_hw = _coordinates()
    x_hw, y_hw = x_hw - thing.centre[0], y_hw - thing.centre[1]
    light, dark = palette_43[list(thing.tones)]
    inside_hw = _inside(thing.shape, x_hw, y_hw)
    rim_hw = inside_hw & ~_inside(thing.shape, x_hw * 1.2, y_hw * 1.2)
    picture_hw3[inside_hw] = light
    picture_hw3[inside_hw & _pattern(thing.pattern, x_hw, y_hw)] = dark
    picture_hw3[rim_hw] = RIM * light
    _draw_figure(picture_hw3, CORE_FIGURES[thing.core], thing.centre, INKS["black"])


def _level_patches(picture_hw3: np.ndarray):
    """Each patch is shifted to the picture's mean colour: mean colours tell neither things nor their borders."""
    tiles_HpWp3 = picture_hw3.reshape(GRID, PATCH, GRID, PATCH, 3)  # a view
    tiles_HpWp3 += picture_hw3.mean((0, 1)) - tiles_HpWp3.mean((1, 3), keepdims=True)


def _draw_figure(picture_hw3: np.ndarray, figure: np.ndarray, centre: tuple[int, int], tone: int):
    x, y = (place - FIGURE for place in centre)
    picture_hw3[y : y + 2 * FIGURE, x : x + 2 * FIGURE][figure] = tone


def _figures(**shapes) -> dict[str, np.ndarray]:
    y, x = np.mgrid[-FIGURE:FIGURE, -FIGURE:FIGURE] + 0.5
    return {name: shape(x, y) for name, shape in shapes.items()}


MARK_FIGURES = _figures(
    cross=lambda x, y: abs(abs(x) - abs(y)) < 1,
    dot=lambda x, y: x**2 + y**2 < 7,
    bar=lambda x, y: abs(y) < 1.6,
    ring=lambda x, y: abs(x**2 + y**2 - 11) < 4,
)
# Of about the same area, so that colour does not tell them apart.
CORE_FIGURES = _figures(
    hole=lambda x, y: x**2 + y**2 < 9,
    slit=lambda x, y: abs(x) < 1.6,
    bolt=lambda x, y: abs(y) < 1.6,
)
