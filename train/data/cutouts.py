"""Photographed things on photographed grounds, and questions about them at three levels.

A scene is a ground (a photograph, a texture or smooth noise) onto which one to five cut-out photographs are pasted, at
times a tiny one and a small sign with a letter as well. Their transparency is the true mask. What is in a scene is
drawn at random and independently, and every kind of question has balanced answers, so that none is answered without
the image. The cut-outs are Tux Paint's stamps, which `make parts` fetches; cutouts.csv names them. One stamp of every
name that has several is held out ("another dog"), and so is one phrasing of every kind of question.

    python -m granulon.train.data.cutouts --output build/cutouts

writes the sets of `SPLITS`: scenes as JPEG, their questions as JSON Lines that `granulon-train` reads, and what each
patch shows. Sides of pictures are in pixels, places in shares of the picture, x to the right and y down.
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from granulon.hub.files import write_atomically, write_jsonl

from .scenes import LEVELS, Question

SIDE, PATCH = 224, 14
SPLITS = {  # scenes of each set, how many of them show a single thing, held-out stamps, held-out phrasings
    "train": (24_000, 5_000, False, False),
    "scenes": (600, 100, False, False),
    "things": (300, 50, True, False),
    "phrasings": (300, 50, False, True),
}
TABLE = Path(__file__).with_name("cutouts.csv")
STAMPS = Path("build/parts/tuxpaint-stamps/usr/share/tuxpaint/stamps")
LETTERS = "symbols/alphabets/english/filled/uppercase/{}_filled.png"
DIGITS = "symbols/math/{}.png"
SIGNS = {letter: LETTERS.format(letter) for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"} | {
    digit: DIGITS.format(digit) for digit in "0123456789"
}
COLOURS = {
    "red": (205, 30, 35), "orange": (245, 135, 20), "yellow": (245, 220, 40), "green": (30, 145, 60),
    "blue": (30, 75, 200), "purple": (125, 45, 160), "white": (250, 250, 250), "black": (20, 20, 20),
}  # fmt: skip
GROUNDS = {"grass": "grass.png", "gravel": "gravel.png", "bricks": "brick.png", "stars": "hubble_deep_field.jpg",
           "paper": "page.png", "mist": None, "a plain wall": None}  # fmt: skip
LARGE, TINY, SIGN = (0.24, 0.6), (0.18, 0.23), (0.16, 0.24)  # longest side, as a share of the picture
ALONE = (0.3, 1.0)  # of a thing alone, which may fill the picture as in a photograph
MOST = 5  # things in a scene, beside the tiny one and the sign
OTHER_LEVEL = 0.2  # of the questions for training are read at any level, so that levels can be compared
EASY = {"ground": 0.25, "mostly": 0.5, "exists": 0.5, "colour": 0.5}  # kinds asked less often in training
NUMBERS = ("one", "two", "three", "four", "five")


@dataclass(frozen=True)
class Cutout:
    """A stamp: its path below the stamps without ending, what it shows, and of which kind that is."""

    stamp: str
    name: str
    kind: str


@dataclass(frozen=True)
class Thing:
    """Something in a scene: its centre, the share of the picture it covers, whether it is the tiny one."""

    name: str
    kind: str
    x: float
    y: float
    area: float
    tiny: bool = False


@dataclass(frozen=True)
class Sign:
    """A small sign: a letter or digit on a coloured ground."""

    letter: str
    colour: str


@dataclass(frozen=True)
class Scene:
    """A picture (RGB) and what is in it; mask (SIDE,SIDE) is 0 on the ground, t on the t-th thing, 255 on the sign."""

    picture: Image.Image
    mask: np.ndarray
    ground: str
    things: tuple[Thing, ...]
    sign: Sign | None

    @property
    def main(self) -> list[Thing]:
        """The things without the tiny one."""
        return [thing for thing in self.things if not thing.tiny]


@cache
def cutouts(held_out: bool = False) -> tuple[Cutout, ...]:
    """The stamps of the table, for training or held out."""
    with TABLE.open(newline="") as file:
        return tuple(
            Cutout(row["stamp"], row["name"], row["kind"])
            for row in csv.DictReader(file)
            if (row["split"] == "held-out") == held_out
        )


@cache
def by_name(held_out: bool = False) -> dict[str, list[Cutout]]:
    names = {}
    for cutout in cutouts(held_out):
        names.setdefault(cutout.name, []).append(cutout)
    return names


@cache
def by_kind(held_out: bool = False) -> dict[str, list[str]]:
    kinds = {}
    for name, known in by_name(held_out).items():
        kinds.setdefault(known[0].kind, []).append(name)
    return kinds


@cache
def stamp(path: str) -> Image.Image:
    """A stamp (RGBA) without its empty margin, at most `SIDE` pixels on its longest side."""
    picture = Image.open(STAMPS / path).convert("RGBA")
    picture = picture.crop(picture.getchannel("A").getbbox())
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return picture


@cache
def photograph(name: str) -> Image.Image:
    """A photograph of scikit-image, RGB."""
    import skimage

    return Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")


def compose(seed: int | str, count: int | None = None, held_out: bool = False) -> Scene:
    """The scene of a seed, of `count` things or of one to five; of `held_out` stamps or of those for training.

    A thing alone may fill the picture, as in a photograph.
    """
    random = Random(f"scene {seed}")
    wanted = count or random.randint(1, MOST)
    ground = random.choice(list(GROUNDS))
    picture, mask = _ground(random, ground), np.zeros((SIDE, SIDE), np.uint8)
    things = []
    for name in _names(random, wanted, held_out):
        cutout = random.choice(by_name(held_out)[name])
        sizes = ALONE if count == 1 else LARGE if wanted < 3 else (LARGE[0], 0.45)
        mask = _paste(random, picture, mask, stamp(f"{cutout.stamp}.png"), sizes, cutout, things)
    if count is None and random.random() < 0.5:
        taken = {thing.name for thing in things}
        name = random.choice([name for name in by_name(held_out) if name not in taken])
        cutout = random.choice(by_name(held_out)[name])
        mask = _paste(random, picture, mask, stamp(f"{cutout.stamp}.png"), TINY, cutout, things, tiny=True)
    sign = None
    if count is None and random.random() < 0.5:
        sign = Sign(random.choice(list(SIGNS)), random.choice(list(COLOURS)))
        plate = _plate(random, sign)
        before = mask
        mask = _paste(random, picture, mask, plate, SIGN, None, things)
        sign = sign if mask is not before else None
    visible = np.bincount(mask.ravel(), minlength=256)
    things = tuple(
        Thing(thing.name, thing.kind, *_centre(mask, number), float(visible[number] / mask.size), thing.tiny)
        for number, thing in enumerate(things, 1)
    )
    return Scene(picture, mask, ground, things, sign)


def _names(random: Random, wanted: int, held_out: bool) -> list[str]:
    """Different names, of one kind, of two, or of any."""
    names, kinds = list(by_name(held_out)), by_kind(held_out)
    first = random.choice(names)
    kind = by_name(held_out)[first][0].kind
    way = random.random()
    if way < 0.4:
        pool = kinds[kind]
    elif way < 0.8:
        other = by_name(held_out)[random.choice(names)][0].kind
        pool = kinds[kind] + (kinds[other] if other != kind else [])
    else:
        pool = names
    rest = [name for name in pool if name != first]
    return [first, *random.sample(rest, min(wanted - 1, len(rest)))]


def _ground(random: Random, name: str) -> Image.Image:
    if name == "mist":
        waves = random.randint(3, 8)
        colours = np.array([random.randint(40, 215) for _ in range(waves * waves * 3)], np.uint8)
        noise = Image.fromarray(colours.reshape(waves, waves, 3))
        return noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if name == "a plain wall":
        return Image.new("RGB", (SIDE, SIDE), tuple(random.randint(60, 240) for _ in range(3)))
    whole = photograph(GROUNDS[name])
    size = int(min(whole.size) * random.uniform(0.5, 1))
    left, top = (random.randint(0, length - size) for length in whole.size)
    return whole.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + size, top + size))


def _plate(random: Random, sign: Sign) -> Image.Image:
    side = 96
    plate = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(plate)
    shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
    shape((0, 0, side - 1, side - 1), fill=COLOURS[sign.colour])
    ink = (255, 255, 255) if sum(COLOURS[sign.colour]) < 400 else (0, 0, 0)
    if random.random() < 0.5:  # another typeface
        font = ImageFont.load_default(0.75 * side)
        draw.text((side / 2, side / 2), sign.letter, ink, font, anchor="mm", stroke_width=random.randint(0, 4))
        return plate
    letter = stamp(SIGNS[sign.letter]).getchannel("A")
    scale = 0.66 * side / max(letter.size)
    letter = letter.resize([max(1, round(scale * length)) for length in letter.size])
    plate.paste(ink, [(side - length) // 2 for length in letter.size], letter)
    return plate


def _paste(random, picture, mask, cut, sizes, cutout, things, tiny=False) -> np.ndarray:
    """Pastes a cut-out where it fits and adds it to `things`; the new mask, or `mask` itself if it fits nowhere.

    Nothing may hide more than four tenths of anything else, and nothing small is touched.
    """
    for _ in range(12):
        scale = SIDE * math.exp(random.uniform(*map(math.log, sizes))) / max(cut.size)
        scale = min(scale, 2 if sizes != ALONE else 3)
        small = cut.resize([max(4, round(scale * length)) for length in cut.size], Image.Resampling.BILINEAR)
        if random.random() < 0.5 and cutout is not None:
            small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left, top = (random.randint(0, SIDE - length) for length in small.size)
        alpha = np.asarray(small.getchannel("A")) > 127
        box = (slice(top, top + small.height), slice(left, left + small.width))
        hidden = np.bincount(mask[box][alpha], minlength=256)
        before = np.bincount(mask.ravel(), minlength=256)
        shares = hidden / np.maximum(before, 1)
        limits = [0.0 if tiny or cutout is None or thing.tiny else 0.4 for thing in things]
        if alpha.sum() < 300 or any(shares[n] > limit for n, limit in enumerate(limits, 1)):
            continue
        picture.paste(small, (left, top), small)
        mask = mask.copy()
        number = 255
        if cutout is not None:
            things.append(Thing(cutout.name, cutout.kind, 0, 0, 0, tiny))
            number = len(things)
        mask[box][alpha] = number
        return mask
    return mask


def _centre(mask: np.ndarray, number: int) -> tuple[float, float]:
    rows, columns = np.nonzero(mask == number)
    return float(columns.mean() / SIDE), float(rows.mean() / SIDE)


PHRASINGS = {  # the last of each is held out
    "kinds": (
        "What kinds of things are in the picture?",
        "Which kinds of things do you see?",
        "In general, what does the picture show?",
        "Name the categories of the things shown.",
        "What sorts of things are here?",
    ),
    "ground": (
        "What is the background?",
        "What is behind the things?",
        "On what ground is all of this?",
        "Describe the background of the scene.",
        "What does the ground of the picture look like?",
    ),
    "count": (
        "How many things are in the picture?",
        "How many things do you see?",
        "Count the things in the scene.",
        "What is the number of things shown?",
        "How many objects does the picture have?",
    ),
    "mostly": (
        "Are most of the things {kinds}?",
        "Is it mostly {kinds}?",
        "Does the picture show mainly {kinds}?",
        "Overall, is this a picture of {kinds}?",
        "Are they for the most part {kinds}?",
    ),
    "single": (
        "What is this?",
        "What is in the picture?",
        "What do you see?",
        "Name the thing in the picture.",
        "Which thing is shown?",
    ),
    "place": (
        "What is {place}?",
        "Which thing is {place}?",
        "What do you see {place}?",
        "Name the thing {place}.",
        "What can be found {place}?",
    ),
    "beside": (
        "What is {side} the {other}?",
        "Which thing is {side} the {other}?",
        "Name the thing {side} the {other}.",
        "What do you see {side} the {other}?",
        "What can be found {side} the {other}?",
    ),
    "biggest": (
        "What is the biggest thing?",
        "Which thing is the largest?",
        "Name the biggest thing in the picture.",
        "What takes up the most space?",
        "Which of the things is the biggest one?",
    ),
    "exists": (
        "Is there a {name}?",
        "Do you see a {name}?",
        "Does the picture show a {name}?",
        "Is a {name} in the scene?",
        "Can a {name} be found here?",
    ),
    "letter": (
        "Which character is on the small sign?",
        "What does the small sign say?",
        "Read the little sign.",
        "Which letter or digit is written on the sign?",
        "What is printed on the tiny sign?",
    ),
    "colour": (
        "What colour is the small sign?",
        "Which colour does the little sign have?",
        "Name the colour of the sign.",
        "In what colour is the small sign painted?",
        "What is the tiny sign's colour?",
    ),
    "tiny": (
        "What is the tiny thing?",
        "Which thing is very small?",
        "Name the tiniest thing in the picture.",
        "What is the little thing that is easily missed?",
        "Look closely: what is the smallest thing?",
    ),
}
LEVEL_OF = {
    "kinds": "coarse", "ground": "coarse", "count": "coarse", "mostly": "coarse", "single": "medium",
    "place": "medium", "beside": "medium", "biggest": "medium", "exists": "medium", "letter": "fine",
    "colour": "fine", "tiny": "fine",
}  # fmt: skip
KINDS = {  # of which questions ask, and their plural
    "bird": "birds", "mammal": "mammals", "fish": "fish", "insect": "insects", "fruit": "fruit",
    "vegetable": "vegetables", "food": "food", "flower": "flowers", "vehicle": "vehicles", "tool": "tools",
    "musical instrument": "musical instruments", "clothing": "clothes", "planet": "planets",
    "household item": "household items", "sports gear": "sports gear",
}  # fmt: skip
PLACES = {"on the left": (0, 0.42, 0, 1), "on the right": (0.58, 1, 0, 1), "at the top": (0, 1, 0, 0.42),
          "at the bottom": (0, 1, 0.58, 1), "in the middle": (0.35, 0.65, 0.35, 0.65)}  # fmt: skip
APART = 0.15  # shares of the picture that things are apart at least, of which one is beside the other


def questions(scene: Scene, seed: int | str, held_out: bool = False) -> list[Question]:
    """One question of every kind that the scene answers, in a phrasing for training or the held-out one."""
    random = Random(f"questions {seed}")
    asked = []
    for kind, ask in ASK.items():
        found = ask(random, scene)
        if found is not None:
            words, answer = found
            phrasing = PHRASINGS[kind][-1] if held_out else random.choice(PHRASINGS[kind][:-1])
            asked.append(Question(_with_article(phrasing.format(**words)), answer, LEVEL_OF[kind], kind))
    return asked


def _with_article(text: str) -> str:
    """ "a owl" becomes "an owl"."""
    for vowel in "aeiou":
        text = text.replace(f" a {vowel}", f" an {vowel}")
    return text


def _kinds(random: Random, scene: Scene):
    kinds = sorted({KINDS.get(thing.kind, "") for thing in scene.things})
    return ({}, " and ".join(kinds)) if all(kinds) and len(kinds) <= 2 else None


def _ground_name(random: Random, scene: Scene):
    return {}, scene.ground


def _count(random: Random, scene: Scene):
    if len(scene.things) > MOST or scene.sign:
        return None
    return {}, NUMBERS[len(scene.things) - 1]


def _mostly(random: Random, scene: Scene):
    kinds = [thing.kind for thing in scene.main]
    most = max(sorted(set(kinds)), key=kinds.count)
    if most not in KINDS or kinds.count(most) * 2 <= len(scene.things):
        return None
    # "no" asks for a kind drawn as those of "yes" are, so that the kind that is asked for tells nothing.
    other = by_name()[random.choice([name for name in by_name() if by_name()[name][0].kind in KINDS])][0].kind
    asked = most if random.random() < 0.5 or other in kinds else other
    return {"kinds": KINDS[asked]}, "yes" if asked == most else "no"


def _single(random: Random, scene: Scene):
    return ({}, scene.things[0].name) if len(scene.things) == 1 and not scene.sign else None


def _place(random: Random, scene: Scene):
    if len(scene.things) < 2:
        return None
    places = list(PLACES)
    random.shuffle(places)
    for place in places:
        left, right, top, bottom = PLACES[place]
        there = [t for t in scene.main if left <= t.x <= right and top <= t.y <= bottom]
        near = [t for t in scene.things if left - 0.08 <= t.x <= right + 0.08 and top - 0.08 <= t.y <= bottom + 0.08]
        if len(there) == 1 and near == there:
            return {"place": place}, there[0].name
    return None


def _beside(random: Random, scene: Scene):
    pairs = []
    for other in scene.main:
        for side, offset in (
            ("to the left of", lambda t, o=other: o.x - t.x),
            ("to the right of", lambda t, o=other: t.x - o.x),
            ("above", lambda t, o=other: o.y - t.y),
            ("below", lambda t, o=other: t.y - o.y),
        ):
            there = [t for t in scene.things if t is not other and offset(t) > 0]
            if len(there) == 1 and offset(there[0]) > APART and not there[0].tiny:
                pairs.append(({"side": side, "other": other.name}, there[0].name))
    return random.choice(pairs) if pairs else None


def _biggest(random: Random, scene: Scene):
    if len(scene.main) < 2:
        return None
    first, second = sorted(scene.main, key=lambda thing: -thing.area)[:2]
    return ({}, first.name) if first.area > 1.4 * second.area else None


def _exists(random: Random, scene: Scene):
    there = [thing.name for thing in scene.things]
    if random.random() < 0.5:
        return {"name": random.choice(scene.things).name}, "yes"
    kinds = [thing.kind for thing in scene.things]
    same = [name for name, known in by_name().items() if known[0].kind in kinds and name not in there]
    others = [name for name in by_name() if name not in there]
    return {"name": random.choice(same if same and random.random() < 0.5 else others)}, "no"


def _letter(random: Random, scene: Scene):
    return ({}, scene.sign.letter) if scene.sign else None


def _colour(random: Random, scene: Scene):
    return ({}, scene.sign.colour) if scene.sign else None


def _tiny(random: Random, scene: Scene):
    tiny = [thing for thing in scene.things if thing.tiny]
    return ({}, tiny[0].name) if tiny else None


ASK = {
    "kinds": _kinds, "ground": _ground_name, "count": _count, "mostly": _mostly, "single": _single, "place": _place,
    "beside": _beside, "biggest": _biggest, "exists": _exists, "letter": _letter, "colour": _colour, "tiny": _tiny,
}  # fmt: skip


def patch_texts(scene: Scene) -> list[str]:
    """What each patch of 14 pixels mostly shows, row by row: a name, the sign's colour and letter, or the ground."""
    tiles = scene.mask.reshape(SIDE // PATCH, PATCH, -1, PATCH).swapaxes(1, 2).reshape(-1, PATCH * PATCH)
    sign = f"{scene.sign.colour} {scene.sign.letter}" if scene.sign else None
    texts = {number: thing.name for number, thing in enumerate(scene.things, 1)} | {255: sign, 0: scene.ground}
    return [texts[int(np.bincount(tile, minlength=1).argmax())] for tile in tiles]


def write(folder: Path, splits: dict = SPLITS) -> Iterator[Path]:
    """Write the sets into `folder`; those that are there are left alone. Yields each set's file of questions."""
    missing = [path for path in (STAMPS / f"{cutout.stamp}.png" for cutout in cutouts()) if not path.exists()]
    if missing:
        raise ValueError(f"{len(missing)} stamps are not there, first {missing[0]}; `make parts` fetches them")
    for split, (count, single, held_out, other_words) in splits.items():
        rows, images = folder / f"{split}.jsonl", folder / split
        if not rows.exists():
            images.mkdir(parents=True, exist_ok=True)
            jobs = [(images, split, n, 1 if n < single else None, held_out, other_words) for n in range(count)]
            with ProcessPoolExecutor() as pool:
                made = list(pool.map(_write_scene, jobs, chunksize=32))
            texts = {text: None for _, patches in made for text in patches}
            numbers = {text: number for number, text in enumerate(texts)}
            np.save(folder / f"{split}-patches.npy", np.array([[numbers[t] for t in p] for _, p in made], np.int16))
            write_atomically(folder / f"{split}-texts.json", json.dumps(list(texts)))
            write_jsonl(rows, [row for found, _ in made for row in found])
        yield rows


def _write_scene(job) -> tuple[list[dict], list[str]]:
    images, split, number, count, held_out, other_words = job
    scene = compose(f"{split} {number}", count, held_out)
    name = f"{number:05}.jpg"
    scene.picture.save(images / name, quality=95, subsampling=0)
    asked, random = questions(scene, f"{split} {number}", other_words), Random(f"levels {split} {number}")
    trains = split == "train"
    if count is not None:
        asked = [q for q in asked if q.kind in ("single", "kinds", "ground")]
    rows = [
        {
            "image": f"{split}/{name}",
            "question": q.text,
            "answer": f" {q.answer}",  # with the space, a word is the token that it is within a sentence
            "kind": q.kind,
            "granularity": random.choice(LEVELS) if trains and random.random() < OTHER_LEVEL else q.level,
        }
        for q in asked
        if not trains or random.random() < EASY.get(q.kind, 1)
    ]
    return rows, patch_texts(scene)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/cutouts"))
    for rows in write(parser.parse_args().output):
        print(f"wrote {rows}", file=sys.stderr)


if __name__ == "__main__":
    main()
