"""Files that a crash cannot damage: complete or absent, and logs that a killed run can resume."""

import json
import os
import subprocess
import sys

import pytest

from granulon.hub.files import (
    JsonlLog,
    atomic_folder,
    join_rank_files,
    rank_files,
    read_jsonl,
    read_log,
    sha256_of,
    write_atomically,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ----- files and folders


@pytest.mark.parametrize("content", ["ä\n", b"\x00", lambda path: path.write_text("drawn")])
def test_a_file_is_written_from_text_bytes_or_a_function(content, tmp_path):
    for _ in range(2):
        write_atomically(tmp_path / "a.png", content)
    expected = b"drawn" if callable(content) else content if isinstance(content, bytes) else content.encode()
    assert (tmp_path / "a.png").read_bytes() == expected and names(tmp_path) == ["a.png"]


def test_an_error_while_writing_keeps_the_old_content_and_leaves_no_draft(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    write_atomically(tmp_path / "a.txt", "old")
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "a.txt", fail)
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_function_gets_a_path_with_the_suffix_of_the_file(tmp_path):
    write_atomically(tmp_path / "a.svg", lambda path: path.write_text(path.suffix))
    assert (tmp_path / "a.svg").read_text() == ".svg"


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with atomic_folder(tmp_path / "below" / "out") as draft:
        (draft / "a").write_text("1")
        assert not (tmp_path / "below" / "out").exists()
    assert names(tmp_path / "below") == ["out"] and names(tmp_path / "below" / "out") == ["a"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_nothing_is_left_of_a_folder_after_an_error(error, tmp_path):
    with pytest.raises(error), atomic_folder(tmp_path / "out") as draft:
        (draft / "a").write_text("1")
        raise error
    assert names(tmp_path) == []


def test_an_existing_folder_is_not_replaced_unless_it_is_empty(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as draft:
        (draft / "a").write_text("1")
    with pytest.raises(ValueError, match="exists already"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "a").read_text() == "1"


def test_sha256_is_that_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a").startswith("ba7816bf8f01cfea")


# ----- logs


def test_a_torn_last_line_is_left_out_and_the_next_row_stands_alone(tmp_path):
    with JsonlLog(tmp_path / "log.jsonl") as log:
        log.append({"row": 0}, {"row": 1})
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'{"row": 2')
    assert read_jsonl(tmp_path / "log.jsonl") == [{"row": 0}, {"row": 1}]
    with JsonlLog(tmp_path / "log.jsonl") as log:
        log.append({"row": 3, "text": "ä\u2028"})
    assert [row["row"] for row in read_jsonl(tmp_path / "log.jsonl")] == [0, 1, 3]


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"row": 0}\n{"ro\n{"row": 2}\n')
    with pytest.raises(ValueError, match="log.jsonl:2 is not JSON"):
        read_jsonl(tmp_path / "log.jsonl")


def test_a_missing_log_has_no_rows(tmp_path):
    assert read_jsonl(tmp_path / "log.jsonl") == read_log(tmp_path / "log.jsonl") == []


@pytest.mark.parametrize("written", [7, OSError(28, "No space left on device")])
def test_a_full_disk_leaves_nothing_of_the_rows_and_the_log_usable(written, tmp_path, monkeypatch):
    write = os.write

    def fail(file, data):
        write(file, data[:7])
        if isinstance(written, OSError):
            raise written
        return written

    with JsonlLog(tmp_path / "log.jsonl") as log:
        log.append({"row": 0})
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", fail)
            with pytest.raises(OSError):
                log.append({"row": 1}, {"row": 2})
        assert log.read() == [{"row": 0}]
        log.append({"row": 3})
    assert read_jsonl(tmp_path / "log.jsonl") == [{"row": 0}, {"row": 3}]


def test_not_a_number_is_refused_since_it_is_not_json(tmp_path):
    with JsonlLog(tmp_path / "log.jsonl") as log, pytest.raises(ValueError):
        log.append({"value": float("nan")})
    assert (tmp_path / "log.jsonl").read_bytes() == b""


OPEN = "import sys; from granulon.hub.files import JsonlLog; JsonlLog(sys.argv[1])"


def test_a_log_is_open_in_one_process_at_a_time(tmp_path):
    path = tmp_path / "log.jsonl"
    with JsonlLog(path):
        with pytest.raises(ValueError, match="in use by another process"):
            JsonlLog(path)
        other = subprocess.run([sys.executable, "-c", OPEN, path], capture_output=True, text=True)
        assert other.returncode == 1 and "in use by another process" in other.stderr
    JsonlLog(path).close()


def test_each_process_has_a_file_and_all_are_read_and_joined(tmp_path):
    path = tmp_path / "log.jsonl"
    for rank in (1, 0):
        with JsonlLog(path, rank, 2) as log:
            log.append({"row": rank})
    with JsonlLog(path, 0, 3) as log:  # resumed with another number of processes
        log.append({"row": 2})
        assert sorted(row["row"] for row in log.read()) == [0, 1, 2]
    assert len(rank_files(path)) == 3 and not path.exists()
    join_rank_files(path, sorted(read_log(path), key=lambda row: row["row"]))
    assert names(tmp_path) == ["log.jsonl"] and path.read_text() == "".join(
        json.dumps({"row": row}) + "\n" for row in range(3)
    )


def test_half_a_surrogate_pair_survives_the_log_and_the_joined_file(tmp_path):
    path, rows = tmp_path / "log.jsonl", [{"question": "\ud800"}]
    with JsonlLog(path, 0, 1) as log:
        log.append(*rows)
    assert read_log(path) == rows
    join_rank_files(path, rows)
    assert read_jsonl(path) == rows and names(tmp_path) == ["log.jsonl"]
