"""An OpenAI-compatible endpoint in a thread, which fails at random calls, as real endpoints do."""

import asyncio
import hashlib
import json
import random
import threading
from collections import Counter

INPUT_TOKENS, OUTPUT_TOKENS = 900, 40  # of every call that is processed
FAULTS = ("429", "500", "garbage", "half", "nothing", "late", "schema", "no usage", "text")
LABEL_FAULTS = ("missing", "twice", "unknown level", "sum", "no object")  # of one label in a reply with several
FREE = ("429", "500", "503", "401", "400")  # refused calls are not charged
STATUS = (*FREE, "408", "504")


class FaultServer:
    """
    Answers with probabilities that depend on the question alone; `fault_share` of the calls fail, and
    `label_fault_share` of the labels of a call with several questions.

    Attributes:
        asked: how often each question arrived; answered: how often a complete and correct reply was sent.
        calls: the number of questions of each call that arrived.
        calls_charged: how many calls were processed, whether or not the reply arrived.
        always: the fault that a question meets each time, alone or among others; `change` edits a complete reply
            before it is sent, `change_labels` its labels; `arrived` is called with the number of calls so far.
    """

    def __init__(self, fault_share=0.0, seed=0, faults=FAULTS, levels=("coarse", "medium", "fine"), hold=0.0):
        self.hold, self.retry_after = hold, "0"  # seconds that each reply takes; that a 429 asks for
        self.change, self.arrived, self.change_labels = lambda reply: None, lambda count: None, lambda labels: labels
        self.label_fault_share, self.calls = 0.0, []
        self.fault_share, self.faults, self.levels = fault_share, faults, levels
        self.random = random.Random(seed)
        self.asked, self.answered, self.happened = Counter(), Counter(), Counter()
        self.calls_charged = 0
        self.under_way = self.most_under_way = 0
        self.keys, self.bodies = set(), []
        self.always = {}  # question -> fault

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def cost(self, prices) -> float:
        return self.calls_charged * (INPUT_TOKENS * prices[0] + OUTPUT_TOKENS * prices[1]) / 1e6

    def __enter__(self):
        ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self.thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *exception):
        self.loop.call_soon_threadsafe(self.over.set)
        self.thread.join(10)

    async def _serve(self, ready):
        self.loop, self.over = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self.over.wait()
        server.close()

    async def _connection(self, reader, writer):
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _exchange(self, reader, writer) -> bool:
        """One request and its reply; whether the connection stays."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length:")[1].split("\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        self.keys.add(head.split("authorization: ")[1].split("\r\n")[0].removeprefix("bearer "))
        self.bodies = [*self.bodies[-5:], body]
        asked = json.loads(body["messages"][-1]["content"])
        questions = [entry["question"] for entry in asked] if isinstance(asked, list) else [asked]
        self.asked.update(questions)
        self.calls.append(len(questions))
        self.arrived(len(self.calls))
        fault = next(filter(None, map(self.always.get, questions)), None)
        fault = None if fault in LABEL_FAULTS else fault
        if fault is None and self.random.random() < self.fault_share:
            fault = self.random.choice(self.faults)
        self.happened[fault] += 1
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await asyncio.sleep(self.hold)
            return await self._reply(writer, asked, fault)
        finally:
            self.under_way -= 1

    async def _reply(self, writer, asked, fault) -> bool:
        if fault not in FREE:
            self.calls_charged += 1
        if fault in STATUS:
            message = f"no: {fault}" + (f" for {self.keys}" if fault == "401" else "")  # some repeat the key
            error = {"error": {"message": message, "type": "error", "code": self._code(asked)}}
            wait = f"Retry-After: {self.retry_after}\r\n" if fault == "429" else ""
            await self._send(writer, int(fault), json.dumps(error), wait)
            return True
        if fault == "nothing":
            return False
        if fault == "late":
            await asyncio.sleep(1.0)
            return False
        if isinstance(asked, list):
            labels, complete = self._labels(asked)
            content = json.dumps({"labels": self.change_labels(labels)})
        else:
            content, complete = json.dumps(self.answer(asked)), [asked]
        if fault == "schema":
            content = self.random.choice(['{"reason": "r"}', "fine", '{"probabilities": {"coarse": 3}}', ""])
        reply = completion(content)
        if fault == "no usage":
            del reply["usage"]
        self.change(reply)
        text = json.dumps(reply)
        if fault == "garbage":
            text = self.random.choice(["<html>busy</html>", "[]", '{"choices": []}', "null", "{", "[" * 100_000])
        if fault == "half":
            await self._send(writer, 200, text, cut=len(text) // 2)
            return False
        if fault == "text":
            await self._send(writer, 200, "busy", kind="text/plain")
            return True
        await self._send(writer, 200, text)
        if fault in (None, "no usage"):
            self.answered.update(complete)
        return True

    def _labels(self, asked: list[dict]) -> tuple[list, list[str]]:
        """The labels of a reply, some of them with a fault, and the questions of those without."""
        labels, complete = [], []
        for entry in asked:
            label = {"number": entry["number"], **self.answer(entry["question"])}
            fault = self.always.get(entry["question"])
            if fault is None and len(asked) > 1 and self.random.random() < self.label_fault_share:
                fault = self.random.choice(LABEL_FAULTS)
            if fault == "unknown level":
                label["probabilities"]["huge"] = label["probabilities"].pop(self.levels[0])
            elif fault == "sum":
                label["probabilities"][self.levels[0]] += 0.5
            elif fault is None:
                complete.append(entry["question"])
            labels += {"missing": [], "twice": [label, label], "no object": [None]}.get(fault, [label])
        return labels, complete

    def _code(self, asked) -> str | None:
        return "insufficient_quota" if asked == "no quota" else None

    async def _send(self, writer, status, text, more="", cut=None, kind="application/json"):
        body = text.encode()
        head = f"HTTP/1.1 {status} Status\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
        writer.write(head.encode() + body[:cut])
        await writer.drain()

    def answer(self, question: str) -> dict:
        draw = int(hashlib.sha256(question.encode()).hexdigest()[:6], 16)
        chosen = self.levels[draw % len(self.levels)]
        rest = 0.1 / (len(self.levels) - 1)
        return {"reason": "small", "probabilities": {name: 0.9 if name == chosen else rest for name in self.levels}}


def completion(content: str) -> dict:
    return {
        "id": "c", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}],
        "usage": {
            "prompt_tokens": INPUT_TOKENS, "completion_tokens": OUTPUT_TOKENS,
            "total_tokens": INPUT_TOKENS + OUTPUT_TOKENS,
        },
    }  # fmt: skip
