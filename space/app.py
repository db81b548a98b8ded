"""The Granulon Space: ask about an image, and see which level the model chose and its clusters.

Started with `python app.py`. MODEL_ID and MODEL_REVISION name the model (granulon_model.py).
MODEL_NOTICE is a line that its licence requires, such as "Built with Llama"; MODEL_ABOUT says in one line what the
model knows and what not.
"""

import base64
import io
import os
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import gradio as gr
import overlay
import torch
from granulon_model import BY_QUESTION, MAX_QUESTION, MAX_TOKENS, MODEL_ID, MODEL_REVISION, SECONDS, VIEWS, Granulon

try:
    import spaces  # ZeroGPU: a function gets a GPU for as long as it runs
except ImportError:
    spaces = None

HERE = Path(__file__).parent
MODEL_NOTICE = os.environ.get("MODEL_NOTICE", "")

MAX_MEGABYTES = 20  # of an uploaded file
ENCODE_SECONDS, TOKEN_SECONDS = 10, 0.1  # GPU time requested from ZeroGPU for an image and for each token
QUEUE = 100  # waiting requests; further ones are refused
SESSIONS = 1000  # open pages that are remembered

TITLE = "Granulon"
PAPER = "https://arxiv.org/abs/2603.08800"
START = overlay.status("Choose an image, then ask about it.", done=True)
EMPTY = "*(an empty answer)*"
NEXT = "Ask on about this image, or take another one to begin again."
ABOUT = os.environ.get("MODEL_ABOUT", "It knows what it was trained on, guesses the rest, and does not say which.")
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
TURNS = 8  # of a conversation that are read


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


class Returned:
    """Iterates over a generator and keeps what it returns, as `value`."""

    def __init__(self, generator):
        self.generator, self.value = generator, None

    def __iter__(self):
        self.value = yield from self.generator


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


def picture(image, description, question=""):
    """The clusters over the image, or a note if there are none, as HTML; `question` says whose they are."""
    if description["cluster_map"] is None:
        return '<p class="hint">This model has no levels of granularity, so there are no clusters to show.</p>'
    title = f"Seen at level {description['level']}" + (f" for “{question}”" if question else "")
    return overlay.figure(image, description["cluster_map"], description["clusters"], title)


@contextmanager
def user_errors(title):
    """Show errors that the visitor can correct as messages on the page."""
    try:
        yield
    except (ValueError, TimeoutError) as error:
        raise gr.Error(_message(error), title=title) from error


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
        inputs = granulon.prepare(image, settings["turns"])
        return granulon.encode(inputs, settings["level"], settings["view"])[1]

    def generate(image, settings, why=False):
        """Yield the description, then it with the growing answer: (description, text, seconds to the first token).

        With `why` the last description's clusters have the nats of `Granulon.evidence`.
        """
        with user_errors("No answer"):
            inputs = granulon.prepare(image, settings["turns"])
            torch.manual_seed(settings["seed"])
            start = time.perf_counter()
            visual, description = granulon.encode(inputs, settings["level"], settings["view"])
            encoding = time.perf_counter() - start
            yield description, "", None
            answering = Returned(granulon.answer(inputs, visual, settings))
            for text, first in answering:
                yield description, text, encoding + first
            if why and (nats := granulon.evidence(inputs, visual, answering.value)):
                clusters = [entry | {"nats": nats[entry["number"]]} for entry in description["clusters"]]
                yield description | {"clusters": clusters}, text, encoding + first

    @on_gpu(seconds)
    def answer(image, settings):
        yield from generate(image, settings, why=True)

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

    def respond(chat, image, question, *values):
        """Yield question field, conversation, status, numbers, bars, clusters and comparison."""
        shown = list(chat or [])
        try:
            opened, settings = granulon.check(image, question, *values)
            said = [message["content"] for message in shown][-2 * TURNS :]
            settings["turns"] = [*map(_plain, said), *settings["turns"]]
            shown += [{"role": "user", "content": settings["turns"][-1]}, {"role": "assistant", "content": "…"}]
            yield gr.skip(), [*shown], overlay.status("Reading …"), gr.skip(), gr.skip(), gr.skip(), ""
            for description, text, first in answer_on_gpu(opened, settings):
                shown[-1] = {"role": "assistant", "content": text or "…"}
                if first is None:
                    bars = overlay.level_bars(
                        description["probabilities"], description["level"], description["chosen_by"]
                    )
                    views = tiles(description), bars, picture(opened, description, settings["turns"][-1])
                else:
                    views = tiles(description, first), gr.skip(), gr.skip()
                yield gr.skip(), [*shown], overlay.status("Answering …"), *views, gr.skip()
        except (ValueError, TimeoutError, gr.Error) as error:
            yield gr.skip(), list(chat or []), overlay.problem(_message(error)), *[gr.skip()] * 4
            return
        shown[-1] = {"role": "assistant", "content": text.strip() or EMPTY}
        seen = picture(opened, description, settings["turns"][-1])
        yield "", [*shown], overlay.status(NEXT, done=True), gr.skip(), gr.skip(), seen, gr.skip()

    def compare(chat, image, question, *values):
        """Yield status and the levels side by side, those that are still to come too."""
        asked = [_plain(message["content"]) for message in chat or [] if message["role"] == "user"]
        try:
            opened, settings = granulon.check(image, question or "".join(asked[-1:]), *values)
            names = granulon.levels or ["no levels"]
            panels = [overlay.heading(name) + overlay.status("Waiting …") for name in names]
            yield overlay.status(f"Comparing: level 1 of {len(names)} …"), overlay.columns(panels)
            for number, (level, description, text, first) in enumerate(answer_at_each_level(opened, settings), 1):
                head = overlay.answer_box(text, EMPTY) + tiles(description, first)
                panels[number - 1] = overlay.heading(level or "no levels") + head + picture(opened, description)
                done = number == len(names)
                note = "Compared below." if done else f"Comparing: level {number + 1} of {len(names)} …"
                yield overlay.status(note, done), overlay.columns(panels)
        except (ValueError, TimeoutError, gr.Error) as error:
            yield overlay.problem(_message(error)), gr.skip()

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


def _plain(content):
    """The text of a message of the conversation, which Gradio may send in parts."""
    parts = [content] if isinstance(content, str | dict) else content
    return "\n".join(part if isinstance(part, str) else part.get("text", "") for part in parts)


def _message(error):
    """The text of an error as a sentence."""
    text = str(getattr(error, "message", error))
    return text[:1].upper() + text[1:].rstrip(".") + "."


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


LINK = """async (chat, question, level, view, tokens, temperature, seed) => {
  const text = (content) => typeof content === "string" ? content : content.map((part) => part.text ?? "").join(" ");
  const asked = (chat ?? []).filter((message) => message.role === "user").map((message) => text(message.content));
  question = question || asked.at(-1) || "";
  const link = new URL(window.location.href);
  const values = {q: question, level, visual_view: view, tokens, temperature, seed};
  for (const [name, value] of Object.entries(values)) link.searchParams.set(name, value);
  const shown = document.querySelector("#image img");
  try {  // with the image, where the browser can share files
    const data = await (await fetch(shown.src)).blob();
    const files = [new File([data], "image." + data.type.split("/")[1], {type: data.type})];
    const share = {title: "Granulon", text: question, url: link.href, files};
    if (navigator.canShare?.(share)) await navigator.share(share);
  } catch {}
  navigator.clipboard?.writeText(link.href).catch(() => {});
  return link.href;
}"""


def _examples(image, question):
    """A photograph for each level, as buttons with a thumbnail."""
    gr.Markdown("A question of each level:", elem_id="examples")
    with gr.Row(elem_id="example-buttons"):
        for name, text in EXAMPLES:
            path = str(HERE / "examples" / f"{name}.jpg")
            button = gr.Button(f"{name}: {text}", icon=path, size="sm", min_width=150, elem_classes="example")
            values = partial(_example, path, text)
            button.click(values, None, [image, question], api_visibility="private", show_progress="hidden")


def _example(path, text):
    return path, text


def _links():
    """Where the model, the paper and the code are, and what to expect of the model."""
    revision = MODEL_REVISION if MODEL_REVISION != "main" else ""
    where = f"[{MODEL_ID}](https://huggingface.co/{MODEL_ID}/tree/{MODEL_REVISION}) {revision}"
    model = MODEL_ID.rstrip("/").rpartition("/")[2] if Path(MODEL_ID).exists() else where.strip()
    lines = [f"{ABOUT} Model: {model} · [paper]({PAPER})"]
    return " · ".join([*lines, *([MODEL_NOTICE] if MODEL_NOTICE else [])])


def build(granulon):
    """The page and its API, as a `gr.Blocks` that is not launched yet."""
    functions = handlers(granulon)
    choices = [("as the question asks", BY_QUESTION), *((name, name) for name in granulon.levels)]
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 1200), fill_width=True) as page:
        gr.Markdown(INTRO, elem_id="intro")
        with gr.Row(elem_id="main"):
            with gr.Column(scale=5, min_width=320):
                image = without_decoding(gr.Image(
                    type="filepath", image_mode=None, sources=["upload", "webcam", "clipboard"],
                    buttons=["fullscreen"], label="Image", height=340, elem_id="image",
                    placeholder=f"Drop or paste an image, or choose a file of at most {MAX_MEGABYTES} MB",
                    alt_text="the image you ask about",
                ))  # fmt: skip
                question = gr.Textbox(
                    label="Question", placeholder="What do you want to know?", lines=1, max_lines=4,
                    max_length=MAX_QUESTION, elem_id="question",
                )  # fmt: skip
                level = gr.Radio(choices, value=BY_QUESTION, label="Level", elem_id="level")
                with gr.Row(elem_id="buttons"):
                    ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=90)
                    stop = gr.Button("Stop", elem_id="stop", min_width=90)
                    compare = gr.Button("Compare all levels", elem_id="compare", min_width=190)
                _examples(image, question)
                with gr.Accordion("More settings", open=False, elem_id="settings"):
                    view = gr.Radio(list(VIEWS), value="auto", label="Image tokens that are read", elem_id="view")
                    tokens = gr.Slider(1, MAX_TOKENS, 128, step=1, label="Maximal length of the answer, in tokens")
                    temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: always the most likely word)")
                    seed = gr.Number(0, precision=0, minimum=0, label="Seed")
                    share = gr.Button("Share this question", elem_id="link-button", min_width=120)
                    link = gr.Textbox(label="Link, without the image", interactive=True, elem_id="link")
            with gr.Column(scale=6, min_width=320):
                chat = gr.Chatbot(
                    label="Conversation", show_label=False, elem_id="answer", height=None, min_height=90,
                    max_height=420, buttons=["copy"], layout="panel", placeholder="The conversation appears here.",
                )  # fmt: skip
                status = gr.HTML(START, elem_id="status", padding=False)
                views = [gr.HTML(elem_id=name, padding=False) for name in ("facts", "bars", "seen")]
        compared = gr.HTML(elem_id="compared", padding=False)
        gr.Markdown(_links(), elem_id="notice")

        settings = [question, level, view, tokens, temperature, seed]
        inputs = [image, *settings]
        model = {"concurrency_id": "model", "concurrency_limit": 1}  # one answer at a time, seeds included
        busy = {"api_visibility": "private", "show_progress": "full", "show_progress_on": status}
        asking = gr.on(
            [ask.click, question.submit], functions["respond"], [chat, *inputs],
            [question, chat, status, *views, compared], trigger_mode="once", **busy, **model,
        )  # fmt: skip
        comparing = compare.click(
            functions["compare"], [chat, *inputs], [status, compared], trigger_mode="once", **busy, **model
        )
        stop.click(None, cancels=[asking, comparing])
        share.click(None, [chat, *settings], link, js=LINK)
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        # Results of another image would only mislead.
        image.change(lambda: ([], START, "", "", "", ""), None, [chat, status, *views, compared], queue=False, **quiet)
        page.load(settings_of_link(granulon.levels), None, settings, **quiet)

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
        block_border_width="1px",
        block_border_color="*neutral_300",
        border_color_primary="*neutral_300",
        input_border_width="1px",
        input_border_color="*neutral_400",
        checkbox_border_color="*neutral_500",
        button_border_width="1px",
        button_secondary_border_color="*neutral_300",
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
