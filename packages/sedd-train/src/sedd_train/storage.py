"""Files and folders that are whole or absent, whenever the process dies or the disk fills.

They are written under another name, synchronised to the disk, and only then given the name that is looked for:
    write -> fsync(file) -> rename -> fsync(the folder that holds it)
Without the first fsync a crash of the machine may leave a name with nothing behind it, without the second no name.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

__all__ = ["publish", "write_text", "check_output", "owned", "locked", "synchronise"]

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what file systems say that have no flock


def publish(scratch: Path, folder: Path) -> None:
    """Give a finished folder of files its name, in place of what has that name."""
    for path in [*sorted(scratch.iterdir()), scratch]:
        _synchronise(path)
    if folder.exists():
        shutil.rmtree(folder)
    scratch.rename(folder)
    _synchronise(folder.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file's text: a reader finds the old text or the new one, whole."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        _synchronise(scratch)
        scratch.replace(path)
        _synchronise(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def check_output(path: Path, *, folder: bool = False) -> None:
    """A file, or a folder, can be written here: asked before the work whose result it will hold.

    Raises:
        ValueError: it cannot, or the other of the two is there.
    """
    if path.exists() and path.is_dir() != folder:
        raise ValueError(f"{path} is a {'file: give a folder' if folder else 'folder: give a file'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path if path.is_dir() else path.parent):
            pass
        if path.is_file():
            path.open("ab").close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error}): give another name") from error


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold a folder that one process at a time may write to; the system lets go of it when this process dies.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(
            f"another process is at work in {folder}: wait for it to end, stop it, or give another --output"
        ) from None


@contextmanager
def locked(path: Path, *, timeout: float = -1) -> Iterator[None]:
    """Hold a lock that one process at a time has, and that the system takes from one that dies.

    Where the file system knows no locks the file's being there is the lock; one that a process left that died on this
    machine is then taken away.

    Args:
        path: of the lock's file.
        timeout: seconds to wait for it; for ever unless given.

    Raises:
        filelock.Timeout: another process has it for so long.
        OSError: the file cannot be written.
    """
    lock: BaseFileLock = FileLock(path, timeout=timeout, mode=0o666)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, Timeout) or getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise
        lock = SoftFileLock(path.with_name(f"{path.name}.soft"), timeout=timeout)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def synchronise(file: IO[bytes]) -> None:
    """Wait until what was written to a file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def _synchronise(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
