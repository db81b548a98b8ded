"""granulon-ask: an answer, what was chosen and read, a picture, JSON; errors in one line."""

import json
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import count_calls
from PIL import Image
from sources import text_source, vision_source

from granulon.hub import ask as module
from granulon.hub.ask import ask, load_model, open_image
from granulon.hub.assemble import assemble
from granulon.hub.assemble import assemble_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sources = tmp_path_factory.mktemp("sources")
    vision, text = vision_source(sources / "dinov3", "dinov3"), text_source(sources / "llama", "llama", tie=False)
    return assemble(vision, text, sources / "model")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(str(folder))


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((160, 120), Image.Resampling.NEAREST)


@pytest.fixture
def image_file(picture, tmp_path):
    picture.save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def run(monkeypatch, capsys, *arguments):
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", ["granulon-ask", *arguments])
    module.main()
    return capsys.readouterr()


# ----- what is said


def test_the_controller_chooses_unless_a_level_is_asked_for(loaded, picture):
    free = ask(*loaded, picture, "How many?", max_new_tokens=2)
    probabilities = free["granularity"]["probabilities"]
    assert free["granularity"]["name"] == max(probabilities, key=probabilities.get)
    assert sum(probabilities.values()) == pytest.approx(1)
    assert free["granularity"]["chosen_by"] == "controller"
    for level in ("fine", "2"):
        forced = ask(*loaded, picture, "How many?", granularity=level, max_new_tokens=2)["granularity"]
        assert (forced["name"], forced["chosen_by"]) == ("fine", "request")
        assert forced["probabilities"] == pytest.approx(probabilities)


@pytest.mark.parametrize("level, kept", [("coarse", 5), ("medium", 10), ("fine", 20)])
@pytest.mark.parametrize("view", ["full", "pixel", "semantic", "auto"])
def test_tokens_and_clusters_are_counted_as_read(level, kept, view, loaded, picture):
    result = ask(*loaded, picture, "How many?", granularity=level, view=view, max_new_tokens=2)
    clusters, tokens = result["clusters"], result["tokens"]
    assert result["view"] == ("full" if view == "auto" else view)
    assert len(clusters) <= kept and [entry["number"] for entry in clusters] == list(range(1, len(clusters) + 1))
    assert [entry["score"] for entry in clusters] == sorted((entry["score"] for entry in clusters), reverse=True)
    assert sum(entry["share"] for entry in clusters) == pytest.approx(1)
    assert result["cluster_map"].min() == 0, "every patch belongs to a cluster"
    assert tokens["pixel"] == (0 if view == "semantic" else 64)
    assert tokens["semantic"] == (0 if view == "pixel" else len(clusters))
    messages = [{"role": "user", "content": "How many?"}]
    rendered = loaded[1].tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokens["text"] == len(loaded[1].tokenizer(rendered, add_special_tokens=False)["input_ids"])


def test_the_answer_is_what_generate_says(loaded, picture):
    model, processor = loaded
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "How many?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    torch.manual_seed(0)  # the model's own settings sample
    output = model.generate(**inputs, visual_view="full", max_new_tokens=12)
    expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    torch.manual_seed(0)
    assert ask(model, processor, picture, "How many?", max_new_tokens=12)["answer"] == expected.strip()


def test_a_model_without_levels_answers_too(folder, picture):
    model, processor = load_model(str(folder))
    values = {**model.config.to_dict(), "granularities": [], "default_granularity": None, "max_semantic_tokens": 0}
    plain = type(model)(type(model.config).from_dict(values)).eval()
    processor.num_semantic_tokens = 0
    result = ask(plain, processor, picture, "How many?", max_new_tokens=2)
    assert result["granularity"] is None and result["tokens"]["pixel"] == 64 and result["clusters"] == []


def test_a_level_drawn_at_random_is_drawn_once(folder, picture, monkeypatch):
    model, processor = load_model(str(folder))
    values = {**model.config.to_dict(), "controller": "random"}
    model = type(model)(type(model.config).from_dict(values)).eval()
    read, generate = [], type(model).generate
    monkeypatch.setattr(
        type(model), "generate", lambda self, **kwargs: read.append(kwargs["visual"]) or generate(self, **kwargs)
    )
    for _ in range(6):
        result = ask(model, processor, picture, "How many?", max_new_tokens=1)
        assert read[-1].describe()[0]["granularity"]["name"] == result["granularity"]["name"]
        assert result["granularity"]["chosen_by"] == "configuration"


def test_one_answer_runs_each_part_once(folder, picture):
    model, processor = load_model(str(folder))
    calls = count_calls(model)
    ask(model, processor, picture, "How many?", view="auto", max_new_tokens=4)
    assert calls == {"vision_tower": 1, "granularity_controller": 1, "aggregation": 1}


def test_the_tiny_model_answers(tmp_path, picture):
    model, processor = load_model(str(assemble_tiny(tmp_path / "tiny")))
    result = ask(model, processor, picture, "How many?", max_new_tokens=3)
    assert result["tokens"]["pixel"] == 64 and result["granularity"]["name"] in model.config.granularity_names


# ----- the command


def test_the_command_streams_the_answer_and_says_what_it_read(folder, image_file, monkeypatch, capsys):
    said = run(
        monkeypatch, capsys, "--model", str(folder), "--image", image_file, "How many?", "--max_new_tokens", "8"
    )
    assert "chosen by the controller (coarse" in said.err and "64 pixel + " in said.err
    monkeypatch.setattr(module, "ask", lambda *_, **__: pytest.fail("not called"))
    assert "chosen by" not in said.out


def test_json_is_one_object_on_stdout(folder, image_file, monkeypatch, capsys):
    options = ["--model", str(folder), "--image", image_file, "--granularity", "coarse", "--max_new_tokens", "4"]
    said = json.loads(run(monkeypatch, capsys, *options, "--json", "Wie viele Bäume?").out)
    assert said["question"] == "Wie viele Bäume?" and said["granularity"]["name"] == "coarse"
    assert said.keys() == {"question", "image", "answer", "granularity", "view", "tokens", "clusters"}


def test_the_picture_is_written(folder, image_file, tmp_path, monkeypatch, capsys):
    target = tmp_path / "out.png"
    options = ["--model", str(folder), "--image", image_file, "--picture", str(target), "--max_new_tokens", "2"]
    run(monkeypatch, capsys, *options, "How many?")
    with Image.open(target) as page:
        assert page.mode == "RGB" and page.width > 900


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"--granularity": "huge"}, "unknown granularity 'huge': choose one of"),
        ({"--granularity": "7"}, "unknown granularity 7"),
        ({"--image": "missing.png"}, "missing.png cannot be read"),
        ({"--image": __file__}, "is no image in one of the formats"),
        ({"--model": "/no/such/folder"}, "/no/such/folder is no model"),
        ({"--picture": "missing/out.png"}, "No such file"),
    ],
)
def test_errors_are_one_line(changes, message, folder, image_file, monkeypatch, capsys):
    options = {"--model": str(folder), "--image": image_file, "--max_new_tokens": "2", **changes}
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, capsys, *[word for option in options.items() for word in option], "How many?")
    assert str(stop.value).startswith("granulon-ask: ") and message in str(stop.value)
    assert "\n" not in str(stop.value)


def test_another_kind_of_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a qwen2 model, not a granulon"):
        load_model(str(text_source(tmp_path / "qwen2", "qwen2")))


# ----- images from the network


class Server(BaseHTTPRequestHandler):
    image = b""

    def do_GET(self):
        if self.path == "/slow":
            time.sleep(1.5)
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()
        bodies = {"/image.png": self.image, "/page": b"<html>no image</html>", "/large": bytes(3000)}
        with suppress(BrokenPipeError):  # nobody waits for what is slow
            self.wfile.write(bodies.get(self.path, b""))

    def log_message(self, *_):
        pass


@pytest.fixture
def address(image_file, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with open(image_file, "rb") as file:
        Server.image = file.read()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_address_gives_its_image(address, picture):
    assert np.array_equal(np.asarray(open_image(f"{address}/image.png")), np.asarray(picture))


@pytest.mark.parametrize(
    "path, message",
    [("/missing", "404"), ("/page", "is no image"), ("/large", "larger than 2000 bytes"), ("/slow", "timed out")],
)
def test_an_address_without_a_usable_image_is_refused(path, message, address, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 2000)
    monkeypatch.setattr(module, "TIMEOUT", 0.5)
    with pytest.raises(ValueError, match=message):
        open_image(address + path)


@pytest.mark.parametrize("source", ["file:///etc/hostname", "ftp://127.0.0.1/image.png"])
def test_only_web_addresses_are_fetched(source, monkeypatch):
    monkeypatch.setattr(module.urllib.request, "urlopen", lambda *_, **__: pytest.fail("fetched"))
    with pytest.raises(ValueError, match="cannot be read"):
        open_image(source)
