"""The Space under load: 50 users for 5 minutes, 30 % of their uploads malformed, bombs among them.

    python tests/space_load.py --model build/granulon-small [--users 50] [--seconds 300]

Prints the figures, and exits with 1 if the app exited, an upload had a wrong outcome, or memory does not return to
within 10 % of its size after warming up. All traffic goes to an app that is started here.
"""

import argparse
import base64
import gc
import io
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from random import Random

import psutil
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

ROOT = Path(__file__).parents[1]
LEVELS = ("auto", "coarse", "medium", "fine")


@contextmanager
def running_space(model, folder):
    """The app as a process of its own; yields its address and a `psutil.Process`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MODEL_ID": str(model),
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder / "uploads"),
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HUB_OFFLINE": "1",
        "NO_PROXY": "127.0.0.1",
    }
    with open(folder / "app.log", "w") as log:
        app = subprocess.Popen(
            [sys.executable, ROOT / "space" / "app.py"], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if app.poll() is not None:
                raise RuntimeError((folder / "app.log").read_text()[-3000:])
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", psutil.Process(app.pid)
    finally:
        app.terminate()
        app.wait(20)


def png_bomb(side=13000):
    """A PNG of a few KB that decodes to side x side pixels."""
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(1 + side // 8 + 1)) for _ in range(side)) + rows.flush()

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bad_files(good):
    """Name and bytes of uploads that are not usable images; `good` are the bytes of a PNG."""
    return {
        "text.png": b"this is no image",
        "empty.png": b"",
        "cut.png": good[: len(good) // 2],
        "header.png": good[:30],
        "flipped.png": good[:40] + bytes(255 - byte for byte in good[40:80]) + good[80:],
        "page.html": b"<html><script>alert(1)</script></html>",
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "postscript.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "bomb.png": png_bomb(),
    }


def data_url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def bad_requests():
    """Images that a custom client may send without an upload."""
    return [
        {"path": "x.png", "url": data_url(png_bomb())},
        {"path": "x.png", "url": "data:image/png;base64,@@@"},
        {"path": str(ROOT / "docs" / "space.png")},
        {"path": "/no/such/file.png"},
    ]


@contextmanager
def peak_memory(process):
    """Yields a function that returns the peak memory of the process since then, in bytes."""
    seen, over = [process.memory_info().rss], threading.Event()

    def watch():
        while not over.wait(0.01):
            seen[0] = max(seen[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: seen[0]
    finally:
        over.set()
        watcher.join()


def good_picture(seed=0, size=(160, 120)):
    random, buffer = Random(seed), io.BytesIO()
    image = Image.effect_noise(size, 60).convert("RGB")
    image.paste(tuple(random.randrange(256) for _ in range(3)), (20, 20, 80, 90))
    image.save(buffer, "PNG")
    return buffer.getvalue()


def ask_as_user(address, number, until, files, counts, waits):
    """Ask again and again; count what came back, by kind of upload. `files` are the good images and the bad ones."""
    random, client = Random(number), Client(address, verbose=False)
    good, bad = files
    while time.time() < until:
        is_bad = random.random() < 0.3
        image, start = random.choice(bad if is_bad else good), time.time()
        try:
            values = ("What is it?", random.choice(LEVELS), "full", 8, 0, number)
            result = client.predict(image, *values, api_name="/answer")
            outcome = "answered" if result["answer"] is not None else "nothing"
        except AppError as error:
            busy = "queue" in str(error).lower()
            outcome = "busy" if busy else "refused" if "annot be" in str(error) or "image" in str(error) else "failed"
        except Exception as error:  # counted and shown: anything else is a failure of the app
            outcome = f"failed {type(error).__name__}: {str(error)[:80]}"
        waits.append(time.time() - start)
        counts["bad" if is_bad else "good", outcome] += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="build/granulon-small")
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--seconds", type=int, default=300)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        good = [folder / f"good{seed}.png" for seed in range(8)]
        for seed, path in enumerate(good):
            path.write_bytes(good_picture(seed))
        bad = [folder / file for file in bad_files(good[0].read_bytes())]
        for path, data in zip(bad, bad_files(good[0].read_bytes()).values()):
            path.write_bytes(data)
        with running_space(Path(arguments.model).resolve(), folder) as (address, process):
            uploads = [[handle_file(str(path)) for path in paths] for paths in (good, bad)]
            sys.exit(load(address, process, arguments, (uploads[0], uploads[1] + bad_requests())))


def load(address, process, arguments, files):
    counts, waits = Counter(), []

    def run(users, seconds):
        until = time.time() + seconds
        threads = [
            threading.Thread(target=ask_as_user, args=(address, number, until, files, counts, waits))
            for number in range(users)
        ]
        for thread in threads:
            thread.start()
        with peak_memory(process) as peak:
            for thread in threads:
                thread.join()
            return peak()

    run(arguments.users, 20)  # warms up: allocator, thread pools, compiled regular expressions
    gc.collect()
    time.sleep(5)
    before = process.memory_info().rss
    counts.clear()
    waits.clear()
    peak = run(arguments.users, arguments.seconds)
    time.sleep(10)
    after = process.memory_info().rss
    waits.sort()
    for (kind, outcome), number in sorted(counts.items()):
        print(f"{kind:5}{outcome:40}{number:7}")
    print(f"wait of a user, median {waits[len(waits) // 2]:.2f} s, 95 % {waits[len(waits) * 95 // 100]:.2f} s")
    mb = 2**20
    print(f"memory before {before / mb:.0f} MB, peak {peak / mb:.0f} MB, after {after / mb:.0f} MB")
    expected = {("good", "answered"), ("good", "busy"), ("bad", "refused"), ("bad", "busy")}
    fine = process.is_running() and set(counts) <= expected and after < 1.1 * before
    print("fine" if fine else "NOT FINE")
    return 0 if fine else 1


if __name__ == "__main__":
    main()
