"""A drawn world in which a question's level matters and colour alone does not separate things.

A scene is a textured ground under a slope of light, one object or three, each with a pattern and a small figure in its
core, and one tiny mark. All share one palette that is drawn anew for every scene, and all patches of a scene have one
mean colour: things differ from the ground by texture and outline alone. Facts are independent of each other, so that
no question can be answered without the picture.

Shapes: S scenes, h x w pixels, N patches of the grid.
"""

from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np

SIZE, PATCH = 96, 8  # pixels per side of a picture and of a patch
GRID = SIZE // PATCH
LEVELS = ("coarse", "medium", "fine", "pixel")
GROUNDS = ("waves", "grass", "dunes", "gravel")
TIMES = ("morning", "noon", "evening")
NUMBERS = {"few": 1, "many": 3}
SHAPES = ("circle", "square", "triangle", "diamond")
PATTERNS = ("striped", "dotted", "checked", "plain")
CORES = ("hole", "slit", "bolt")
MARKS = ("cross", "dot", "bar", "ring")
INKS = {"black": 20, "white": 235}
YES_NO = ("yes", "no")
KINDS = {  # kind of question: level, answers, phrasings
    "ground": ("coarse", GROUNDS, ("what is the ground ?", "what covers the ground ?")),
    "time": ("coarse", TIMES, ("what time is it ?", "which time of day ?")),
    "number": ("coarse", tuple(NUMBERS), ("few or many objects ?", "how many objects ?")),
    "shape_of": ("medium", SHAPES, ("shape of the {} object ?", "which shape is {} ?")),
    "pattern_of": ("medium", PATTERNS, ("pattern of the {} ?", "how is the {} filled ?")),
    "has_shape": ("medium", YES_NO, ("is there a {} ?", "can you see a {} ?")),
    "has_pattern": ("medium", YES_NO, ("is there a {} object ?", "is any object {} ?")),
    "has_pair": ("medium", YES_NO, ("is there a {} ?", "can you see a {} ?")),
    "core_of": ("fine", CORES, ("what is inside the {} ?", "core of the {} ?")),
    "mark": ("pixel", MARKS, ("what is the tiny mark ?", "which tiny mark ?")),
    "ink": ("pixel", tuple(INKS), ("ink of the tiny mark ?", "which ink has the mark ?")),
    "has_mark": ("pixel", YES_NO, ("is there a tiny {} ?", "is the mark a {} ?")),
}
ANSWERS = {kind: answers for kind, (_, answers, _) in KINDS.items()}
KIND_LEVEL = {kind: level for kind, (level, *_) in KINDS.items()}
PRESENCE = tuple(kind for kind, answers in ANSWERS.items() if answers == YES_NO)

REACH = 12  # half the width of an object, in pixels: 3 x 3 patches
FIGURE = 4  # of a mark and of the figure in an object's core: one patch
PLOT = GRID // 3  # patches per side of the 3 x 3 plots, of which objects and mark take different ones
PLOTS = tuple((PLOT * column, PLOT * row) for row in range(3) for column in range(3))
LUMINANCES = (80, 115, 155, 200)
TONES = ((3, 1), (3, 0), (2, 0), (2, 1))  # of the palette, that an object may have
RIM = 0.45  # brightness of an object's rim relative to its lighter tone

# First seeds of the splits. Those from 20,000,000 were the test split of an earlier world (docs/study.md).
SPLITS = {"train": 0, "validation": 10_000_000, "test": 30_000_000}
SPLIT_SIZE = 10_000_000


@dataclass(frozen=True)
class Thing:
    """An object: two tones of the palette, lighter first, and its centre in pixels."""

    tones: tuple[int, int]
    centre: tuple[int, int]
    shape: str
    pattern: str
    core: str


@dataclass(frozen=True)
class Scene:
    """All that a picture shows; equal scenes have equal pixels."""

    seed: int
    ground: str
    time: str
    number: str
    things: tuple[Thing, ...]
    mark: str
    ink: str
    mark_centre: tuple[int, int]

    def draw(self) -> np.ndarray:
        """The picture, (96, 96, 3) uint8."""
        random = np.random.default_rng(self.seed)
        palette_43 = _palette(random)
        ground_43 = random.permutation(palette_43)
        picture_hw3 = ground_43[_ground_mask(self.ground, random).astype(np.int64)]
        for thing in self.things:
            _draw_thing(picture_hw3, thing, palette_43)
        _draw_figure(picture_hw3, MARK_FIGURES[self.mark], self.mark_centre, INKS[self.ink])
        _equalise_patches(picture_hw3)
        picture_hw3 *= _light(self.time)[..., None]
        picture_hw3 += random.normal(0, 3, picture_hw3.shape)
        return picture_hw3.clip(0, 255).astype(np.uint8)

    def patch_words(self) -> list[list[str]]:
        """The words for what each patch shows: ground and light, an object and its core, or the mark."""
        words = [["ground", self.ground, self.time] for _ in range(GRID * GRID)]
        for thing in self.things:
            for patch in _patches_within(thing.centre, REACH):
                words[patch] = [thing.pattern, thing.shape]
            for patch in _patches_within(thing.centre, FIGURE):
                words[patch] = [thing.pattern, thing.shape, thing.core]
        for patch in _patches_within(self.mark_centre, FIGURE):
            words[patch] = ["tiny", self.ink, self.mark]
        return words


@dataclass(frozen=True)
class Question:
    """A question, its answer (one word), its kind, and the shape or pattern that it names, if any."""

    text: str
    answer: str
    kind: str
    subject: str | None = None

    @property
    def level(self) -> str:
        """The level of its kind."""
        return KIND_LEVEL[self.kind]


def make_scenes(split: str, count: int, first: int = 0) -> list[Scene]:
    """
    Scenes `first` to `first + count` of a split.

    Raises:
        ValueError: an unknown split, or scenes beyond its end.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {tuple(SPLITS)}")
    if first < 0 or count < 0 or first + count > SPLIT_SIZE:
        raise ValueError(f"{split} has {SPLIT_SIZE} scenes, but scenes {first} to {first + count} were requested")
    return [make_scene(SPLITS[split] + number) for number in range(first, first + count)]


def make_scene(seed: int) -> Scene:
    """The scene of a seed."""
    random = Random(f"scene {seed}")
    number = random.choice(tuple(NUMBERS))
    count = NUMBERS[number]
    *plots, mark_plot = random.sample(PLOTS, count + 1)
    shapes, patterns = random.sample(SHAPES, count), random.sample(PATTERNS, count)
    ground, time = random.choice(GROUNDS), random.choice(TIMES)
    things = []
    for shape, pattern, plot in zip(shapes, patterns, plots):
        core, tones = random.choice(CORES), random.choice(TONES)
        things.append(Thing(tones, _centre(plot, random, 1, 2), shape, pattern, core))
    mark, ink = random.choice(MARKS), random.choice(tuple(INKS))
    return Scene(seed, ground, time, number, tuple(things), mark, ink, _centre(mark_plot, random, 0, PLOT - 1))


def make_questions(scene: Scene) -> list[Question]:
    """One question of each kind, in the order of `KINDS`; subjects and phrasings follow from the scene's seed."""
    random = Random(f"questions {scene.seed}")
    return [_question(kind, scene, random) for kind in KINDS]


def sentences(scene: Scene) -> list[str]:
    """The scene in words: every fact once, one sentence for each thing, in random order."""
    random = Random(f"sentences {scene.seed}")
    facts = [f"the ground is {scene.ground} .", f"it is {scene.time} .", f"{scene.number} objects ."]
    facts.append(random.choice((f"a tiny {scene.ink} {scene.mark} .", f"a tiny {scene.mark} in {scene.ink} .")))
    for thing in scene.things:
        forms = ("a {0.pattern} {0.shape} with a {0.core} .", "a {0.shape} is {0.pattern} and has a {0.core} .")
        facts.append(random.choice(forms).format(thing))
    random.shuffle(facts)
    return facts


def draw_all(scenes: list[Scene]) -> np.ndarray:
    """(S,h,w,3) uint8."""
    return np.stack([scene.draw() for scene in scenes])


def patch_colours(pictures_Shw3: np.ndarray) -> np.ndarray:
    """The mean colour of each patch in [0, 1], (S,N,3) fp32."""
    count = len(pictures_Shw3)
    tiles = pictures_Shw3.reshape(count, GRID, PATCH, GRID, PATCH, 3)  # (S,h,w,3) -> (S,H,p,W,p,3)
    return (tiles.mean((2, 4)) / 255).reshape(count, GRID * GRID, 3).astype(np.float32)


def _question(kind: str, scene: Scene, random: Random) -> Question:
    subject, thing = None, random.choice(scene.things)
    if hasattr(scene, kind):
        answer = getattr(scene, kind)
    elif kind == "shape_of":
        subject, answer = thing.pattern, thing.shape
    elif kind in ("pattern_of", "core_of"):
        subject, answer = thing.shape, getattr(thing, kind.removesuffix("_of"))
    else:
        answer = random.choice(YES_NO)
        subject = _presence_subject(kind, scene, answer == "yes", random)
    return Question(random.choice(KINDS[kind][2]).format(subject), answer, kind, subject)


def _presence_subject(kind: str, scene: Scene, present: bool, random: Random) -> str:
    """A thing in the scene, or one that is not; an absent pair has a shape or a pattern of the scene."""
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


def _centre(plot: tuple[int, int], random: Random, first: int, last: int) -> tuple[int, int]:
    """The middle of one of a plot's patches, (x, y) in pixels."""
    x, y = ((side + random.randint(first, last)) * PATCH + PATCH // 2 for side in plot)
    return x, y


def _patches_within(centre: tuple[int, int], reach: int) -> list[int]:
    """Patches in the square around a centre."""
    columns, rows = (range((place - reach) // PATCH, (place + reach) // PATCH) for place in centre)
    return [GRID * row + column for row in rows for column in columns]


def _palette(random: np.random.Generator) -> np.ndarray:
    """Four tones of any hue (4,3), from dark to light, far enough apart to be distinguished."""
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
    """The pixels (h,w) with the ground's second tone."""
    x_hw, y_hw = _coordinates()
    x_hw, y_hw = x_hw + random.integers(0, 48), y_hw + random.integers(0, 48)
    if ground == "waves":
        return (y_hw + np.rint(2 * np.sin(x_hw / 4)).astype(int)) % 7 < 3
    if ground == "grass":
        return (x_hw + y_hw // 5 % 2 * 3) % 6 < 2
    if ground == "dunes":
        return (x_hw + y_hw) % 8 < 4
    return (x_hw % 6 - 3) ** 2 + (y_hw % 6 - 3) ** 2 < 4


INSIDE = {
    "circle": lambda x, y: x**2 + y**2 <= 11.6**2,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 10,
    "diamond": lambda x, y: abs(x) + abs(y) <= 12,
    "triangle": lambda x, y: (abs(y) <= 11) & (2 * abs(x) <= y + 12),
}
FILLED = {
    "striped": lambda x, y: (x - y) % 8 < 4,
    "dotted": lambda x, y: (x % 4 < 2) & (y % 4 < 2),
    "checked": lambda x, y: (x // 4 + y // 4) % 2 == 0,
    "plain": lambda x, y: np.zeros_like(x, dtype=bool),
}


def _draw_thing(picture_hw3: np.ndarray, thing: Thing, palette_43: np.ndarray):
    """Lighter tone, darker pattern on it, a dark rim of 2 pixels, and in the core a black figure."""
    x_hw, y_hw = _coordinates()
    x_hw, y_hw = x_hw - thing.centre[0], y_hw - thing.centre[1]
    light, dark = palette_43[list(thing.tones)]
    inside = INSIDE[thing.shape]
    inside_hw = inside(x_hw, y_hw)
    picture_hw3[inside_hw] = light
    picture_hw3[inside_hw & FILLED[thing.pattern](x_hw, y_hw)] = dark
    picture_hw3[inside_hw & ~inside(x_hw * 1.2, y_hw * 1.2)] = RIM * light
    _draw_figure(picture_hw3, CORE_FIGURES[thing.core], thing.centre, INKS["black"])


def _equalise_patches(picture_hw3: np.ndarray):
    """Shift each patch to the picture's mean colour, so that mean colours show neither things nor their borders."""
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
# Of about the same area, so that colour does not distinguish them.
CORE_FIGURES = _figures(
    hole=lambda x, y: x**2 + y**2 < 9,
    slit=lambda x, y: abs(x) < 1.6,
    bolt=lambda x, y: abs(y) < 1.6,
)
