"""The Space: its answers, its refusals, and that it keeps running."""

import importlib.util
import json
import re
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import count_calls
from PIL import Image
from space_load import bad_files, data_url, good_picture, peak_memory, png_bomb, running_space

from granulon.hub.answer import ask
from granulon.hub.assemble import assemble_tiny
from granulon.hub.inference import load_model, load_processor
from modeling_granulon import load_rgb

gradio = pytest.importorskip("gradio")
from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "space"
SETTINGS = ("full", 12, 0, 0)  # view, longest answer, temperature, seed


def test_the_requirements_are_those_that_the_package_is_tested_with():
    header = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert header["sdk"] == "gradio" and header["sdk_version"] == pins["gradio"]
    assert len(header["short_description"]) <= 60  # the Hub's limit
    assert (SPACE / header["app_file"]).exists()
    package = (ROOT / "setup.cfg").read_text()
    for line in (SPACE / "requirements.txt").read_text().split():
        assert re.search(rf"^    {re.escape(line)}$", package, re.MULTILINE), line


# ----- the picture of the clusters


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """The Space's modules and the tiny model as it loads it: the published code, not the installed package."""
    folder = tmp_path_factory.mktemp("space")
    patch = pytest.MonkeyPatch()
    patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
    patch.setattr(sys, "path", [str(SPACE), *sys.path])
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    model = assemble_tiny(folder / "tiny")
    model_file = sys.modules[app.Granulon.__module__]
    yield SimpleNamespace(
        app=app,
        model_file=model_file,
        overlay=app.overlay,
        granulon=app.Granulon(str(model)),
        model=model,
        folder=folder,
    )
    patch.undo()


def svg_of(page):
    return ElementTree.fromstring(re.search(r"<div class=\"picture\">.*?(<svg.*</svg>)</div>", page)[1])


def clusters_of(cluster_map):
    """The clusters of a map as the model describes them."""
    return [
        {"number": cluster + 1, "score": 1.0, "share": float((cluster_map == cluster).mean())}
        for cluster in range(cluster_map.max() + 1)
    ]


def covered(path, size):
    """Pixels that the rectangles of a path cover."""
    area = 0.0
    for x, y, width, height in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-[\d.]+z", path):
        assert float(x) + float(width) <= size[0] + 1 and float(y) + float(height) <= size[1] + 1
        area += float(width) * float(height)
    return area


def test_every_cluster_is_drawn_where_it_is_and_named_in_the_legend(space):
    cluster_map = np.random.default_rng(0).integers(0, 20, (12, 16))
    page = space.overlay.figure(Image.new("RGB", (800, 600)), cluster_map, clusters_of(cluster_map), "title")
    groups = svg_of(page).findall("g")
    assert [int(group.get("data-cluster")) for group in groups] == list(range(20))
    for cluster, group in enumerate(groups):
        share = (cluster_map == cluster).mean()
        assert covered(group.find("path[@class='fill']").get("d"), (720, 540)) == pytest.approx(
            720 * 540 * share, 0.02
        )
        assert group.find("text").text == str(cluster + 1)
        column = float(group.find("text").get("x")) * 16 / 720
        row = float(group.find("text").get("y")) * 12 / 540
        assert cluster_map[int(row), int(column)] == cluster, "the number stands on its own cluster"
        label = f"Cluster {cluster + 1}, {space.overlay.cluster_name(cluster)}: score 1.00, {share:.0%} of the image"
        assert page.count(f'data-label="{label}"') == 1


def test_clusters_differ_by_more_than_colour(space):
    names = [space.overlay.cluster_name(cluster) for cluster in range(21)]
    assert len(set(names)) == 21
    looks = {space.overlay._filling(cluster, "x") for cluster in range(21)}
    assert len(looks) == 21


def test_two_figures_share_no_ids(space):
    image, one_cluster = Image.new("RGB", (64, 64)), np.zeros((4, 4), int)
    pages = [space.overlay.figure(image, one_cluster, clusters_of(one_cluster), "t") for _ in range(2)]
    one, other = (set(re.findall(r'id="(\w+)"', page)) for page in pages)
    assert one and other and not one & other


def test_text_of_users_and_models_is_escaped(space):
    attack = '<img src=x onerror="alert(1)">'
    overlay = space.overlay
    parts = [
        overlay.answer_box(attack), overlay.tiles([(attack, attack, attack)]), overlay.heading(attack),
        overlay.level_bars({attack: 0.5, "fine": 0.5}, attack, "controller"), overlay.level_bars(None, attack, attack),
        overlay.figure(Image.new("RGB", (8, 8)), np.zeros((2, 2), int), clusters_of(np.zeros((2, 2), int)), attack),
    ]  # fmt: skip
    for part in parts:
        assert "<img src=x" not in part and "&lt;img" in part


def test_bars_say_which_level_was_chosen_and_by_whom(space):
    probabilities = {"coarse": 0.2, "fine": 0.8}
    bars = space.overlay.level_bars(probabilities, "fine", "controller")
    assert 'aria-label="fine: 80.0%, chosen"' in bars and "width:80.0%" in bars
    assert 'aria-label="coarse: 20.0%, your choice"' in space.overlay.level_bars(probabilities, "coarse", "request")


# ----- the page's functions


@pytest.fixture(scope="module")
def picture_file(space):
    path = space.folder / "picture.png"
    path.write_bytes(good_picture())
    return str(path)


def prepared(space, picture_file, **changes):
    values = {
        "question": "What is it?", "level": "auto", "view": "full", "max_new_tokens": 8, "temperature": 0, "seed": 0
    }  # fmt: skip
    image, settings = space.granulon.check(picture_file, *(values | changes).values())
    return space.granulon.prepare(image, settings["turns"]), settings


STATUS, FACTS, BARS, SEEN, COMPARED = range(2, 7)  # places in an update of the page
ASKED = ("What is it?", "auto", *SETTINGS)


def answering(space, inputs, settings):
    visual, _ = space.granulon.encode(inputs, settings["level"], settings["view"])
    return space.granulon.answer(inputs, visual, settings)


def text_of(space, *prepared_inputs):
    return [text for text, _ in answering(space, *prepared_inputs)][-1]


def skipped(value):
    return value == gradio.skip()


def test_the_page_shows_level_bars_clusters_and_numbers_before_the_answer_and_then_streams(space, picture_file):
    respond = space.app.handlers(space.granulon)["respond"]
    reading, first, *rest = respond([], picture_file, *ASKED)
    assert "Reading" in reading[STATUS] and reading[COMPARED] == "", "what was compared before goes"
    assert [message["content"] for message in reading[1]] == ["What is it?", "…"]
    assert "First token" in first[FACTS] and 'class="bars"' in first[BARS] and "<figure" in first[SEEN]
    assert "for “What is it?”" in first[SEEN], "it is said whose clusters these are"
    assert len(rest) > 2 and " s<small>to the first word" in rest[0][FACTS]
    assert all('aria-busy="true"' in update[STATUS] for update in (reading, first, *rest[:-1]))
    assert 'aria-busy="false"' in rest[-1][STATUS] and rest[-1][0] == "", "the question can be followed by another"
    lengths = [len(update[1][-1]["content"]) for update in rest[:-1]]
    assert lengths == sorted(lengths) and all(len(update[1]) == 2 for update in rest)


def test_a_conversation_goes_on_with_what_was_said(space, picture_file, monkeypatch):
    seen, prepare = [], space.granulon.prepare
    monkeypatch.setattr(space.granulon, "prepare", lambda image, turns: seen.append(turns) or prepare(image, turns))
    respond = space.app.handlers(space.granulon)["respond"]
    *_, last = respond([], picture_file, *ASKED)
    as_gradio_sends_it = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in last[1]]
    *_, last = respond(as_gradio_sends_it, picture_file, "And why?", *ASKED[1:])
    assert [message["role"] for message in last[1]] == ["user", "assistant"] * 2
    assert seen == [["What is it?"], ["What is it?", as_gradio_sends_it[1]["content"][0]["text"], "And why?"]]
    inputs = prepare(space.granulon.load_rgb(picture_file), seen[1])
    text = space.granulon.processor.tokenizer.decode(inputs["input_ids"][0])
    assert text.count("user") >= 2 and text.index("What is it?") < text.index("And why?")
    question = space.granulon.processor.tokenizer.decode(inputs["question_input_ids"][0])
    assert question == "And why?", "the level follows the latest question"


def test_what_carried_the_answer_is_shown_when_it_is_whole(space, picture_file):
    *_, streamed, last = space.app.handlers(space.granulon)["respond"]([], picture_file, *ASKED)
    assert skipped(streamed[SEEN]) and "what carried the answer" in last[SEEN]
    nats = [float(text) for text in re.findall(r'<i class="nats">([+-][\d.]+)</i>', last[SEEN])]
    ranks = [int(text) for text in re.findall(r"--rank: (\d+)", last[SEEN])]
    assert len(nats) > 3 and sorted(zip(ranks, nats))[0][1] == max(nats)
    heat = [float(text) for text in re.findall(r"--heat: ([\d.]+)", last[SEEN])]
    assert max(heat) == 1.0 and min(heat) >= 0


def test_an_error_is_one_calm_line_in_its_place_and_leaves_the_page_as_it_is(space, picture_file):
    functions = space.app.handlers(space.granulon)
    chat = [{"role": "user", "content": "Before?"}, {"role": "assistant", "content": "So."}]
    (update,) = functions["respond"](chat, picture_file, "  ", *ASKED[1:])
    assert 'role="alert"' in update[STATUS] and "There is no question yet; type one below the image." in update[STATUS]
    assert update[1] == chat and all(map(skipped, (update[0], *update[FACTS:])))
    (update,) = functions["compare"]([], None, *ASKED)
    assert "There is no image yet" in update[0] and skipped(update[1])


def test_every_level_is_answered_side_by_side_with_progress(space, picture_file):
    first, *updates = space.app.handlers(space.granulon)["compare"]([], picture_file, *ASKED)
    assert "level 1 of 3" in first[0] and first[1].count("Waiting") == 3
    assert [page.count("<figure") for _, page in updates] == [1, 2, 3]
    assert "level 2 of 3" in updates[0][0] and "Compared below" in updates[-1][0]
    page = updates[-1][1]
    assert page.count("<figure") == page.count('class="answer"') == 3 and "Waiting" not in page
    assert re.findall(r"<h3>(\w+)</h3>", page) == ["coarse", "medium", "fine"]
    chat = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "So."}]
    *_, last = space.app.handlers(space.granulon)["compare"](chat, picture_file, "", *ASKED[1:])
    assert re.sub(r"f\d+|[\d.]+ s", "", last[1]) == re.sub(r"f\d+|[\d.]+ s", "", page), "the last question again"


def test_closing_the_answer_stops_the_model(space, picture_file):
    answer = answering(space, *prepared(space, picture_file, max_new_tokens=512))
    next(answer)
    start = time.perf_counter()
    answer.close()
    space.model_file.WORKER.submit(int).result(timeout=0.5)  # the worker is free for the next answer
    assert time.perf_counter() - start < 0.5


def test_an_answer_that_does_not_begin_in_time_is_an_error_and_ends(space, picture_file, monkeypatch):
    slow = []

    def generate(**_):
        time.sleep(0.5)
        slow.append("done")

    monkeypatch.setattr(space.model_file, "SECONDS", 0.1)
    respond = space.app.handlers(space.granulon)["respond"]
    with monkeypatch.context() as patch:
        patch.setattr(space.granulon.model, "generate", generate)
        *_, last = respond([], picture_file, *ASKED)
        assert "The answer took longer than 0.1 s" in last[STATUS]
        assert slow == ["done"]  # the next answer does not wait for it
    monkeypatch.setattr(space.model_file, "SECONDS", 60)
    assert len(list(respond([], picture_file, *ASKED))) > 2


def test_the_level_that_is_shown_is_the_one_that_answers(space, picture_file, monkeypatch):
    asked, generate = [], space.granulon.model.generate

    def watched(**options):
        asked.append(options["visual"].describe()[0]["granularity"]["name"])
        return generate(**options)

    monkeypatch.setattr(space.granulon.model, "generate", watched)
    monkeypatch.setitem(space.granulon.model.model._modules, "granularity_controller", None)
    monkeypatch.setattr(space.granulon.model.config, "controller", "random")
    answer = space.app.handlers(space.granulon)["answer"]
    shown = [answer(picture_file, "What is it?", "auto", "full", 12, 0, seed)["level"] for seed in range(8)]
    assert asked == shown and len(set(shown)) > 1


@pytest.mark.parametrize("name, answers", [("answer", 1), ("compare", 3)])
def test_one_answer_runs_each_part_once(name, answers, space, picture_file):
    granulon = space.app.Granulon(str(space.model))
    calls = count_calls(granulon.model)
    chat = [] if name == "answer" else [[]]
    list(space.app.handlers(granulon)[name](*chat, picture_file, *ASKED))
    assert calls == {"vision_tower": answers, "granularity_controller": answers, "aggregation": answers}


def test_a_gpu_is_requested_for_as_long_as_needed_and_not_for_refused_inputs(space, picture_file, monkeypatch):
    requested = []

    def gpu(duration):
        def decorate(function):
            def call(*values):
                requested.append(duration(*values))
                return function(*values)

            return call

        return decorate

    monkeypatch.setattr(space.app, "spaces", SimpleNamespace(GPU=gpu))
    functions = space.app.handlers(space.granulon)
    for name, tokens in (("respond", 100), ("compare", 10), ("compare", 512)):
        list(functions[name]([], picture_file, "What is it?", "auto", "full", tokens, 0, 0))
    functions["explain"](picture_file, "What is it?", "auto")
    assert requested == [30, 43, 190, 10]
    bad = space.folder / "no-image.png"
    bad.write_bytes(b"this is no image")
    for refused in ((str(bad), "What is it?"), (picture_file, "")):
        (update,) = functions["respond"]([], *refused, "auto", *SETTINGS)
        assert 'role="alert"' in update[STATUS]
    assert len(requested) == 4


def test_a_failure_while_writing_reaches_the_page(space, picture_file, monkeypatch):
    def fail(**_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(space.granulon.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        text_of(space, *prepared(space, picture_file))


def test_the_same_seed_gives_the_same_answer(space, picture_file):
    texts = [text_of(space, *prepared(space, picture_file, temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"question": "  "}, "no question yet"),
        ({"question": None}, "no question yet"),
        ({"question": "x" * 1001}, "1001 characters, the limit is 1000"),
        ({"level": "huge"}, "choose one of"),
        ({"view": "inside out"}, "choose one of"),
    ],
)
def test_invalid_settings_are_refused_with_a_reason(changes, message, space, picture_file):
    with pytest.raises(ValueError, match=message):
        prepared(space, picture_file, **changes)
    with pytest.raises(ValueError, match="no image yet"):
        prepared(space, None)


def test_a_model_without_levels_answers_too(space, picture_file):
    granulon, app = space.granulon, space.app
    values = {**granulon.model.config.to_dict(), "granularities": [], "max_semantic_tokens": 0}
    plain = object.__new__(app.Granulon)
    values["default_granularity"] = None
    plain.model = type(granulon.model)(type(granulon.model.config).from_dict(values)).eval()
    plain.processor, plain.load_rgb, plain.levels = granulon.processor, granulon.load_rgb, []
    plain.processor.num_semantic_tokens = 0
    try:
        _, first, *_ = app.handlers(plain)["respond"]([], picture_file, *ASKED)
        assert "64 pixel + 0 semantic" in first[FACTS]
        *_, (_, page) = app.handlers(plain)["compare"]([], picture_file, *ASKED)
        assert page.count('class="answer"') == 1
        assert app.handlers(plain)["explain"](picture_file, "What is it?", "auto")["clusters"] == []
    finally:
        plain.processor.num_semantic_tokens = granulon.model.config.max_semantic_tokens


def test_a_link_sets_question_and_settings_and_skips_invalid_ones(space):
    read = space.app.settings_of_link(["coarse", "fine"])
    query = {
        "q": "How <b>many</b>?", "level": "fine", "visual_view": "pixel", "tokens": "64", "temperature": "0.5",
        "seed": "7",
    }  # fmt: skip
    assert read(SimpleNamespace(query_params=query)) == ("How <b>many</b>?", "fine", "pixel", 64, 0.5, 7)
    wild = {
        "q": "x" * 5000, "level": "huge", "visual_view": "<", "tokens": "1e9", "temperature": "inf", "seed": "-3"
    }  # fmt: skip
    question, level, view, tokens, temperature, seed = read(SimpleNamespace(query_params=wild))
    skipped = gradio.skip()
    assert (len(question), level, view, tokens, temperature, seed) == (1000, skipped, skipped, skipped, 2, 0)
    assert read(SimpleNamespace(query_params={})) == (skipped,) * 6


def test_the_examples_are_pictures_with_a_question_of_each_level(space):
    for name, question in space.app.EXAMPLES:
        assert name in space.granulon.levels and question.endswith("?")
        assert load_rgb(SPACE / "examples" / f"{name}.jpg").size == (448, 448)


# ----- the running app


@pytest.fixture(scope="module")
def running(space):
    with running_space(space.model, space.folder) as (address, process):
        yield SimpleNamespace(address=address, process=process, client=Client(address, verbose=False))


def test_the_api_has_two_named_endpoints_and_they_are_mcp_tools(running):
    import httpx

    assert set(running.client.view_api(return_format="dict")["named_endpoints"]) == {"/answer", "/explain"}
    tools = {tool["name"]: tool for tool in httpx.get(f"{running.address}/gradio_api/mcp/schema").json()}
    assert set(tools) == {"answer", "explain"}
    assert "question decide" in tools["answer"]["inputSchema"]["properties"]["level"]["description"]
    assert tools["explain"]["description"].startswith("The level that Granulon chooses")


@pytest.mark.parametrize("level", ["auto", "coarse", "fine"])
def test_the_api_answers_what_the_command_line_answers(level, running, space, picture_file):
    result = running.client.predict(handle_file(picture_file), "What is it?", level, *SETTINGS, api_name="/answer")
    model = load_model(space.model)
    processor = load_processor(space.model, model.config)
    model.generation_config.do_sample = False
    image, forced = load_rgb(picture_file), None if level == "auto" else level
    expected = ask(model, processor, image, "What is it?", granularity=forced, max_new_tokens=12)
    assert result["answer"] == expected["answer"]
    assert result["level"] == expected["granularity"]["name"]
    assert result["chosen_by"] == expected["granularity"]["chosen_by"]
    assert result["probabilities"] == pytest.approx(expected["granularity"]["probabilities"], abs=1e-5)
    del expected["tokens"]["text"]
    assert result["tokens"] == expected["tokens"] and result["seconds_to_first_token"] > 0
    for found, wanted in zip(result["clusters"], expected["clusters"], strict=True):
        assert found.pop("name") and isinstance(found.pop("nats"), float) and found == pytest.approx(wanted, abs=1e-5)
    seen = running.client.predict(handle_file(picture_file), "What is it?", level, api_name="/explain")
    assert np.array_equal(seen["cluster_map"], expected["cluster_map"])


def test_the_exif_orientation_of_a_photograph_is_applied(running, space):
    upright = Image.open(space.folder / "picture.png").transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright
    upright.transpose(Image.Transpose.ROTATE_90).save(space.folder / "turned.png", exif=exif)
    upright.save(space.folder / "upright.png")
    seen = [
        running.client.predict(handle_file(str(space.folder / name)), "What is it?", "fine", api_name="/explain")
        for name in ("upright.png", "turned.png")
    ]
    assert seen[0]["cluster_map"] == seen[1]["cluster_map"]


@pytest.mark.parametrize("name", list(bad_files(b"\x89PNG" + bytes(200))))
def test_a_bad_upload_gets_a_clear_message_and_the_app_stays_up(name, running, space, picture_file):
    path = space.folder / name
    path.write_bytes(bad_files(good_picture())[name])
    before = running.process.memory_info().rss
    with pytest.raises(AppError) as refusal, peak_memory(running.process) as peak:
        running.client.predict(handle_file(str(path)), "What is it?", "auto", *SETTINGS, api_name="/answer")
    message = str(refusal.value)
    assert message.startswith("This image ") and message.endswith(".") and str(space.folder) not in message
    if name == "bomb.png":
        assert "13000 x 13000 pixels, the limit is 25000000" in message
        assert peak() < before + 100e6
    assert running.client.predict(handle_file(picture_file), "x", "auto", *SETTINGS, api_name="/answer")["level"]


def result_or_error(running, image):
    """The result of /explain for an image, or its error message; posted without the checks of a client."""
    import httpx

    address = f"{running.address}/gradio_api/call/explain"
    event = httpx.post(address, json={"data": [image, "What is it?", "auto"]}).json()["event_id"]
    outcome, reply = re.findall("(?m)^(?:event|data): (.*)$", httpx.get(f"{address}/{event}", timeout=60).text)[-2:]
    return json.loads(reply)[0] if outcome == "complete" else json.loads(reply)["error"]


def test_a_data_url_is_read_as_carefully_as_an_upload(running, picture_file):
    good = {"path": "x.png", "url": data_url(Path(picture_file).read_bytes())}
    uploaded = running.client.predict(handle_file(picture_file), "What is it?", "auto", api_name="/explain")
    assert result_or_error(running, good) == uploaded
    before = running.process.memory_info().rss
    with peak_memory(running.process) as peak:
        message = result_or_error(running, {"path": "x.png", "url": data_url(png_bomb())})
        assert message.startswith("This image has 13000 x 13000 pixels") and peak() < before + 100e6
    for url in ("data:image/png;base64,@@@", "data:,", "data:image/png;base64,\u00e9", data_url(b"this is no image")):
        assert result_or_error(running, {"path": "x.png", "url": url}).startswith("This image ")
    too_long = {"path": "x.png", "url": "data:image/png;base64," + "A" * 30_000_000}
    assert "more than 20 MB" in result_or_error(running, too_long)


@pytest.mark.parametrize(
    "form, message",
    [
        ({}, "The image was not uploaded here; upload it first."),
        ({"meta": {"_type": "gradio.FileData"}}, None),
    ],
    ids=["bare", "as Gradio writes it"],  # Gradio refuses what it recognises itself, without a message
)
def test_no_file_of_the_server_is_read_and_its_existence_is_not_revealed(form, message, running, picture_file):
    paths = [str(ROOT / "docs" / "space.png"), "/etc/passwd", picture_file, "/no/such/file.png", "../x.png"]
    assert {result_or_error(running, {"path": path, **form}) for path in paths} == {message}


def test_what_is_not_an_uploaded_file_is_refused_with_the_same_message(running, space):
    uploads = space.folder / "uploads"
    (uploads / "link.png").symlink_to(ROOT / "docs" / "space.png")
    assert uploads.is_dir()
    paths = ["", "a\0b", "x" * 5000, str(uploads), str(uploads / "gone.png"), str(uploads / "link.png")]
    messages = {result_or_error(running, {"path": path}) for path in paths}
    assert messages == {"The image was not uploaded here; upload it first."}


def test_a_file_above_the_size_limit_is_not_taken(running):
    import httpx

    reply = httpx.post(f"{running.address}/gradio_api/upload", files={"files": ("big.png", bytes(21_000_000))})
    assert reply.status_code == 413


def test_settings_outside_their_range_are_refused(running, picture_file):
    image = handle_file(picture_file)
    with pytest.raises(AppError, match="huge"):
        running.client.predict(image, "What is it?", "huge", *SETTINGS, api_name="/answer")
    with pytest.raises(AppError, match="(?i)question"):
        running.client.predict(image, "", "auto", *SETTINGS, api_name="/answer")
    with pytest.raises(AppError):
        running.client.predict(image, "What is it?", "auto", "full", 10**6, 0, 0, api_name="/answer")


def test_simultaneous_users_get_the_answers_that_they_get_alone(running, picture_file):
    questions = [f"What is it, {number}?" for number in range(8)]

    def predict(question):
        image = handle_file(picture_file)
        return running.client.submit(image, question, "fine", "full", 12, 1.0, 3, api_name="/answer")

    together = [job.result(60)["answer"] for job in [predict(question) for question in questions]]
    alone = [predict(question).result(60)["answer"] for question in questions]
    assert together == alone


def test_nothing_was_left_open(running):
    assert running.process.is_running() and running.process.num_threads() < 80
