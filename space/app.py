"""The Granulon Space: ask about an image, and see which level the model chose and its clusters.

Started with `python app.py`. MODEL_ID and MODEL_REVISION name the model: a Hub id and a revision, or a folder.
MODEL_NOTICE is a line that its licence requires, such as "Built with Llama".
"""

import base64
import io
import os
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import overlay
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

try:
    import spaces  # ZeroGPU: a function gets a GPU for as long as it runs
except ImportError:
    spaces = None

HERE = Path(__file__).parent
MODEL_ID = os.environ.get("MODEL_ID", "jinlab/granulon-qwen1.5b")
MODEL_REVISION = os.environ.get("MODEL_REVISION", "main")
MODEL_NOTICE = os.environ.get("MODEL_NOTICE", "")

MAX_MEGABYTES = 20  # of an uploaded file
MAX_PIXELS = 25_000_000
MAX_QUESTION = 1000  # characters
MAX_TOKENS = 512
SECONDS = 60  # time limit of an answer
ENCODE_SECONDS, TOKEN_SECONDS = 10, 0.1  # GPU time requested from ZeroGPU for an image and for each token
QUEUE = 100  # waiting requests; further ones are refused
VIEWS = ("auto", "full", "pixel", "semantic")
SESSIONS = 1000  # open pages that are remembered
WORKER = ThreadPoolExecutor(1)  # generates answers: a new thread for each would leak memory
BY_QUESTION = "auto"  # the controller chooses the level

TITLE = "Granulon"
START = overlay.answer_box("", "The answer appears here.", done=True)
EMPTY = "The answer is empty."
INTRO = (
    "# Granulon\n"
    "Ask about an image. The question decides how coarsely the model looks: it groups the image into a few large "
    "clusters or many small ones, and you see which. *For research; **not for clinical use**.*"
)
EXAMPLES = [
    ("coarse", "What kinds of things are in the picture?"),
    ("medium", "What is this?"),
    ("fine", "Which character is on the small sign?"),
]


def without_decoding(image):
    """The image input, changed to return the upload's path or bytes: only `load_rgb` may decode it.

    Through the API a visitor sends any path or data URL: a path must lie in the folder of uploads.
    """

    def preprocess(payload):
        if payload is None:
            return None
        if (payload.url or "").startswith("data:"):
            return io.BytesIO(_decoded(payload.url))
        if not _is_upload(payload.path, image.GRADIO_CACHE):
            raise gr.Error("The image was not uploaded here; upload it first.", title="Invalid input")
        return payload.path

    image.preprocess = preprocess
    return image


def _is_upload(path, folder):
    """Whether a visitor's path is a file in the folder of uploads; other files are not even checked for existence."""
    try:
        path = Path(path or "").resolve()
        return path.is_relative_to(Path(folder).resolve()) and path.is_file()
    except ValueError:  # an invalid path, such as one with a null byte
        return False


def _decoded(url):
    """The bytes of a data URL, limited to the size of an upload."""
    text = url.partition(",")[2]
    try:
        if len(text) > MAX_MEGABYTES * 2**20 * 4 // 3:
            raise ValueError(f"it has more than {MAX_MEGABYTES} MB")
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise gr.Error(f"This image cannot be read: {error}.", title="Invalid input") from error


class Granulon:
    """The published model; every error that a user can cause is a ValueError."""

    def __init__(self, name=MODEL_ID, revision=MODEL_REVISION):
        published = {"revision": revision, "trust_remote_code": True}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", **published).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(name, **published)
        self.load_rgb = get_class_from_dynamic_module("image_io.load_rgb", name, revision=revision)
        self.levels = [level["name"] for level in self.model.config.granularities]

    def check(self, path, question, level, view, max_new_tokens, temperature, seed):
        """Check the inputs; returns the image and a dict of settings.

        Raises:
            ValueError: with a message for the user.
        """
        question = (question or "").strip()
        if not path:
            raise ValueError("there is no image yet; upload one, or take an example")
        if not question:
            raise ValueError("there is no question yet; type one below the image")
        if len(question) > MAX_QUESTION:
            raise ValueError(f"the question has {len(question)} characters, the limit is {MAX_QUESTION}; shorten it")
        if level not in (BY_QUESTION, *self.levels):
            raise ValueError(f"the level is {level!r}; choose one of {(BY_QUESTION, *self.levels)}")
        if view not in VIEWS:
            raise ValueError(f"the view is {view!r}; choose one of {VIEWS}")
        try:
            image = self.load_rgb(path, max_pixels=MAX_PIXELS)
        except ValueError as error:
            # Without the path, which is one of the server.
            raise ValueError("this " + str(error).replace(f"image {path}", "image")) from None
        return image, {
            "question": question,
            "level": None if level == BY_QUESTION else level,
            "view": view,
            "max_new_tokens": int(min(max(max_new_tokens, 1), MAX_TOKENS)),
            "temperature": float(min(max(temperature, 0.0), 2.0)),
            "seed": int(seed or 0) % 2**32,
        }

    def prepare(self, image, question):
        """The processed prompt of a question about an image."""
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        ).to(self.model.device, dtype=self.model.dtype)

    def encode(self, inputs, level, view):
        """
        Encode the image and describe the chosen level and the clusters.

        Returns:
            the argument `visual` of `answer`, and a `dict`: level, chosen_by, probabilities (all None in a model
            without levels), view, tokens (pixel, semantic), clusters (number, score, share) and, as an array,
            cluster_map (H, W).
        """
        visual = self.model.explain(**inputs, granularity=level)
        (description,) = visual.describe(view)
        (clusters,) = description.pop("images")
        chosen = description.pop("granularity") or dict.fromkeys(("name", "chosen_by", "probabilities"))
        return visual, {"level": chosen.pop("name"), **chosen, **description, **clusters}

    def answer(self, inputs, visual, settings):
        """Yield (answer so far, seconds to the first token) during generation; closing the generator stops it.

        Raises:
            TimeoutError: no new text for `SECONDS`.
        """
        streamer = TextIteratorStreamer(
            self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=SECONDS
        )
        stopped, start = threading.Event(), time.perf_counter()

        def generate():
            try:
                if stopped.is_set():
                    return
                torch.manual_seed(settings["seed"])
                self.model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    visual=visual,
                    visual_view=settings["view"],
                    max_new_tokens=settings["max_new_tokens"],
                    max_time=SECONDS,
                    do_sample=settings["temperature"] > 0,
                    temperature=settings["temperature"] or None,
                    streamer=streamer,
                    stopping_criteria=[lambda ids, *_, **__: torch.full((len(ids),), stopped.is_set())],
                )
            finally:
                streamer.end()  # also after an error, which the waiting thread then raises

        generation = WORKER.submit(generate)
        text, first = "", None
        try:
            for piece in streamer:
                first = time.perf_counter() - start if first is None and piece else first
                text += piece
                if piece:
                    yield text, first
        except queue.Empty:
            raise TimeoutError(
                f"the answer took longer than {SECONDS} s; ask for a shorter one, or from the semantic tokens alone"
            ) from None
        finally:
            stopped.set()
            wait([generation])  # else the next answer would have to
        if generation.done() and generation.exception():
            raise generation.exception()
        if not text:
            yield "", time.perf_counter() - start


def as_json(description):
    """The dict of `Granulon.encode` with names of the clusters, and the map as lists."""
    cluster_map = description["cluster_map"]
    clusters = [{**entry, "name": overlay.cluster_name(entry["number"] - 1)} for entry in description["clusters"]]
    return {**description, "clusters": clusters, "cluster_map": None if cluster_map is None else cluster_map.tolist()}


def tiles(description, first=None):
    """The numbers below the answer, as HTML; `first` is the time to the first token in seconds."""
    tokens = description["tokens"]
    chosen_by = {"controller": "chosen by the question", "request": "chosen by you", None: "none"}
    return overlay.tiles(
        [
            ("Level", description["level"] or "none", chosen_by.get(description["chosen_by"], "set by the model")),
            ("Visual tokens", str(sum(tokens.values())), f"{tokens['pixel']} pixel + {tokens['semantic']} semantic"),
            ("First token", "…" if first is None else f"{first:.2f} s", "to the first word"),
        ]
    )


def picture(image, description):
    """The clusters over the image, or a note if there are none, as HTML."""
    if description["cluster_map"] is None:
        return '<p class="hint">This model has no levels of granularity, so there are no clusters to show.</p>'
    title = f"Seen at level {description['level']}"
    return overlay.figure(image, description["cluster_map"], description["clusters"], title)


@contextmanager
def user_errors(title):
    """Show errors that the visitor can correct as messages on the page."""
    try:
        yield
    except (ValueError, TimeoutError) as error:
        raise gr.Error(str(error)[:1].upper() + str(error)[1:] + ".", title=title) from error


def on_gpu(seconds):
    """A decorator: on ZeroGPU the function runs with a GPU for `seconds(image, settings)`."""
    return (lambda function: function) if spaces is None else spaces.GPU(duration=seconds)


def gpu_functions(granulon):
    """The functions of (image, settings) that need the model: describe, answer, answer_at_each_level."""

    def seconds(image, settings, answers=1):
        generation = TOKEN_SECONDS * settings["max_new_tokens"]
        return ENCODE_SECONDS + int(answers * min(SECONDS, ENCODE_SECONDS + generation))

    @on_gpu(lambda image, settings: ENCODE_SECONDS)
    def describe(image, settings):
        inputs = granulon.prepare(image, settings["question"])
        return granulon.encode(inputs, settings["level"], settings["view"])[1]

    def generate(image, settings):
        """Yield the description, then it with the growing answer: (description, text, seconds to the first token)."""
        with user_errors("No answer"):
            inputs = granulon.prepare(image, settings["question"])
            torch.manual_seed(settings["seed"])
            start = time.perf_counter()
            visual, description = granulon.encode(inputs, settings["level"], settings["view"])
            encoding = time.perf_counter() - start
            yield description, "", None
            for text, first in granulon.answer(inputs, visual, settings):
                yield description, text, encoding + first

    @on_gpu(seconds)
    def answer(image, settings):
        yield from generate(image, settings)

    @on_gpu(lambda image, settings: seconds(image, settings, len(granulon.levels) or 1))
    def answer_at_each_level(image, settings):
        for level in granulon.levels or [None]:
            *_, last = generate(image, {**settings, "level": level})
            yield level, *last

    return describe, answer, answer_at_each_level


def handlers(granulon):
    """The functions behind the buttons and the API. Inputs are checked before a GPU is requested."""
    describe, answer_on_gpu, answer_at_each_level = gpu_functions(granulon)
    check = user_errors("Invalid input")(granulon.check)

    def respond(*values):
        image, settings = check(*values)
        updates = answer_on_gpu(image, settings)
        description, text, _ = next(updates)
        bars = overlay.level_bars(description["probabilities"], description["level"], description["chosen_by"])
        yield overlay.answer_box("", "Reading …"), tiles(description), bars, picture(image, description)
        for description, text, first in updates:
            yield overlay.answer_box(text, "…"), tiles(description, first), gr.skip(), gr.skip()
        yield overlay.answer_box(text, EMPTY, done=True), gr.skip(), gr.skip(), gr.skip()

    def compare(*values):
        image, settings = check(*values)
        panels = []
        for level, description, text, first in answer_at_each_level(image, settings):
            head = overlay.answer_box(text, EMPTY, done=True) + tiles(description, first)
            panels.append(overlay.heading(level or "no levels") + head + picture(image, description))
            yield overlay.columns(panels)

    def answer(image, question, level, view, max_new_tokens, temperature, seed) -> dict:
        """Answer a question about an image with Granulon, and return the level that it chose.

        Args:
            image: the image, at most 20 MB and 25 megapixels.
            question: what you want to know about it.
            level: "auto" lets the question decide; or the name of a level, such as "coarse" or "fine".
            view: which image tokens are read: "full", "pixel", "semantic", or "auto", as the level says.
            max_new_tokens: the longest answer, in tokens.
            temperature: 0 always takes the most likely word; higher values are more random.
            seed: the same seed gives the same random answer.

        Returns:
            answer, level, chosen_by, probabilities of the levels, view, tokens, clusters (number, name, score,
            share), seconds_to_first_token.
        """
        values = (image, question, level, view, max_new_tokens, temperature, seed)
        *_, (description, text, first) = answer_on_gpu(*check(*values))
        description = as_json(description)
        description.pop("cluster_map")
        return {"answer": text.strip(), **description, "seconds_to_first_token": first}

    def explain(image, question, level) -> dict:
        """The level that Granulon chooses for a question and the clusters of the image, without an answer.

        Args:
            image: the image, at most 20 MB and 25 megapixels.
            question: what you want to know about it.
            level: "auto" lets the question decide; or the name of a level.

        Returns:
            level, chosen_by, probabilities, tokens, clusters, and cluster_map: for each patch the number of its
            cluster from 0.
        """
        return as_json(describe(*check(image, question, level, "auto", 1, 0, 0)))

    return {"respond": respond, "compare": compare, "answer": answer, "explain": explain}


def settings_of_link(levels):
    """A function that reads question and settings from the page's query; invalid ones are skipped."""

    def read(request: gr.Request):
        query = request.query_params if request else {}
        return (
            query.get("q", "")[:MAX_QUESTION] or gr.skip(),
            query["level"] if query.get("level") in (BY_QUESTION, *levels) else gr.skip(),
            query["visual_view"] if query.get("visual_view") in VIEWS else gr.skip(),
            _number(query.get("tokens"), int, 1, MAX_TOKENS),
            _number(query.get("temperature"), float, 0, 2),
            _number(query.get("seed"), int, 0, 2**32 - 1),
        )

    return read


def _number(text, kind, low, high):
    try:
        return min(max(kind(text), low), high)
    except (TypeError, ValueError, OverflowError):
        return gr.skip()


LINK = """(question, level, view, tokens, temperature, seed) => {
  const link = new URL(window.location.href);
  const values = {q: question, level, visual_view: view, tokens, temperature, seed};
  for (const [name, value] of Object.entries(values)) link.searchParams.set(name, value);
  navigator.clipboard?.writeText(link.href).catch(() => {});
  return link.href;
}"""


def _examples(image, question):
    gr.Examples(
        [[str(HERE / "examples" / f"{name}.jpg"), text] for name, text in EXAMPLES],
        [image, question],
        label="A question of each level",
        cache_examples=False,
        example_labels=[f"{name}: {text}" for name, text in EXAMPLES],
    )


def _outputs():
    """The outputs of an answer: the text, the numbers, the bars of the levels, and the clusters."""
    answer = gr.HTML(START, elem_id="answer", padding=False)
    return [answer, *(gr.HTML(elem_id=name, padding=False) for name in ("facts", "bars", "seen"))]


def build(granulon):
    """The page and its API, as a `gr.Blocks` that is not launched yet."""
    functions = handlers(granulon)
    choices = [("as the question asks", BY_QUESTION), *((name, name) for name in granulon.levels)]
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 1200), fill_width=True) as page:
        gr.Markdown(INTRO, elem_id="intro")
        with gr.Row(elem_id="main"):
            with gr.Column(scale=5, min_width=320):
                image = without_decoding(gr.Image(
                    type="filepath", image_mode=None, sources=["upload", "clipboard"], buttons=["fullscreen"],
                    label="Image", placeholder="## Drop an image here\nor choose a file, at most 20 MB", height=340,
                    elem_id="image", alt_text="the image you ask about",
                ))  # fmt: skip
                question = gr.Textbox(
                    label="Question", placeholder="What do you want to know?", lines=1, max_lines=4,
                    max_length=MAX_QUESTION, elem_id="question",
                )  # fmt: skip
                level = gr.Radio(choices, value=BY_QUESTION, label="Level", elem_id="level")
                with gr.Row(elem_id="buttons"):
                    ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=90)
                    stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=90)
                    compare = gr.Button("Compare all levels", elem_id="compare", min_width=190)
                with gr.Accordion("More settings", open=False, elem_id="settings"):
                    view = gr.Radio(list(VIEWS), value="auto", label="Image tokens that are read", elem_id="view")
                    tokens = gr.Slider(1, MAX_TOKENS, 128, step=1, label="Maximal length of the answer, in tokens")
                    temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: always the most likely word)")
                    seed = gr.Number(0, precision=0, minimum=0, label="Seed")
                _examples(image, question)
            with gr.Column(scale=6, min_width=320):
                outputs = _outputs()
        compared = gr.HTML(elem_id="compared", padding=False)
        with gr.Row(elem_id="share"):
            share = gr.Button("Copy a link to this question", elem_id="link-button", min_width=120)
            link = gr.Textbox(label="Link, without the image", interactive=True, elem_id="link", scale=3)

        if MODEL_NOTICE:
            gr.Markdown(MODEL_NOTICE, elem_id="notice")

        settings = [question, level, view, tokens, temperature, seed]
        inputs = [image, *settings]
        model = {"concurrency_id": "model", "concurrency_limit": 1}  # one answer at a time, seeds included
        asking = gr.on(
            [ask.click, question.submit], functions["respond"], inputs, outputs,
            api_visibility="private", show_progress="minimal", trigger_mode="once", **model,
        )  # fmt: skip
        comparing = compare.click(
            functions["compare"], inputs, compared, api_visibility="private", trigger_mode="once", **model
        )
        stop.click(None, cancels=[asking, comparing])
        share.click(None, settings, link, js=LINK)
        page.load(settings_of_link(granulon.levels), None, settings, api_visibility="private", show_progress="hidden")

        by_api, as_json = gr.Button(visible=False), gr.JSON(visible=False)
        by_api.click(functions["answer"], inputs, as_json, api_name="answer", **model)
        by_api.click(functions["explain"], inputs[:3], as_json, api_name="explain", **model)
    return page.queue(max_size=QUEUE, default_concurrency_limit=1)


def appearance():
    """Arguments of `launch` for theme, styles and script; system fonts, so that nothing is loaded from other hosts."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    script = (HERE / "script.js").read_text()
    theme = gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", radius_size="md", **fonts).set(
        body_text_color_subdued="*neutral_600",  # contrast above 7 : 1
        body_text_color_subdued_dark="*neutral_300",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )
    return {
        "theme": theme,
        "css_paths": str(HERE / "style.css"),
        "head": f"<script>{script}</script>",
    }


def main():
    page = build(Granulon())
    page.launch(
        mcp_server=True, max_file_size=f"{MAX_MEGABYTES}mb", max_threads=8, state_session_capacity=SESSIONS,
        ssr_mode=False, **appearance(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
