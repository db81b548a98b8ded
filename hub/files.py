"""Files that a crash cannot damage: atomic files and folders, and logs in JSON Lines that runs append to."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path


def write_atomically(path: str | Path, content: str | bytes | Callable[[Path], object]):
    """
    Write or replace a file, which appears complete or not at all.

    Args:
        content: text, bytes, or a function that writes the file whose path it is given (`figure.savefig`).
    """
    path = Path(path)
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # writers take the format from the suffix
    try:
        if callable(content):
            content(draft)
        else:
            draft.write_bytes(content if isinstance(content, bytes) else content.encode())
        sync_to_disk(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """
    A folder to write to that takes the name `path` when the block ends without an error; else it is deleted.

    Raises:
        ValueError: `path` exists and is not an empty folder.
    """
    path = Path(path)
    check_is_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    draft.chmod(0o755)
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def check_is_new(path: Path):
    """Raise `ValueError` if `path` exists and is not an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already; choose another output or delete it")


def sync_to_disk(path: str | Path) -> int:
    """Flush a file or folder to the disk, so that a power cut does not lose it; its size in bytes."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        return os.fstat(handle).st_size
    finally:
        os.close(handle)


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_jsonl(path: str | Path) -> list[dict]:
    """
    The complete lines of a JSON Lines file; a last line that a crash cut short is left out. [] for a missing file.

    Raises:
        ValueError: a line that is not JSON.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            found = f"{path}:{number} is not JSON ({line[:60]!r})"
            raise ValueError(f"{found}; restore the file or move it away") from error
    return rows


def write_jsonl(path: str | Path, rows: Iterable[dict]):
    """Write or replace a JSON Lines file, which appears complete or not at all."""
    write_atomically(path, _json_lines(rows))


def _json_lines(rows: Iterable[dict], allow_nan: bool = True) -> bytes:
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=allow_nan) + "\n" for row in rows)
    return text.encode(errors="surrogatepass")  # half of a surrogate pair, which json.loads takes back


class JsonlLog(AbstractContextManager):
    """
    Rows in JSON Lines that are on the disk when `append` returns, so that a run that was killed can go on.

    With `world_size` each process appends to a file of its own beside `path`, and `read` returns the rows of all of
    them, also of an earlier run with another number of processes. Raises `ValueError` if another process has its file
    open.
    """

    def __init__(self, path: str | Path, rank: int = 0, world_size: int | None = None):
        self.path = Path(path)
        self.own = self.path
        if world_size is not None:
            self.own = self.path.with_name(f"{self.path.name}.{rank:05}-of-{world_size:05}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = os.open(self.own, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise ValueError(f"{self.own} is in use by another process; wait for it or name another output") from error
        except OSError:  # a file system without locks
            pass
        os.ftruncate(self.file, self.own.read_bytes().rfind(b"\n") + 1)

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Close the file, which other processes may then open."""
        os.close(self.file)

    def append(self, *rows: dict):
        """Append rows; if the disk is full or fails, nothing of them stays and `OSError` is raised."""
        lines = _json_lines(rows, allow_nan=False)
        before = os.fstat(self.file).st_size
        try:
            written = os.write(self.file, lines)
            if written < len(lines):
                raise OSError(f"{written} of {len(lines)} bytes were written to {self.own}")
            os.fsync(self.file)
        except OSError:
            os.ftruncate(self.file, before)  # no half line may stand before another
            raise

    def read(self) -> list[dict]:
        """All rows, of every process: see `read_log`."""
        return read_log(self.path)


def read_log(path: Path) -> list[dict]:
    """The rows of a log: those of `path` and of every process's file beside it."""
    return [row for file in (path, *rank_files(path)) for row in read_jsonl(file)]


def rank_files(path: Path) -> list[Path]:
    """The files of the single processes beside a log."""
    return sorted(path.parent.glob(f"{path.name}.*-of-*"))


def join_rank_files(path: Path, rows: Iterable[dict]):
    """Write the rows of all processes to `path` in the order given, then delete the files of the processes."""
    if files := rank_files(path):
        write_jsonl(path, rows)
        for file in files:
            file.unlink(missing_ok=True)  # another process joined them too
