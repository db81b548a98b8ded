"""A drawn world of small scenes, and questions about it at three levels: all the data the project needs offline.

Every scene is a place by day or night, with one object, its core of another colour, and one small mark. Everything is
drawn at random and independently, so that no question can be answered without the image. The world is deliberately as
easy as it must be for a demo to learn it in minutes: flat colours, one object, a mark of 8 pixels.
"""

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

SIZE = 64  # pixels per side
PLACES = {"sea": (60, 130, 190), "meadow": (120, 180, 90), "desert": (215, 185, 130), "snow": (180, 196, 214)}
TIMES = ("day", "night")
SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (214, 39, 40), "blue": (20, 50, 190), "yellow": (240, 220, 30), "purple": (150, 40, 170)}
MARKS = ("cross", "dot", "bar", "ring")
INKS = {"black": (0, 0, 0), "white": (255, 255, 255)}
LEVELS = ("coarse", "medium", "fine")


@dataclass(frozen=True)
class Thing:
    """An object: its shape, its colour, the colour of its core, and its centre (x, y) in pixels."""

    shape: str
    colour: str
    core: str
    centre: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """Everything that is in a picture; two equal scenes are drawn equal, to the pixel."""

    place: str
    time: str
    thing: Thing
    mark: str
    ink: str
    mark_centre: tuple[int, int]
    seed: int

    def draw(self) -> Image.Image:
        """The picture, RGB, `SIZE` pixels per side."""
        image = Image.new("RGB", (SIZE, SIZE))
        draw = ImageDraw.Draw(image)
        _draw_place(draw, self.place, self.time, Random(self.seed))
        _draw_thing(draw, self.thing)
        _draw_mark(draw, self.mark, INKS[self.ink], self.mark_centre)
        return image

    def facts(self) -> dict[str, str]:
        """What is in the picture, by kind of question."""
        thing = self.thing
        return {
            "place": self.place, "time": self.time, "shape": thing.shape, "colour": thing.colour, "core": thing.core,
            "mark": self.mark, "ink": self.ink,
        }  # fmt: skip

    def labels(self, grid: int) -> dict[str, list[int]]:
        """What each patch of a grid x grid image shows, by kind: an index into `ANSWERS[kind]`, or one past its end.

        Every patch shows place and time, those of the object everything about the object, those around the mark the
        mark.
        """
        patch = SIZE // grid
        centres = [(x * patch + patch / 2, y * patch + patch / 2) for y in range(grid) for x in range(grid)]
        of_thing = [_within(12, centre, self.thing.centre) for centre in centres]
        of_mark = [_within(12, centre, self.mark_centre) for centre in centres]
        shown = {"coarse": [True] * len(centres), "medium": of_thing, "fine": of_mark}
        return {
            kind: [ANSWERS[kind].index(fact) if here else len(ANSWERS[kind]) for here in shown[KIND_LEVEL[kind]]]
            for kind, fact in self.facts().items()
        }


@dataclass(frozen=True)
class Question:
    """A question, its answer, its level, and its kind, a key of the world's phrasings."""

    text: str
    answer: str
    level: str
    kind: str


ANSWERS = {
    "place": tuple(PLACES),
    "time": TIMES,
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "core": tuple(COLOURS),
    "mark": MARKS,
    "ink": tuple(INKS),
}
KIND_LEVEL = {
    "place": "coarse", "time": "coarse", "shape": "medium", "colour": "medium", "core": "medium", "mark": "fine",
    "ink": "fine",
}  # fmt: skip
PHRASINGS = {
    "place": ("What kind of place is this?", "Where was this picture taken?", "What is the whole scene?"),
    "time": ("Is it day or night?", "What time of day does the scene show?", "Is the scene at day or at night?"),
    "shape": ("What shape is the object?", "Which shape does the object have?", "What is the form of the object?"),
    "colour": ("What colour is the object?", "Which colour does the object have?", "How is the object painted?"),
    "core": (
        "What colour is the core of the object?",
        "Which core does the object have?",
        "What is inside the object?",
    ),
    "mark": ("Which small mark can you find?", "What is the tiny mark?", "Name the little mark in the picture."),
    "ink": (
        "Is the small mark black or white?",
        "In which ink is the tiny mark?",
        "What is the little mark drawn in?",
    ),
}


def make_scene(seed: int) -> Scene:
    """The scene of a seed: the object in one quarter of the picture, the mark in another."""
    random = Random(seed)
    (x, y), (mark_x, mark_y) = random.sample([(16, 16), (48, 16), (16, 48), (48, 48)], 2)
    colour, core = random.sample(list(COLOURS), 2)
    return Scene(
        place=random.choice(list(PLACES)),
        time=random.choice(TIMES),
        thing=Thing(random.choice(SHAPES), colour, core, (x + random.randint(-2, 2), y + random.randint(-2, 2))),
        mark=random.choice(MARKS),
        ink=random.choice(list(INKS)),
        mark_centre=(mark_x + random.choice((-12, -4, 4, 12)), mark_y + random.choice((-12, -4, 4, 12))),
        seed=seed,
    )


def make_questions(scene: Scene) -> list[Question]:
    """One question of each kind, in a random phrasing and a random order."""
    random = Random(f"questions {scene.seed}")
    questions = [
        Question(random.choice(PHRASINGS[kind]), answer, KIND_LEVEL[kind], kind)
        for kind, answer in scene.facts().items()
    ]
    random.shuffle(questions)
    return questions


def _within(reach: float, point: tuple[float, float], centre: tuple[int, int]) -> bool:
    return abs(point[0] - centre[0]) < reach and abs(point[1] - centre[1]) < reach


def _draw_place(draw: ImageDraw.ImageDraw, place: str, time: str, random: Random):
    """A ground colour, darker at night, with the texture of the place."""
    shade = 1.0 if time == "day" else 0.5
    ground = tuple(int(channel * shade) for channel in PLACES[place])
    line = tuple(int(channel * 0.8) for channel in ground)
    draw.rectangle((0, 0, SIZE, SIZE), fill=ground)
    for offset in range(random.randint(0, 7), SIZE, 8):
        if place == "sea":
            draw.line((0, offset, SIZE, offset), fill=line)
        elif place == "meadow":
            draw.line((offset, 0, offset, SIZE), fill=line)
        elif place == "desert":
            draw.line((0, offset, SIZE, offset + 24), fill=line)
        else:
            draw.point([(random.randrange(SIZE), random.randrange(SIZE)) for _ in range(24)], fill=line)


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing):
    x, y = thing.centre
    box, fill = (x - 12, y - 12, x + 12, y + 12), COLOURS[thing.colour]
    if thing.shape == "circle":
        draw.ellipse(box, fill=fill)
    elif thing.shape == "square":
        draw.rectangle(box, fill=fill)
    else:
        draw.polygon([(x, y - 13), (x - 13, y + 12), (x + 13, y + 12)], fill=fill)
    draw.rectangle((x - 4, y - 3, x + 4, y + 5), fill=COLOURS[thing.core])


def _draw_mark(draw: ImageDraw.ImageDraw, mark: str, ink: tuple[int, int, int], centre: tuple[int, int]):
    x, y = centre
    if mark == "dot":
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=ink)
    elif mark == "ring":
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), outline=ink)
    elif mark == "bar":
        draw.rectangle((x - 4, y - 1, x + 4, y), fill=ink)
    else:
        draw.line((x - 4, y - 4, x + 4, y + 4), fill=ink)
        draw.line((x - 4, y + 4, x + 4, y - 4), fill=ink)
