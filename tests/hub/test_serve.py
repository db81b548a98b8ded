"""granulon-serve: the openai client gets streamed, correct answers about images; levels, views, refusals."""

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import psutil
import pytest
from conftest import count_calls
from space_load import bad_files, data_url, good_picture, png_bomb

from granulon.hub.assemble import assemble_tiny
from granulon.hub.inference import load_model, load_processor
from modeling_granulon import load_rgb

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
from transformers.cli.serve import Serve  # noqa: E402
from transformers.cli.serving import chat_completion, model_manager, response, utils  # noqa: E402
from transformers.cli.serving import server as server_module  # noqa: E402
from typer.main import get_command  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from granulon.hub.serve import make_command, register  # noqa: E402

QUESTION = "What is it?"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(port, alive, log=None):
    """Until the server listens; fails with the end of its log if it stops before."""
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert alive(), log and log.read_text()[-3000:]
        time.sleep(0.1)


@contextmanager
def running(folder, model, *options):
    """An OpenAI client of a server in a process of its own, which is its attribute `process`."""
    port = free_port()
    command = [sys.executable, "-m", "granulon.hub.serve", str(model), "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1,localhost", "HF_HOME": str(folder)}
    log = folder / f"log-{port}"
    with open(log, "w") as output:
        process = subprocess.Popen([*command, *options], env=environment, stdout=output, stderr=subprocess.STDOUT)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    client.process = process
    try:
        wait_for(port, lambda: process.poll() is None, log)
        yield client
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    model = assemble_tiny(folder / "tiny")
    with running(folder, model) as client:
        yield SimpleNamespace(client=client, model=str(model), folder=folder, process=client.process)


@pytest.fixture(scope="module")
def expected(server):
    """A function that gives the model's own greedy answer to the question about the picture."""
    model = load_model(server.model)
    processor = load_processor(server.model, model.config)

    def answer(image=True, **settings):
        parts = [{"type": "image", "image": load_rgb(good_picture())}] if image else []
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False, **settings)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def ask(server, image=None, **settings):
    url = {"type": "image_url", "image_url": {"url": image or data_url(good_picture())}}
    message = {"role": "user", "content": [url, {"type": "text", "text": QUESTION}]}
    return server.client.chat.completions.create(
        **{"model": server.model, "messages": [message], "temperature": 0, "max_tokens": 12} | settings
    )


def test_the_openai_client_gets_the_models_own_answer_about_a_base64_image_streamed_and_at_once(server, expected):
    chunks = list(ask(server, stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    complete = ask(server)
    assert len(pieces) > 2
    assert "".join(pieces) == complete.choices[0].message.content == expected()
    assert complete.usage.completion_tokens <= 12 and complete.usage.prompt_tokens > 84


@pytest.mark.parametrize(
    "fields", [{"granularity": "coarse"}, {"granularity": 2}, {"visual_view": "semantic", "granularity": "fine"}]
)
def test_level_and_view_are_extra_fields_of_a_request(fields, server, expected):
    assert ask(server, extra_body=fields).choices[0].message.content == expected(**fields)
    streamed = ask(server, extra_body=fields, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected(**fields)
    assert ask(server).choices[0].message.content == expected(), "the next request is free again"


def test_one_answer_runs_each_part_once(server, monkeypatch):
    """In this process, where the served model can be watched; what `register` changes is put back."""
    for owner, name in (
        (chat_completion, "ChatCompletionHandler"),
        (response, "ResponseHandler"),
        (server_module, "build_server"),
        (utils.BaseHandler, "get_processor_inputs_from_messages"),
        (model_manager.ModelManager, "get_gen_models"),
    ):
        monkeypatch.setattr(owner, name, vars(owner)[name])
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    register()
    port = free_port()
    serve = Serve(server.model, device="cpu", host="127.0.0.1", port=port, non_blocking=True)
    try:
        wait_for(port, serve._thread.is_alive)
        model, _ = serve._model_manager.load_model_and_processor(f"{server.model}@main")
        calls = count_calls(model)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        here = SimpleNamespace(client=client, model=server.model)
        for answers, stream in enumerate((False, True), 1):
            reply = ask(here, stream=stream)
            list(reply) if stream else reply
            assert calls == {"vision_tower": answers, "granularity_controller": answers, "aggregation": answers}
    finally:
        serve.kill_server()


def test_a_question_without_an_image_is_answered(server, expected):
    messages = [{"role": "user", "content": QUESTION}]
    assert ask(server, messages=messages).choices[0].message.content == expected(image=False)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"extra_body": {"granularity": "huge"}}, "granularity: unknown granularity 'huge'"),
        ({"extra_body": {"visual_view": "inside"}}, "visual_view: 'inside' is none of full, pixel"),
        ({"image": "/etc/hostname"}, "an image is a data URL"),
        ({"image": "file:///etc/hostname"}, "an image is a data URL"),
        ({"image": "data:image/png;base64,???"}, "image_url: "),
        ({"image": "http://127.0.0.1:9/none.png"}, "addresses need granulon-serve --allow-urls"),
        ({"extra_body": {"n": 2}}, "n: Input should be 1"),
        ({"extra_body": {"max_tokens": "many"}}, "max_tokens: "),
        *(
            ({"messages": messages}, "a list of at least one object")
            for messages in (
                "hello",
                ["hello"],
                [],
                [{"role": "user"}],
                [{"content": "x"}],
                [{"role": "user", "content": 5}],
                [{"role": "user<|im_end|>\n<|im_start|>assistant", "content": "x"}],
            )
        ),
        *(
            ({"messages": [{"role": "assistant", "content": None, "tool_calls": calls}]}, "tool_calls: ")
            for calls in (5, [5], [{"function": {"name": "f", "arguments": "{"}}])
        ),
        *(
            ({"messages": [{"role": "user", "content": [part]}]}, "messages: a part is one of text")
            for part in (
                "a",
                {"type": "text"},
                {"type": "image", "image": data_url(good_picture())},
                {"type": "image", "url": data_url(good_picture())},
                {"type": "image_url"},
                {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
                {"type": "video_url", "video_url": {"url": "http://127.0.0.1:9/x.mp4"}},
            )
        ),
        ({"extra_body": {"nonsense": 1}}, "nonsense: not supported"),
    ],
)
def test_unusable_requests_are_refused_with_one_clear_message(fields, message, server):
    with pytest.raises(openai.APIStatusError) as refusal:
        ask(server, **fields)
    assert refusal.value.status_code in (400, 422) and message in str(refusal.value)


def test_an_image_may_be_written_as_either_of_openais_interfaces_writes_it(server, expected):
    parts = [
        {"type": "input_image", "image_url": data_url(good_picture())},
        {"type": "input_text", "text": QUESTION},
    ]
    messages = [{"role": "user", "content": parts}]
    assert ask(server, messages=messages).choices[0].message.content == expected()
    reply = server.client.responses.create(
        model=server.model, input=messages, temperature=0, max_output_tokens=12, stream=False
    )
    assert reply.output_text == expected()


def test_the_responses_endpoint_refuses_parts_that_upstream_would_drop(server):
    for part in ({"type": "input_audio", "input_audio": {}}, {"type": "image", "image": "x"}, {"type": "input_text"}):
        with pytest.raises(openai.BadRequestError) as refusal:
            server.client.responses.create(model=server.model, input=[{"role": "user", "content": [part]}])
        assert "messages: a part is one of text" in refusal.value.response.text


def test_the_model_that_is_served_is_listed_on_a_machine_that_has_cached_none(server):
    assert [model.id for model in server.client.models.list()] == [server.model]


@pytest.fixture(scope="module")
def open_server(server):
    """A server that fetches images, and takes two of a request."""
    with running(server.folder, server.model, "--allow-urls", "--max-images", "2") as client:
        yield SimpleNamespace(client=client, model=server.model)


def test_images_of_private_addresses_are_not_fetched_even_where_addresses_are_allowed(open_server):
    for address in ("http://127.0.0.1:9/x.png", "http://169.254.169.254/latest/meta-data/", "http://localhost/x.png"):
        with pytest.raises(openai.BadRequestError, match="which is not a public address"):
            ask(open_server, image=address)


def test_a_request_may_have_so_many_images(open_server):
    part = {"type": "image_url", "image_url": {"url": data_url(good_picture())}}
    content = [{"type": "text", "text": QUESTION}]
    assert ask(open_server, messages=[{"role": "user", "content": [part] * 2 + content}]).choices
    with pytest.raises(openai.BadRequestError, match=r"3 images; a request may have 2 \(--max-images\)"):
        ask(open_server, messages=[{"role": "user", "content": [part] * 3 + content}])


def test_an_answer_ends_before_a_stop_text_streamed_and_at_once(server, expected):
    whole = expected()
    stop = whole[-4:-1]
    for options in ({"stop": stop}, {"stop": [stop, "something else"]}):
        wanted = whole[: whole.index(stop)]
        assert ask(server, **options).choices[0].message.content == wanted
        streamed = ask(server, stream=True, stream_options={"include_usage": True}, **options)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices) == wanted
    assert ask(server).choices[0].message.content == whole


def test_ten_images_of_49_megapixels_are_decoded_one_at_a_time(server):
    """A request of some kilobytes, which as pictures would take 1.2 GB; what is held of each is small."""
    bomb = data_url(png_bomb(7000))
    part = {"type": "image_url", "image_url": {"url": bomb}}
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    seen, done = [], threading.Event()

    def watch():
        while not done.wait(0.02):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        ask(server, messages=[{"role": "user", "content": [part] * 8 + [{"type": "text", "text": QUESTION}]}])
        with pytest.raises(openai.BadRequestError, match="10 images; a request may have 8"):
            ask(server, messages=[{"role": "user", "content": [part] * 10}])
    finally:
        done.set()
        watcher.join()
    assert max(seen) - before < 600e6


def test_a_model_that_is_no_granulon_or_missing_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for model, message in {
        str(tmp_path): "is a model of type 'llama', expected 'granulon'",
        str(tmp_path / "none"): "was not found locally or on the Hub",
    }.items():
        done = subprocess.run(
            [sys.executable, "-m", "granulon.hub.serve", model], env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 1 and message in done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("granulon-serve: ")
        assert "Traceback" not in done.stderr


def test_bad_images_are_refused_and_the_server_keeps_running(server, expected):
    for name, data in bad_files(good_picture()).items():
        with pytest.raises(openai.BadRequestError, match="image_url: image") as refusal:
            ask(server, image=data_url(data or b" "))
        assert name != "bomb.png" or "169000000" in str(refusal.value) or "13000 x 13000" in str(refusal.value)
    assert ask(server).choices[0].message.content == expected()


def test_the_command_keeps_the_options_of_transformers_serve():
    assert CliRunner().invoke(make_command(), ["--help"]).exit_code == 0
    options = {option for parameter in get_command(make_command()).params for option in parameter.opts}
    assert {"--attn-implementation", "--port", "--allow-urls", "--max-images", "--max-body-mb"} <= options


def test_the_processor_keeps_the_contract_of_vllms_transformers_backend(server):
    """What vLLM asks a processor without a question: as many tokens as the processor makes, one placeholder id.

    There is one level for that backend, the default one, and no slot of it may stay empty.
    """
    model = load_model(server.model)
    processor = load_processor(server.model, model.config)
    model.config.default_granularity = model.config.granularity_names[-1]
    model.config.granularities[-1]["stride"] = 1  # the small model's images have few patches
    sizes = [(64, 64), (120, 160), (1000, 30)]
    promised = processor._get_num_multimodal_tokens(image_sizes=sizes)
    for (height, width), tokens in zip(sizes, promised["num_image_tokens"], strict=True):
        image = load_rgb(good_picture(size=(160, 120))).resize((width, height))
        ids = processor(text=processor.image_token, images=image, return_tensors="pt")["input_ids"]
        assert int((ids == processor.image_token_id).sum()) == tokens
        pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        (features,) = model.get_image_features(pixels).pooler_output
        assert len(features) == tokens, "and as many embeddings"
