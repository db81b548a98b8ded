"""The one place where a model is loaded, an image opened, and a conversation encoded and answered."""

import base64
import io
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import count_calls, make_image, make_model, make_processor
from PIL import Image
from sources import text_source

from granulon.hub import fetch, inference
from granulon.hub.assemble import assemble_tiny
from granulon.hub.inference import describe, encode, generate, load_model, load_processor, open_image, question_about

# ----- models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return assemble_tiny(tmp_path_factory.mktemp("inference") / "tiny")


def test_another_kind_of_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a model of type 'qwen2', expected 'granulon'; granulon-assemble makes"):
        load_model(text_source(tmp_path / "qwen2", "qwen2"))


def test_a_name_without_a_model_is_refused():
    with pytest.raises(ValueError, match="/no/such/folder was not found locally or on the Hub"):
        load_model("/no/such/folder")


def test_overrides_change_the_configuration_and_unknown_ones_are_refused(folder):
    assert load_model(folder, overrides={"controller": "random"}).config.controller == "random"
    with pytest.raises(ValueError, match="the configuration has no colour"):
        load_model(folder, overrides={"colour": 1})


def test_levels_with_other_shapes_are_refused_unless_new_levels_are_allowed(folder):
    one = {"granularities": [{"name": "only", "stride": 1, "clusters": 4, "keep": 3, "view": "full"}]}
    with pytest.raises(ValueError, match="do not fit its configuration with .*only"):
        load_model(folder, overrides=one)
    model = load_model(folder, overrides=one, new_levels=True)
    assert model.config.granularity_names == ["only"]
    assert load_processor(folder, model.config).num_semantic_tokens == model.config.max_semantic_tokens == 3


# ----- answers


def test_a_batch_with_a_level_for_each_conversation_is_encoded_once_and_answered_as_one_by_one():
    model, processor = make_model(), make_processor()
    conversations = [
        question_about(make_image(seed), question) for seed, question in enumerate(("how?", "a longer one"))
    ]
    calls = count_calls(model)
    prompt = encode(model, processor, conversations, ["coarse", "fine"])
    descriptions = describe(model, prompt, "auto")
    answers, tokens = generate(model, processor, prompt, "auto", max_new_tokens=5, do_sample=False)
    assert calls["vision_tower"] == 1
    assert [row["granularity"]["name"] for row in descriptions] == ["coarse", "fine"]
    assert [row["view"] for row in descriptions] == ["semantic", "full"]
    for conversation, level, answer, ids in zip(conversations, ("coarse", "fine"), answers, tokens, strict=True):
        alone = encode(model, processor, [conversation], level)
        (own,), (own_ids,) = generate(model, processor, alone, "auto", max_new_tokens=5, do_sample=False)
        assert own == answer == processor.decode(ids, skip_special_tokens=True).strip()
        assert torch.equal(own_ids, ids) and 0 < len(ids) <= 5


def test_a_conversation_without_images_is_answered():
    model, processor = make_model(), make_processor()
    prompt = encode(model, processor, [[{"role": "user", "content": "how many?"}]])
    (description,) = describe(model, prompt)
    assert prompt.visual is None and description["granularity"] is None and description["images"] == []
    assert description["tokens"]["pixel"] == 0 and description["tokens"]["text"] == prompt.inputs["input_ids"].shape[1]
    with torch.no_grad():
        answers, _ = generate(model, processor, prompt, max_new_tokens=3, do_sample=False)
    assert len(answers) == 1


# ----- images


def png_of(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_an_image_is_opened_from_a_path_bytes_a_data_url_and_pil(tmp_path):
    image = make_image()
    (tmp_path / "a.png").write_bytes(png_of(image))
    url = "data:image/png;base64," + base64.b64encode(png_of(image)).decode()
    for source in (str(tmp_path / "a.png"), tmp_path / "a.png", png_of(image), url, image):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(image))
    with pytest.raises(ValueError):
        open_image("data:image/png;base64,???")


def test_an_image_is_opened_as_data_sets_store_it_or_refused_with_what_was_found(tmp_path):
    """`{"bytes", "path"}`, base64, and a list of one."""
    image, content = make_image(), png_of(make_image())
    for source in ({"bytes": content, "path": "x"}, base64.b64encode(content).decode(), [image], [{"bytes": content}]):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(image))
    missing = str(tmp_path / ("a" * 80) / "image")
    for source, message in (
        ([image, image], "a list of 2 images, expected one"),
        ({"bytes": None, "path": None}, "neither bytes nor a path"),
        (missing, "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            open_image(source)


class Server(BaseHTTPRequestHandler):
    image = b""

    def do_GET(self):
        if self.path == "/slow":
            time.sleep(1.5)
        self.send_response(404 if self.path == "/missing" else 200)
        self.end_headers()
        bodies = {"/image.png": self.image, "/page": b"<html>no image</html>", "/large": bytes(3000)}
        with suppress(BrokenPipeError):  # the client has given up waiting
            self.wfile.write(bodies.get(self.path, b""))

    def log_message(self, *_):
        pass


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((160, 120), Image.Resampling.NEAREST)


@pytest.fixture
def address(picture, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Server.image = png_of(picture)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_address_gives_its_image(address, picture):
    assert np.array_equal(np.asarray(open_image(f"{address}/image.png")), np.asarray(picture))


@pytest.mark.parametrize(
    "path, message",
    [
        ("/missing", "404"),
        ("/page", "is not an image"),
        ("/large", "larger than 2000 bytes"),
        ("/slow", "took too long|timed out"),
    ],
)
def test_an_address_without_a_usable_image_is_refused(path, message, address, monkeypatch):
    monkeypatch.setattr(fetch, "MAX_BYTES", 2000)
    monkeypatch.setattr(fetch, "SECONDS", 0.5)
    with pytest.raises(ValueError, match=message):
        open_image(address + path)


@pytest.mark.parametrize("source", ["file:///etc/hostname", "ftp://127.0.0.1/image.png"])
def test_only_web_addresses_are_fetched(source, monkeypatch):
    monkeypatch.setattr(inference, "fetch", lambda *_, **__: pytest.fail("fetched"))
    with pytest.raises(ValueError, match="cannot be read"):
        open_image(source)
