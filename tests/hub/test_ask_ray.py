"""Two workers of Ray give the answers of one process. Runs in an environment of its own: make test-ray."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("ray", reason="make test-ray runs these")

from space_load import good_picture  # noqa: E402

from granulon.hub.assemble import assemble_tiny  # noqa: E402

pytestmark = pytest.mark.slow


def test_two_workers_answer_as_one_process(tmp_path):
    model = assemble_tiny(tmp_path / "tiny")
    rows = []
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(good_picture(size=(64 + number, 48)))
        rows.append({"image": f"{number}.png", "question": f"What is number {number}?", "id": number})
    (tmp_path / "4.png").write_bytes(b"no image")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--model", str(model), "--batch", str(tmp_path / "rows.jsonl"), "--max_new_tokens", "6"]
    options += ["--batch_size", "2", "--output"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    for module, output, more in (("ask", "one.jsonl", []), ("ask_ray", "two.jsonl", ["--workers", "2"])):
        command = [sys.executable, "-m", f"granulon.hub.{module}", *options, str(tmp_path / output), *more]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        [json.loads(x) for x in (tmp_path / name).read_text().splitlines()] for name in ("one.jsonl", "two.jsonl")
    )
    assert one == two and [line["id"] for line in two] == list(range(9))
    assert [number for number, line in enumerate(two) if "answer" not in line] == [4] and "error" in two[4]
