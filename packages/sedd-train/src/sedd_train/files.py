"""A file as one of documents: its format, compression and encoding, told by what it holds.

gzip, zstd, bzip2 and xz are undone first, and told by their first bytes, as are parquet and arrow. The other formats
are told by the file's suffix: see `sedd_train.rows`. Text is UTF-8, or UTF-16 or UTF-32 as its mark or its zeros say.
What is in neither is refused rather than guessed: latin-1, cp1250 and cp1252 differ by a few letters, and what is
written in one of them can be read in each.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

__all__ = ["File", "recognise", "opened", "read_text"]

SUFFIXES = {
    **dict.fromkeys(("", ".txt", ".text", ".md", ".markdown", ".rst"), "text"),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".fasta", ".fa", ".faa", ".fna", ".ffn"), "fasta"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".arrow", ".feather"), "arrow"),
}
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bzip2", ".xz": "xz"}
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow",  # a stream, which no text begins with
}
MARKS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
HEAD = 1 << 16  # bytes that an encoding is told from


@dataclass(frozen=True)
class File:
    """A file of documents.

    Attributes:
        path: where it is.
        kind: text, lines, json, csv, fasta, parquet or arrow.
        packed: gzip, zstd, bzip2 or xz; nothing where it is not compressed.
        encoding: of its text; nothing in parquet and arrow.
    """

    path: Path
    kind: str
    packed: str = ""
    encoding: str = ""


def recognise(path: Path, *, lines: bool = False, encoding: str = "", named: bool = False) -> File | str:
    """The file as one of documents, or why it is none.

    Args:
        path: of the file.
        lines: whether each line of a text is a document.
        encoding: of text that is neither UTF-8 nor marked as something else.
        named: whether the file was asked for by its own name: then a text may have any suffix.

    Raises:
        OSError: it cannot be read.
        ValueError: it has a suffix of text and is none, or is text in an unknown encoding.
    """
    packed, head = "", _head(path, "")
    if (found := _magic(head)) in COMPRESSED.values():
        packed, head = found, _head(path, found)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if SUFFIXES.get(suffix) in ("parquet", "arrow") and not _magic(head):
        raise ValueError(f"{path} is no {SUFFIXES[suffix]} file, for all its name: it begins with {head[:8]!r}")
    kind = _magic(head) or SUFFIXES.get(suffix, "text" if named else "")
    if kind in ("parquet", "arrow"):
        if packed:
            return f"{kind} inside {packed}: unpack it"
        return File(path, kind)
    if not kind:
        return f"{suffix} is no format of documents"
    if kind == "text" and lines:
        kind = "lines"
    return File(path, kind, packed, _encoding(path, head, encoding))


def _magic(head: bytes) -> str:
    return next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), "")


def _head(path: Path, packed: str) -> bytes:
    with opened(path, packed) as file:
        return file.read(HEAD)


def _encoding(path: Path, head: bytes, told: str) -> str:
    """The encoding of a text that begins so."""
    for mark, name in MARKS.items():
        if head.startswith(mark):
            return name
    if head.count(0) > len(head) / 5:  # plain letters of UTF-16 have a zero each, three of UTF-32
        zeros = [head[place::4].count(0) for place in range(4)]
        wide = max(zeros) > 0.9 * len(head) / 4 and sum(zeros) > 0.7 * len(head)
        ahead = zeros[0] + zeros[2] > zeros[1] + zeros[3] if not wide else zeros[0] > zeros[3]
        return f"utf-{32 if wide else 16}-{'be' if ahead else 'le'}"
    if 0 in head:
        raise ValueError(f"{path} holds zero bytes, as no text does: which format is it?")
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < HEAD)
    except UnicodeDecodeError as error:
        if told:
            return told
        raise ValueError(_not_utf8(path, error)) from None
    return "utf-8"


def _not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    return (
        f"{path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}), nor marked as UTF-16, and "
        "which of the old encodings it is cannot be told from its bytes: name it, for instance --encoding cp1252"
    )


@contextmanager
def opened(path: Path, packed: str) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked.

    Raises:
        OSError: they cannot be read, or break off.
    """
    try:
        if packed == "zstd":
            import pyarrow as pa

            with pa.input_stream(str(path), compression="zstd") as stream:
                yield io.BufferedReader(stream, 1 << 20)
            return
        opener: dict[str, Callable[[Path], Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
        with opener.get(packed, _as_it_is)(path) as file:
            yield file
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile) and error.errno is not None:
            raise
        raise OSError(f"{path} is damaged or cut short ({error})") from error


def _as_it_is(path: Path) -> IO[bytes]:
    return path.open("rb")


def read_text(file: File) -> str:
    """The whole of a file of text.

    Raises:
        ValueError: it is not in its encoding.
    """
    with opened(file.path, file.packed) as unpacked:
        content = unpacked.read()
    try:
        return content.decode("utf-8-sig" if file.encoding == "utf-8" else file.encoding)
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(file.path, error)) from None
