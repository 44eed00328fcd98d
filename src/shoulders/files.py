"""Atomic writing: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shoulders.errors import ShouldersError

PARTIAL = ".partial-"  # in the name of everything that is still being written
STANDARD_OUTPUT = Path("-")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; it replaces `path` when the block ends well.

    Raises `ShouldersError` when the folder cannot be written (read-only, disk full); what
    stood at `path` before is then untouched and the temporary file is gone. What a symbolic link
    points to is replaced, not the link; a device or a pipe is yielded itself, to be written into.
    """
    with writing_to(path):
        if is_special(path):
            yield path
            return
        path = _pointed_to(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{PARTIAL}")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _fsync(temporary)
            # mkstemp makes private files; give the result the usual permissions.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `path` when the block ends well.

    `path` must not exist or be empty: a folder with content is never replaced.
    """
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}{PARTIAL}"))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _fsync(file)
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o777 & ~umask)
            temporary.rename(path)  # fails on a folder with content, as it should
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn an operating-system error into one line that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ShouldersError(f"{path}: cannot write: {reason}") from error


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Let one process at a time write into a folder, which is made if it is not there.

    Made here and still empty when something fails, it goes again. The system lets go of it when a
    process dies. Raises `ShouldersError` where another one writes.
    """
    made = not folder.exists()
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShouldersError(
                f"{folder}: another process writes there; wait for it, or choose another --out"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    finally:
        os.close(handle)


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left half-written in `folder`; nobody else may write there."""
    for left in folder.glob(f".*{PARTIAL}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically; non-finite numbers are refused."""
    write_text(path, as_json(value))


def as_json(value: Any) -> str:
    """Return `value` as indented JSON with a line's end; non-finite numbers are refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:  # names of files need not be text
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    return text


def read_noted(path: Path) -> dict[str, Any]:
    """Return what a run has noted as JSON; raises `ShouldersError` where the file is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ShouldersError(f"{path}: damaged: what was begun here is not to be read; start anew")
    return value


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_path(path: Path) -> str:
    """Return a file's SHA-256; of a folder those of its files, by name, joined with `+`."""
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    return "+".join(sha256_of_file(file) for file in files)


def cache_folder() -> Path:
    """Return the folder for converted weights and encoder outputs.

    `$SHOULDERS_CACHE`, else `$XDG_CACHE_HOME/shoulders`, else `~/.cache/shoulders`.
    """
    if chosen := os.environ.get("SHOULDERS_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shoulders"


def check_writable(path: Path) -> None:
    """Raise `ShouldersError` now if `path` could not be written later, after hours of work.

    `-` is no file: what may go to standard output is not to be checked.
    """
    if path == STANDARD_OUTPUT:
        raise ShouldersError(f"{path}: standard output takes --json only; give a file name")
    with writing_to(path):
        if path.is_dir():
            raise IsADirectoryError(21, "is a folder, a file name is needed")
        if is_special(path):
            # Opening a pipe would wait for its reader.
            if not os.access(path, os.W_OK):
                raise PermissionError(13, "Permission denied")
            return
        path = _pointed_to(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def is_special(path: Path) -> bool:
    """Tell whether `path` is a device, a pipe or a socket: nothing that a file may replace."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _pointed_to(path: Path) -> Path:
    """Return the file that a symbolic link points to (it need not be there); others as given."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _fsync(path: Path) -> None:
    """Make sure the bytes are on the disk before the rename that publishes them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
