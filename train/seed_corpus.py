"""A granularity corpus made from templates, so that a controller can be trained without a network or an annotator.

Each kind of question is written for one level: what a person would say it takes to answer it. Nobody measured that;
its rows say source "template". A controller that learns from them learns these words first of all, so the corpus
holds three things back:

    test_questions  templates of the train split, filled with other words
    test_phrasings  kinds of the train split, asked in other templates
    test_kinds      kinds that no other split knows

The validation split has templates of its own, so that early stopping watches something other than known wording.
"""

from dataclasses import dataclass
from itertools import product
from random import Random

from .corpus import TEMPLATE, TRAIN, VALIDATION, corpus_row

LEVELS = ("coarse", "medium", "fine")
TEST_SPLITS = ("test_questions", "test_phrasings", "test_kinds")
CREATED = "2026-11-23T00:00:00+00:00"  # the rows are the same whenever they are made
MOST = {TRAIN: 16, VALIDATION: 8, "test_questions": 4, "test_phrasings": 8, "test_kinds": 8}  # per template

SLOTS = {
    "image": "image, picture, photo, photograph, snapshot, frame, shot, postcard, press photo, holiday picture, "
    "video frame, old photograph, colour photo, wide shot, film still, phone picture, family photo, web image, "
    "newspaper photo, travel photo",
    "here": "here, in this image, in the picture, in this photo, in the scene, in this photograph, in this snapshot, "
    "in the frame, on this postcard, in the press photo, in this video frame, in the old photograph, in this shot, "
    "in the holiday picture, in this film still, in the web image, in this family photo, in the first picture, "
    "in the second image, in the upper picture",
    "page": "image, scan, picture, photo, copy, file, upload, attachment, screenshot, capture, fax, photocopy, "
    "archive scan, page from the archive, phone picture, microfilm",
    "object": "car, bicycle, sofa, dog, horse, bus, boat, train, statue, tree, cake, guitar, laptop, suitcase, truck, "
    "piano, tent, bench, cat, ladder, lamp, umbrella, fountain, tractor",
    "person": "man, woman, child, girl, boy, player, chef, cyclist, farmer, dancer, musician, worker, nurse, skier, "
    "fisherman, teacher, painter, tourist, driver, surfer",
    "surface": "table, desk, shelf, floor, bench, counter, bed, windowsill, roof, grass, stage, sofa, pavement, tray, "
    "beach, workbench, stove, stairs, bookcase, trolley",
    "sign": "sign, poster, label, jersey, storefront, book cover, badge, banner, ticket, licence plate, mug, package, "
    "billboard, T-shirt, plaque, envelope, screen, bottle, medal, spine of the book",
    "detail": "the dog's collar, the car's door handle, the jacket's buttons, the bird's beak, the shoe's laces, "
    "the cup's rim, the cat's eyes, the guitar's strings, the bicycle's pedals, the woman's earrings, "
    "the man's watch strap, the flower's stamens, the knife's handle, the cake's candles, the horse's bridle, "
    "the lamp's switch, the pen's cap, the boy's shoelaces, the insect's antennae, the bottle's lid",
    "many": "buttons on the shirt, candles on the cake, windows in the tower, petals on the flower, keys on the ring, "
    "spots on the ladybird, seeds on the bun, spokes in the wheel, rings on her fingers, books on the top shelf, "
    "birds on the wire, screws in the plate, coins in the hand, stripes on the flag, lights on the ceiling, "
    "stones in the necklace, legs of the insect, pencils in the jar, holes in the belt, rivets on the door",
    "surfaced": "scarf, curtain, tie, carpet, dress, cushion, tablecloth, butterfly's wing, vase, wallpaper, shell, "
    "floor tile, leaf, snake's skin, blanket, basket, bark, brick wall, sweater, handbag",
    "document": "invoice, letter, receipt, form, contract, report, menu, certificate, newspaper page, passport, "
    "ticket, prescription, bank statement, slide, leaflet, timetable",
    "entry": "invoice number, date of issue, total amount, postcode, due date, tax rate, customer number, "
    "second line of the address, unit price of the third item, date beside the signature, reference number, "
    "phone number, serial number, account number, page number, opening time, discount, name of the sender",
    "block": "logo, table, signature, heading, photo, stamp, barcode, address, letterhead, footer, summary box, "
    "list of items, margin note, page title, company name, map",
    "chart": "chart, graph, plot, figure, diagram, infographic, data figure, small chart, printed graph, "
    "upper plot, lower diagram, coloured chart, large graph, chart of the report, plot on the right, final graph",
    "series": "revenue, the temperature, unemployment, the rainfall, the blue line, the population, the red curve, "
    "the share price, the birth rate, energy use, the green series, the number of visitors, the dashed line, "
    "the price of oil, the first series, the vaccination rate",
    "moment": "2004, 2011, 2019, March, the third quarter, week 12, 1998, July, 2023, day 40, 2015, December",
    "scan": "scan, medical image, slice, study, clinical image, view, control scan, thin slice, follow-up scan, "
    "image of the patient, previous study, image on the left, upper slice, frontal view, emergency scan, latest image",
    "organ": "liver, left lung, heart, spleen, right kidney, stomach, pancreas, bladder, left ventricle, aorta, "
    "thyroid, spinal cord, right hip, gallbladder, knee joint, right lung",
    "lesion": "nodule, calcification, cyst, lesion, fracture line, polyp, bright spot, stone, bleed, dark spot",
}
SLOTS = {name: tuple(fillers.split(", ")) for name, fillers in SLOTS.items()}


@dataclass(frozen=True)
class Kind:
    """A kind of question: its level, and its templates by split; a kind that is held out has only "test_kinds"."""

    name: str
    level: str
    templates: dict[str, tuple[str, ...]]


def _known(name: str, level: str, *templates: str) -> Kind:
    """A kind of the train split: five templates for training, one for validation, the rest held out."""
    return Kind(name, level, {TRAIN: templates[:5], VALIDATION: templates[5:6], "test_phrasings": templates[6:]})


def _held_out(name: str, level: str, *templates: str) -> Kind:
    return Kind(name, level, {"test_kinds": templates})


COARSE = [
    _known(
        "place", "coarse",
        "What kind of place does this {image} show?", "What sort of location can be seen {here}?",
        "In what setting was this {image} taken?", "Which type of environment is this {image} of?",
        "Is this {image} of a city, a village or the countryside?",
        "How would you name the place in this {image}?",
        "Where does the {image} seem to have been made: at sea, in the mountains or in a town?",
        "What surroundings does this {image} depict?",
    ),
    _known(
        "indoors", "coarse",
        "Was this {image} taken indoors or outdoors?", "Is the scene of the {image} inside a building?",
        "Are we inside or outside {here}?", "Does this {image} show an interior?",
        "Would you call this {image} an indoor scene or an outdoor scene?",
        "Is this {image} from inside a room or from the open air?",
        "Did the photographer of this {image} stand in the open?", "Indoors or in the open: which fits this {image}?",
    ),
    _known(
        "time", "coarse",
        "What time of day is it {here}?", "Is it day or night {here}?", "Which season does this {image} show?",
        "What is the weather like {here}?", "Was this {image} taken in the morning or in the evening?",
        "Does it look like summer or winter {here}?",
        "What season and weather does the {image} suggest?", "Is this {image} lit by daylight?",
    ),
    _known(
        "summary", "coarse",
        "Describe this {image} in one sentence.", "What is this {image} about?", "Summarise the {image} briefly.",
        "What is going on overall {here}?", "Give the {image} a short caption.",
        "What is the main subject of this {image}?",
        "In a few words, what do we see {here}?", "Write a title for this {image}.",
    ),
    _known(
        "mood", "coarse",
        "What mood does this {image} convey?", "What is the atmosphere like {here}?",
        "Does the scene in this {image} feel calm or busy?", "What feeling does the whole {image} give you?",
        "Is the overall impression of this {image} cheerful or gloomy?",
        "How would you describe the general atmosphere of this {image}?",
        "Which emotion does the {image} as a whole evoke?", "Does it seem peaceful or hectic {here}?",
    ),
    _known(
        "document type", "coarse",
        "What type of document is shown in this {page}?", "Is the page in this {page} a letter or a form?",
        "What kind of paper does the {page} show?", "Is the document in this {page} printed or handwritten?",
        "Which category does the scanned page in the {page} belong to?",
        "What sort of page is this {page} a scan of?",
        "Does the {page} show a page of a book, a form or a bill?", "What is this {page} a copy of?",
    ),
    _known(
        "chart type", "coarse",
        "What kind of {chart} is this?", "Is this {chart} made of bars or of lines?",
        "Which type of {chart} do we have here?", "How is the data displayed in this {chart}?",
        "Is this {chart} a pie, a bar or a scatter display?",
        "What form of display was chosen for this {chart}?",
        "Does the {chart} use bars, lines or sectors?", "Name the type of this {chart}.",
    ),
    _known(
        "modality", "coarse",
        "Which imaging modality was used for this {scan}?", "Is this {scan} a CT, an MRI or an X-ray?",
        "How was this {scan} acquired?", "In which plane is this {scan}?",
        "Is this {scan} from ultrasound or from tomography?",
        "What type of medical imaging is this {scan}?",
        "Does the {scan} come from an MRI machine?", "By what technique was the {scan} produced?",
    ),
    _held_out(
        "event", "coarse",
        "What event is taking place {here}?", "Is this {image} from a wedding or a concert?",
        "Which occasion is being celebrated {here}?", "What sort of gathering does the {image} record?",
    ),
    _held_out(
        "style", "coarse",
        "Is this {image} a painting or a real scene?", "What artistic style is this {image} in?",
        "Is the {image} in colour or in black and white?", "From which era does this {image} seem to be?",
    ),
    _held_out(
        "body region", "coarse",
        "Which part of the body does this {scan} show?", "Is this {scan} of the chest or of the abdomen?",
        "What region of the patient is covered by the {scan}?", "Does this {scan} look normal at first sight?",
    ),
    _held_out(
        "chart topic", "coarse",
        "What is this {chart} about?", "Which subject does the {chart} deal with?",
        "What does this {chart} try to tell the reader?", "Is the general message of the {chart} good or bad?",
    ),
]  # fmt: skip
MEDIUM = [
    _known(
        "objects", "medium",
        "Which objects are on the {surface}?", "What is lying on the {surface}?",
        "What things stand on the {surface}?", "Name the items on the {surface}.",
        "What has been put on the {surface}?",
        "Which items can be found on the {surface}?",
        "List everything that is on the {surface}.", "What do you see on top of the {surface}?",
    ),
    _known(
        "position", "medium",
        "Where is the {object} {here}?", "In which part of the {image} is the {object}?",
        "Is the {object} on the left or on the right?", "Where does the {object} stand?",
        "Is the {object} in the foreground or in the background?",
        "On which side of the {image} is the {object}?",
        "At what place in the {image} do we find the {object}?", "Locate the {object}.",
    ),
    _known(
        "relation", "medium",
        "What is to the left of the {object}?", "What stands behind the {object}?", "Who is next to the {object}?",
        "Which object is in front of the {object}?", "What is between the {object} and the wall?",
        "What is beside the {object}?",
        "What can be seen to the right of the {object}?", "Is anything standing under the {object}?",
    ),
    _known(
        "action", "medium",
        "What is the {person} doing?", "What is the {person} holding?", "Is the {person} sitting or standing?",
        "In which direction is the {person} moving?", "What is the {person} working on?",
        "Which activity is the {person} engaged in?",
        "How is the {person} spending the time?", "Is the {person} walking, running or resting?",
    ),
    _known(
        "object look", "medium",
        "What colour is the {object}?", "What shape does the {object} have?", "What kind of {object} is it?",
        "Is the {object} large or small compared with the rest?", "What is the {object} made of?",
        "How does the {object} look?",
        "In which colour is the {object} painted?", "Describe the {object}.",
    ),
    _known(
        "layout", "medium",
        "Where on the {document} is the {block}?", "Is the {block} at the top or at the bottom of the {document}?",
        "What is below the {block} on this {document}?", "Does the {document} have a {block}?",
        "Which part of the {document} holds the {block}?",
        "At which edge of the {document} is the {block} placed?",
        "What stands next to the {block} on the {document}?", "Find the {block} on this {document}.",
    ),
    _known(
        "trend", "medium",
        "How does {series} develop over time?", "Is {series} rising or falling in this {chart}?",
        "When does {series} reach its peak in the {chart}?", "Does {series} stay above the average in this {chart}?",
        "In which half of the {chart} does {series} change most?",
        "What course does {series} take in the {chart}?",
        "Does the {chart} show {series} going up or down?", "Where is {series} at its lowest?",
    ),
    _known(
        "organ", "medium",
        "Where is the {organ} in this {scan}?", "Is the {organ} enlarged in this {scan}?",
        "What lies next to the {organ} in the {scan}?", "Which organ is beside the {organ}?",
        "Is the {organ} visible in this {scan}?",
        "What shape does the {organ} have in the {scan}?",
        "Outline the {organ} in this {scan}.", "Does the {organ} appear displaced in the {scan}?",
    ),
    _held_out(
        "clothing", "medium",
        "What is the {person} wearing?", "Does the {person} wear a hat?",
        "What colour are the clothes of the {person}?", "Is the {person} dressed for work or for sports?",
    ),
    _held_out(
        "interaction", "medium",
        "How are the {person} and the animal getting along?", "Who is the {person} talking to?",
        "What is the {person} handing to the other?", "Are the {person} and the others facing each other?",
    ),
    _held_out(
        "few things", "medium",
        "How many people are near the {object}?", "Are there one or two of the kind of the {object}?",
        "How many animals stand around the {object}?", "Are there more people than chairs at the {object}?",
    ),
    _held_out(
        "instrument", "medium",
        "Which instrument is the surgeon using on the {organ}?", "What tool is touching the {organ}?",
        "From which side does the instrument approach the {organ}?", "What step is being carried out at the {organ}?",
    ),
]  # fmt: skip
FINE = [
    _known(
        "text", "fine",
        "What does the text on the {sign} say?", "Read the words on the {sign}.", "What is written on the {sign}?",
        "Which word comes last on the {sign}?", "In which language is the {sign} written?",
        "What are the exact words on the {sign}?",
        "Spell out the lettering on the {sign}.", "Transcribe the {sign}.",
    ),
    _known(
        "number", "fine",
        "What number is printed on the {sign}?", "Which digits can be read on the {sign}?",
        "What is the last digit on the {sign}?", "Which year is given on the {sign}?",
        "What price is shown on the {sign}?",
        "What figure stands on the {sign}?",
        "Read the number on the {sign}.", "Does the number on the {sign} end in a five?",
    ),
    _known(
        "detail colour", "fine",
        "What colour is {detail}?", "Which colour does {detail} have?", "Is {detail} black or brown?",
        "Does {detail} match the rest in colour?", "What shade is {detail}?",
        "Of what colour is {detail}?",
        "Tell me the colour of {detail}.", "Is {detail} darker than its surroundings?",
    ),
    _known(
        "pattern", "fine",
        "What pattern is on the {surfaced}?", "What is the texture of the {surfaced}?",
        "Is the {surfaced} striped or dotted?", "How wide are the stripes on the {surfaced}?",
        "Which small motif is repeated on the {surfaced}?",
        "How is the {surfaced} decorated?",
        "Describe the fine structure of the {surfaced}.", "Are there dots or checks on the {surfaced}?",
    ),
    _known(
        "many things", "fine",
        "How many {many} are there?", "Count the {many}.", "What is the exact number of {many}?",
        "Are there more than ten {many}?", "Is the number of {many} even or odd?",
        "How many {many} can you count?",
        "Give the precise count of {many}.", "What do the {many} add up to?",
    ),
    _known(
        "entry", "fine",
        "What is the {entry} on this {document}?", "Read the {entry} from the {document}.",
        "Which {entry} is given on the {document}?", "Is the {entry} on the {document} filled in?",
        "What does the {document} state as the {entry}?",
        "Look up the {entry} on this {document}.",
        "Tell me the {entry} that the {document} gives.", "Extract the {entry} of the {document}.",
    ),
    _known(
        "value", "fine",
        "What is the exact value of {series} in {moment}?",
        "How high was {series} in {moment} according to the {chart}?",
        "Read the value of {series} at {moment}.", "By how many units did {series} change in {moment}?",
        "Which number does the {chart} give for {series} in {moment}?",
        "What figure belongs to {series} in {moment}?",
        "State {series} for {moment} to one decimal.", "What does the axis read for {series} at {moment}?",
    ),
    _known(
        "lesion", "fine",
        "How large is the small {lesion} in the {organ}?", "Is there a tiny {lesion} in the {organ}?",
        "What is the diameter of the {lesion} near the {organ}?",
        "Are the margins of the {lesion} in the {organ} sharp?",
        "How many millimetres does the {lesion} in the {organ} measure?",
        "What is the exact size of the {lesion} at the {organ}?",
        "Does the {organ} contain a minute {lesion}?", "Is the edge of the {lesion} in the {organ} smooth or ragged?",
    ),
    _held_out(
        "clock", "fine",
        "What time does the clock beside the {object} show?", "Where do the hands of the {person}'s watch point?",
        "Is it past three by the clock above the {surface}?", "At which minute does the dial on the {surface} stand?",
    ),
    _held_out(
        "brand", "fine",
        "Which brand is the {object}?", "Whose logo is on the {object}?",
        "Which company made the {object}?", "What emblem does the {person} have on the sleeve?",
    ),
    _held_out(
        "damage", "fine",
        "Is there a scratch on the {object}?", "Where is the crack in the {surface}?",
        "Does the {object} show any rust?", "Are there crumbs or stains on the {surface}?",
    ),
    _held_out(
        "face", "fine",
        "What colour are the eyes of the {person}?", "Is the {person} looking at the camera?",
        "Does the {person} have freckles?", "Which tooth is the {person} missing?",
    ),
]  # fmt: skip
KINDS = (*COARSE, *MEDIUM, *FINE)


def seed_corpus() -> list[dict]:
    """
    All rows of the seed corpus, the same at every call, in the form of corpus.py.

    Returns:
        list of dict: with `split`, `kind` and `phrasing` (the template) beside the corpus's columns; no question
        stands in two rows.
    """
    rows, asked = [], set()
    for kind in KINDS:
        for split, templates in kind.templates.items():
            for template in templates:
                for part, question in _questions(template, split):
                    if question not in asked:
                        asked.add(question)
                        rows.append(_row(kind, template, part, question))
    return rows


def _questions(template: str, split: str) -> list[tuple[str, str]]:
    """The template filled in several ways, each with its split; of training's some are kept for test_questions."""
    names = [name for name in SLOTS if f"{{{name}}}" in template]
    filled = [
        template.format(**dict(zip(names, words, strict=True))) for words in product(*(SLOTS[name] for name in names))
    ]
    Random(template).shuffle(filled)
    if split != TRAIN:
        return [(split, question) for question in filled[: MOST[split]]]
    held_out = min(MOST["test_questions"], max(1, len(filled) // 5))
    parts = ["test_questions"] * held_out + [TRAIN] * MOST[TRAIN]
    return list(zip(parts, filled, strict=False))


def _row(kind: Kind, template: str, split: str, question: str) -> dict:
    return corpus_row(
        question,
        {level: float(level == kind.level) for level in LEVELS},
        TEMPLATE,
        created_at=CREATED,
        kind=kind.name,
        phrasing=template,
        split=split,
    )
