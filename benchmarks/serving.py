"""Requests per second, waiting times and memory of a server, end to end: image, tower and every token of the answer.

    python benchmarks/serving.py --model build/granulon-small > benchmarks/results/serving.md

Starts `granulon-serve` and, with an environment that has it (make test-vllm), vLLM with the plug-in; clients ask as
OpenAI's library does and stream the answers. Each request has an image of its own, so that no cache answers. LLaVA is
the same tower and language model with `granularities: []`. Answers have a fixed number of tokens. Progress goes to
stderr; a table that was interrupted goes on where it stopped (--log).
"""

import argparse
import asyncio
import base64
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import openai
import psutil
import torch
from PIL import Image
from settings import command_line

from granulon.evaluation.timing import machine
from granulon.hub.inference import load_model, load_processor
from granulon.hub.text import markdown_table

VIEWS = ("llava", "full", "pixel", "semantic", "auto")  # "llava" is a model of its own, the others views of one
QUESTION = "What is this?"
VLLM = ".venv-vllm/bin/python"
START_SECONDS = 600


def checkpoint(model: str, folder: Path, size: int, levels: bool) -> Path:
    """The model for images of `size` pixels that never ends an answer by itself; LLaVA without `levels`."""
    loaded = load_model(model, overrides=None if levels else {"granularities": []}, dtype=torch.bfloat16)
    processor = load_processor(model, loaded.config)
    # No token that ends an answer or that a client does not see.
    generation, special = loaded.generation_config, processor.tokenizer.all_special_ids
    generation.suppress_tokens = sorted({*(generation.suppress_tokens or []), *special})
    processor.image_processor.size = {"height": size, "width": size}
    loaded.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


class Server:
    """A server in a process of its own; `with` waits until it answers and ends it afterwards."""

    def __init__(self, engine: str, folder: Path, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.engine, self.folder, self.log = engine, folder, log
        self.url = f"http://127.0.0.1:{port}/v1"
        self.command = [sys.executable, "-m", "granulon.hub.serve", str(folder), "--port", str(port)]
        if engine == "vLLM":
            self.command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
            self.command += ["--port", str(port), "--dtype", "bfloat16", "--max-model-len", "2048"]
            self.command += ["--trust-request-mm-kwargs", "--no-enable-prefix-caching"]

    def __enter__(self):
        environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=environment)
        client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0)
        until = time.monotonic() + START_SECONDS
        while True:
            if self.process.poll() is not None or time.monotonic() > until:
                self.__exit__()
                raise SystemExit(f"{self.engine} did not start:\n{self.log.read_text()[-3000:]}")
            try:
                client.models.list()
                return self
            except openai.APIConnectionError:
                time.sleep(1)

    def __exit__(self, *exception):
        for process in self._processes():
            process.kill()
        self.process.wait()

    def _processes(self) -> list[psutil.Process]:
        if self.process.poll() is not None:
            return []
        server = psutil.Process(self.process.pid)
        return [*server.children(recursive=True), server]

    def memory_gb(self) -> float:
        """What the server's processes hold now; memory that several share is counted for each."""
        return sum(process.memory_info().rss for process in self._processes()) / 1e9

    def request(self, view: str, image: str, tokens: int) -> dict:
        """The arguments of a chat request, as this engine takes them."""
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": QUESTION}]
        options = {} if view == "llava" else {"visual_view": view}
        if self.engine == "vLLM":
            options = {"mm_processor_kwargs": options, "ignore_eos": True, "skip_special_tokens": False}
        return {
            "model": str(self.folder), "messages": [{"role": "user", "content": content}], "stream": True,
            "max_tokens": tokens, "temperature": 0, "extra_body": options,
        }  # fmt: skip


def picture(number: int, size: int) -> str:
    """An image that no other request has, as a data URL."""
    blocks = np.random.default_rng(number).integers(0, 256, (14, 14, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


async def measure(server: Server, view: str, clients: int, requests: int, size: int, tokens: int, first: int) -> dict:
    """`clients` ask one request after the other until `requests` are answered; seconds, and requests per second."""
    client = openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=START_SECONDS)
    waiting = list(range(first, first + requests))
    firsts, steps, totals = [], [], []

    async def ask():
        while waiting:
            image = picture(waiting.pop(), size)
            start, times = time.perf_counter(), []
            async for event in await client.chat.completions.create(**server.request(view, image, tokens)):
                if event.choices and event.choices[0].delta.content:
                    times.append(time.perf_counter())
            firsts.append(times[0] - start)
            totals.append(times[-1] - start)
            steps.append((times[-1] - times[0]) / (tokens - 1))

    start = time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(clients)))
    seconds = time.perf_counter() - start
    await client.close()
    return {
        "requests_per_second": requests / seconds,
        "first_token": [float(np.percentile(firsts, q)) for q in (50, 99)],
        "per_token": [float(np.percentile(steps, q)) for q in (50, 99)],
        "whole": [float(np.percentile(totals, q)) for q in (50, 99)],
        "memory_gb": server.memory_gb(),
    }


def cells(arguments) -> list[dict]:
    """The results of all cells, one JSON line each in the log, from which a stopped run goes on."""
    log = Path(arguments.log)
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    have = {(cell["engine"], cell["size"], cell["view"], cell["clients"]) for cell in done}
    log.parent.mkdir(parents=True, exist_ok=True)
    for size in arguments.sizes:
        for levels in (True, False):
            views = [view for view in VIEWS if (view != "llava") == levels]
            for engine in arguments.engines:
                keys = [(engine, size, view, clients) for clients in arguments.clients for view in views]
                if not set(keys) - have:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    path = checkpoint(arguments.model, Path(folder) / "model", size, levels)
                    with Server(engine, path, Path(folder) / "log.txt") as server:
                        number = 1_000_000
                        for view in views:  # what compiles or allocates does so here
                            asyncio.run(measure(server, view, 1, 2, size, arguments.tokens, number))
                            number += 2
                        for key in keys:
                            if key in have:
                                continue
                            requests = max(arguments.requests, 2 * key[3])
                            result = asyncio.run(measure(server, *key[2:], requests, size, arguments.tokens, number))
                            number += requests
                            done.append(dict(zip(("engine", "size", "view", "clients"), key)) | result)
                            with log.open("a") as file:
                                file.write(json.dumps(done[-1]) + "\n")
                            print(done[-1], file=sys.stderr)
    return done


def _vllm_version() -> str:
    code = "from importlib.metadata import version; print(version('vllm-cpu'))"
    found = subprocess.run([VLLM, "-c", code], capture_output=True, text=True) if Path(VLLM).exists() else None
    return f", vllm-cpu {found.stdout.strip()}" if found and found.returncode == 0 else ""


def report(results: list[dict], arguments) -> str:
    """One table for each engine and size; ratios are to LLaVA with as many clients."""
    text = [
        f"# Serving, end to end\n\n{machine()}, transformers {version('transformers')}{_vllm_version()}; "
        f"`{command_line()}`.\n\n"
        f"Every answer has {arguments.tokens} tokens; each request has an image of its own. Seconds are p50 / p99; a "
        "ratio above 1 means more requests per second than LLaVA, the same tower and language model without levels."
    ]
    for engine in arguments.engines:
        for size in arguments.sizes:
            table = []
            for clients in arguments.clients:
                own = {
                    r["view"]: r for r in results if (r["engine"], r["size"], r["clients"]) == (engine, size, clients)
                }
                for view in VIEWS:
                    if view not in own:
                        continue
                    cell = own[view]
                    ratio = (
                        cell["requests_per_second"] / own["llava"]["requests_per_second"] if "llava" in own else None
                    )
                    spans = [
                        " / ".join(f"{value:.3g}" for value in cell[name])
                        for name in ("first_token", "per_token", "whole")
                    ]
                    table.append(
                        [clients, view, f"{cell['requests_per_second']:.3g}", "-" if ratio is None else f"{ratio:.2f}"]
                        + [*spans, f"{cell['memory_gb']:.2g}"]
                    )
            columns = ["clients", "view", "requests/s", "ratio", "first token, s", "each further token, s"]
            text.append(f"## {engine}, {size} pixels\n\n" + markdown_table([*columns, "whole answer, s", "GB"], table))
    return "\n\n".join(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/granulon-small", help="a checkpoint (build/granulon-small)")
    parser.add_argument("--engines", nargs="+", choices=("granulon-serve", "vLLM"), default=["granulon-serve", "vLLM"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 448], help="image sides in pixels (224 448)")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 32], help="clients at once (1 8 32)")
    parser.add_argument("--requests", type=int, default=16, help="of a cell, at least two for each client (16)")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer (16)")
    parser.add_argument("--log", default="build/serving.jsonl", help="results so far (build/serving.jsonl)")
    arguments = parser.parse_args()
    print(report(cells(arguments), arguments))


if __name__ == "__main__":
    main()
