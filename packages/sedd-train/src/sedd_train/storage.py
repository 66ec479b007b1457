"""Files and folders that are whole or absent, whenever the process dies or the disk fills.

They are written under another name, synchronised to the disk, and only then given the name that is looked for:
    write -> fsync(file) -> rename -> fsync(the folder that holds it)
Without the first fsync a crash of the machine may leave a name with nothing behind it, without the second no name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["publish", "write_text", "owned"]


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


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold a folder that one process at a time may write to; the system lets go of it when this process dies.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another process is at work in {folder}: wait for it to end, stop it, or give another --output"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _synchronise(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
