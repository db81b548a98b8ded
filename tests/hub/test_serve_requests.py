"""What the server accepts: each field that clients send works or is refused by name, and sizes are bounded."""

import asyncio
import json

import pytest

from granulon.hub.serve import StopText
from granulon.hub.serve_requests import Gate, Refused, check_body

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
MESSAGES = [{"role": "user", "content": "What?"}]


def body(**fields):
    return json.dumps({"messages": MESSAGES, **fields}).encode()


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": "x"}, {"stop": ["a", "b", "c", "d"]}, {"n": 1}, {"user": "me"}, {"metadata": {"a": "b"}},
        {"store": False}, {"logprobs": False}, {"tools": []}, {"tool_choice": "none"}, {"seed": 3},
        {"stream": True, "stream_options": {"include_usage": True}}, {"response_format": {"type": "text"}},
        {"frequency_penalty": 0, "presence_penalty": 0}, {"logit_bias": {"5": -100}}, {"temperature": 0},
        {"temperature": 1.5, "top_p": 0.9}, {"max_tokens": 5}, {"max_completion_tokens": 5}, {"granularity": "fine"},
        {"granularity": 2, "visual_view": "semantic"}, {"stop": None, "n": None}, {"modalities": ["text"]},
    ],
)  # fmt: skip
def test_fields_that_work_or_change_nothing_pass(fields):
    given = {name: value for name, value in fields.items() if value is not None}
    assert check_body(CHAT, body(**fields)) == {"messages": MESSAGES, **given}


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2}, {"n": "1"}, {"logprobs": True}, {"top_logprobs": 3}, {"tools": [{"type": "function"}]},
        {"tool_choice": "required"}, {"functions": []}, {"function_call": "auto"}, {"audio": {}}, {"prediction": {}},
        {"modalities": ["audio"]}, {"response_format": {"type": "json_object"}}, {"store": True},
        {"reasoning_effort": "low"}, {"web_search_options": {}}, {"frequency_penalty": 0.5},
        {"presence_penalty": -1}, {"stop": 5}, {"stop": ["a"] * 5}, {"stop": [""]}, {"stop": ""}, {"temperature": "0"},
        {"temperature": 3}, {"temperature": True}, {"temperature": "nan"}, {"top_p": 2}, {"max_tokens": 0},
        {"max_tokens": 1.5}, {"max_tokens": 10**9}, {"max_completion_tokens": "many"}, {"seed": -1}, {"seed": "x"},
        {"stream": "yes"}, {"logit_bias": {"x": 1}}, {"logit_bias": {"1": 1000}}, {"logit_bias": [1]},
        {"chat_template_kwargs": {"sanitize_control_tokens": False}}, {"generation_config": '{"num_beams": 999}'},
        {"granularity": 1.5}, {"granularity": ["fine"]}, {"visual_view": 3}, {"nonsense": 1},
        {"stream_options": {"other": True}}, {"model": 5},
    ],
)  # fmt: skip
def test_other_fields_and_types_are_refused_by_name(fields):
    with pytest.raises(Refused) as refusal:
        check_body(CHAT, body(**fields))
    (name,) = fields
    assert refusal.value.status == 400
    assert refusal.value.message.startswith(f"{name}: ")
    error = refusal.value.body()["error"]
    assert error["type"] == "invalid_request_error" and error["message"] == refusal.value.message
    assert refusal.value.param in (name, None)


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(data):
    with pytest.raises(Refused, match="the body is"):
        check_body(CHAT, data)


def test_the_newer_interface_has_fields_of_its_own():
    fields = {"input": "What?", "max_output_tokens": 5, "instructions": "Be brief."}
    assert check_body(RESPONSES, json.dumps(fields).encode()) == fields
    for name, value in {"previous_response_id": "x", "background": True, "max_tokens": 5, "stop": "x"}.items():
        with pytest.raises(Refused, match=f"{name}: "):
            check_body(RESPONSES, json.dumps(fields | {name: value}).encode())


def through_gate(path, chunks, method="POST", headers=(), delay=0.0, **limits):
    """Status and body of what comes back, and what reached the server behind the gate."""
    sent, reached = [], []

    async def app(scope, receive, send):
        reached.append((await receive()).get("body"))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def run():
        waiting = list(chunks)

        async def receive():
            await asyncio.sleep(delay)
            return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
        await Gate(app, **limits)(scope, receive, send)

    asyncio.run(run())
    return sent[0]["status"], json.loads(sent[1]["body"]), reached


def test_a_body_passes_whole_and_without_nulls():
    data = body(stop=None, seed=4)
    status, _, reached = through_gate(CHAT, [data[:10], data[10:]])
    assert status == 200 and json.loads(reached[0]) == {"messages": MESSAGES, "seed": 4}


def test_a_body_of_200_megabytes_is_refused_before_it_is_read():
    headers = [(b"content-length", b"200000000")]
    status, answer, reached = through_gate(CHAT, [], headers=headers)
    assert status == 413 and not reached and "larger than 32000000 bytes" in answer["error"]["message"]


def test_a_body_that_does_not_tell_its_size_is_read_up_to_the_limit():
    chunks = [b"x" * 1000] * 1000
    status, _, reached = through_gate(CHAT, chunks, headers=[(b"content-length", b"5")], max_body=10_000)
    assert status == 413 and not reached


def test_a_body_that_drips_is_refused_in_time():
    status, answer, reached = through_gate(CHAT, [b" "] * 1000, delay=0.02, seconds=0.2)
    assert status == 408 and not reached and "took longer" in answer["error"]["message"]


@pytest.mark.parametrize(
    "method, path",
    [
        ("POST", "/load_model"), ("POST", "/reset"), ("POST", "/v1/completions"), ("POST", "/v1/audio/transcriptions"),
        ("POST", "/v1/systemone"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", CHAT), ("DELETE", "/v1/models"),
    ],
)  # fmt: skip
def test_endpoints_that_load_or_unload_models_are_not_served(method, path):
    status, answer, reached = through_gate(path, [b"{}"], method=method)
    assert status == 404 and not reached and "is not served" in answer["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/models", "/health"])
def test_endpoints_that_only_tell_are_served(path):
    assert through_gate(path, [b""], method="GET")[0] == 200


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    "answer, stops, shown",
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("one two three", ["xyz"], "one two three"),
        ("ababac", ["abac"], "ab"),
        ("ends with tw", ["two"], "ends with tw"),
        ("two", ["two"], ""),
    ],
)
def test_an_answer_ends_before_a_stop_text_however_it_is_cut(answer, stops, shown, size):
    stop = StopText(stops)
    pieces = [stop.push(answer[start : start + size]) for start in range(0, len(answer), size)]
    assert "".join(pieces) + stop.rest() == shown
