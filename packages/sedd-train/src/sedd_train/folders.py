"""A corpus of files here: which of them are trained on, watched and measured, and how much each of them holds.

A file is of the split that its makers say. A saved data set (`save_to_disk`) names its splits; elsewhere a folder of
that very name does (`test/part-1.jsonl`), or a file's: of rows by the first or last word of its name
(`test-00000-of-00001.parquet`, `my_train.csv`), of one document by its whole name (`test.txt`, not `test-of-time.txt`).
What is called validation or test is never trained on, and what says nothing is.

Where nothing is to be watched, some documents are held out, drawn by a fixed seed; a document longer than all that is
held out is cut instead, and its end held out.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedd_train import files, rows, storage
from sedd_train.files import File
from sedd_train.rows import Notes

__all__ = ["Part", "survey", "held_out", "Chosen", "chosen", "near_space", "between_tokens"]

SPLITS = {
    "train": ("train", "training"),
    "validation": ("valid", "validation", "val", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation"),
}
OF_NAME = {name: split for split, names in SPLITS.items() for name in names}


@dataclass(frozen=True)
class Part:
    """One file of a corpus, as a summary names it.

    Attributes:
        file: its path within the corpus, or a data set's name.
        split: train, validation or test; "left out" of a file that is no documents.
        format: with compression and encoding; of what is left out, why.
        column: the column of the text, where there are columns to choose from.
        documents: how many.
        characters: of all of them.
        longest: characters of the longest.
        bytes: of the file as it lies there.
        left_out: what is said of rows without text.
        sha256: of the file's bytes.
        commit: of a data set of the hub.
    """

    file: str
    split: str
    format: str
    column: str = ""
    documents: int = 0
    characters: int = 0
    longest: int = 0
    bytes: int = 0
    left_out: str = ""
    sha256: str = ""
    commit: str = ""

    def __str__(self) -> str:
        """A line of the summary."""
        if self.split == "left out":
            return f"{self.file}: left out, as {self.format}"
        column = f", column {self.column}" if self.column else ""
        bad = f"; {self.left_out}" if self.left_out else ""
        size = f", {self.bytes:,} bytes" if self.bytes else ""
        documents = f"{self.documents:,} document{'s' * (self.documents != 1)}" if self.documents else "documents"
        return f"{self.file}: {self.split}, {self.format}{column}, {documents}{size}{bad}"


def survey(
    path: Path,
    *,
    column: str = "",
    label_column: str = "",
    encoding: str = "",
    lines: bool = False,
    blank: bool = False,
    index: Path | None = None,
) -> dict[Part, File | None]:
    """All files of a corpus, each read once: what it holds and is; None behind those that are no documents.

    Args:
        path: a file, a folder, or a folder of `save_to_disk`.
        column: see `rows.documents`.
        label_column: see `rows.labelled`.
        encoding: see `files.recognise`.
        lines: whether lines of a text are documents.
        blank: whether blank rows are documents.
        index: a folder where what was found is remembered, and believed of files whose size, number and times of change
            are as they were.

    Raises:
        ValueError: there are no documents; a file is in an unknown encoding, has no column of text or of labels, or is
            of two splits.
        OSError: a file is damaged.
    """
    asked = [str(path.resolve()), column, encoding, lines, blank, *([label_column] if label_column else [])]
    noted = None if index is None else index / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}.json"
    known, remember, found = _noted(noted), dict[str, Any](), dict[Part, File | None]()
    for file, name, told in _listed(path):
        which = files.recognise(file, lines=lines, encoding=encoding, named=path.is_file())
        if isinstance(which, str):
            found[Part(name, "left out", which)] = None
            continue
        split = told or _split_of(Path(name), which.kind)
        state, now = _state(file), time.time_ns()
        held = known.get(name, {}) if known.get(name, {}).get("state") == state else {}
        if not held:
            held = _held(which, column, label_column, blank) | {"state": state}
        if now - max(state[2:]) > 3 * 10**9:  # what changed just now may change again within the clock's tick
            remember[name] = held
        form = which.kind + "".join(f", {more}" for more in (which.packed, which.encoding) if more)
        found[Part(name, split, form, **{key: value for key, value in held.items() if key != "state"})] = which
    if noted is not None and remember != known:
        _note(noted, remember)
    if not any(part.documents for part in found):
        raise ValueError(
            f"corpus {path} is empty: there is no text to train on"
            + "".join(f"\n  {part}" for part in list(found)[:20])
        )
    _check_twice(found)
    return found


def _state(file: Path) -> list[int]:
    """What changes with a file's content, whatever its time of change is set to afterwards."""
    stat = file.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _held(which: File, column: str, label_column: str, blank: bool) -> dict[str, Any]:
    notes = Notes()
    documents = characters = longest = 0
    for text, _ in rows.labelled(which, column, label_column, notes, blank=blank):
        documents += 1
        characters += len(text)
        longest = max(longest, len(text))
    with which.path.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    return {
        "column": notes.column,
        "documents": documents,
        "characters": characters,
        "longest": longest,
        "bytes": which.path.stat().st_size,
        "left_out": str(notes),
        "sha256": sha256,
    }


def _noted(path: Path | None) -> dict[str, Any]:
    try:
        noted = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _note(path: Path, noted: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_text(path, json.dumps(noted))
    except OSError:  # of a disk that can only be read: it is looked at again the next time
        return


def _listed(path: Path) -> Iterator[tuple[Path, str, str]]:
    """Each file of a corpus, its name there, and the split that a saved data set says."""
    if path.is_file():
        yield path, path.name, ""
    elif (path / "dataset_dict.json").is_file():
        for split in json.loads((path / "dataset_dict.json").read_text())["splits"]:
            for file in _saved(path / split, path):
                yield file, str(file.relative_to(path)), OF_NAME.get(split.lower(), split)
    elif (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        for file in _saved(path, path):
            yield file, file.name, "train"
    else:
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") for part in name.parts):
                yield file, str(name), ""


def _saved(folder: Path, root: Path) -> list[Path]:
    """The files of one split of a saved data set.

    Raises:
        ValueError: it does not say which they are, or they lie elsewhere.
    """
    try:
        names = [entry["filename"] for entry in json.loads((folder / "state.json").read_text())["_data_files"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'state.json'} does not say which files the data set has ({error!r})") from None
    found = [folder / str(name) for name in names]
    for file in found:
        if not file.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"{folder / 'state.json'} names {file}, which lies outside of {root}")
    return found


def _split_of(name: Path, kind: str) -> str:
    """The split that a file's name or its folders' say, or train.

    Raises:
        ValueError: they say two.
    """
    stem = name.name
    while Path(stem).suffix.lower() in {**files.SUFFIXES, **files.COMPRESSED} and Path(stem).suffix:
        stem = Path(stem).stem
    words = re.findall("[a-z]+", re.sub(r"\d+[-_ ]of[-_ ]\d+", "", stem.lower()))
    words = words[:1] + words[-1:] if kind not in ("text", "fasta") else words if len(words) == 1 else []
    said = {OF_NAME.get(word) for word in words} | {OF_NAME.get(part.lower()) for part in name.parent.parts}
    splits = [split for split in SPLITS if split in said]
    if len(splits) > 1:
        raise ValueError(f"{name} is of two splits by its name, {' and '.join(splits)}: rename it")
    return splits[0] if splits else "train"


def _check_twice(found: Iterable[Part]) -> None:
    """No file to be trained on is one to be watched or measured."""
    trained = {part.sha256: part for part in found if part.split == "train" and part.documents}
    for part in found:
        if part.split != "train" and part.sha256 in trained:
            raise ValueError(
                f"{part.file} ({part.split}) is the same, byte for byte, as {trained[part.sha256].file} (train): what "
                "is to be measured must not be trained on; remove one of them"
            )


# What is held out


@dataclass(frozen=True)
class Chosen:
    """Which documents of a list are held out, and from what length on they are cut.

    Attributes:
        numbers: of those held out whole.
        longer: documents of more characters are cut, and counted apart.
    """

    numbers: frozenset[int]
    longer: float


def chosen(documents: int, characters: int, longest: int, share: float, most: int, *, end: bool = False) -> Chosen:
    """What of so many documents is held out.

    Args:
        documents: how many there are.
        characters: of all together.
        longest: of the longest of them.
        share: of all that is to be held out.
        most: documents to be held out, at most.
        end: whether the last ones are, as of a data set of the hub, rather than some of them.
    """
    if end:
        count = min(most, math.ceil(documents * share))
        return Chosen(frozenset(range(documents - count, documents)), math.inf)
    longer = share * characters if longest > share * characters else math.inf
    count = min(most, round(documents * share))
    return Chosen(frozenset(random.Random(0).sample(range(documents), count)), longer)


def held_out(
    documents: Iterable[tuple[str, str]], what: Chosen, share: float, train: bool, boundary: Callable[[str, int], int]
) -> Iterator[tuple[str, str]]:
    """The documents to train on, or those held out; of long ones the beginning, or the end.

    Args:
        documents: all of them, each with its label.
        what: see `chosen`.
        share: of a long document that is held out.
        train: which of the two.
        boundary: where to cut a text at about a place.
    """
    for number, (text, label) in enumerate(documents):
        if len(text) > what.longer:
            cut = boundary(text, round(len(text) * (1 - share)))
            piece = text[:cut] if train else text[cut:]
            if piece.strip():
                yield piece, label
        elif (number in what.numbers) != train:
            yield text, label


def near_space(text: str, at: int) -> int:
    """The space nearest to a place in a text, if it is near; else the place."""
    start, end = max(1, at - 200), min(len(text) - 1, at + 200)
    spaces = [place for place in range(start, end) if text[place].isspace()]
    return min(spaces, key=lambda place: abs(place - at), default=at)


def between_tokens(tokenizer: Any) -> Callable[[str, int], int]:
    """Where two tokens meet, nearest to a place in a text."""
    backend = tokenizer.backend_tokenizer

    def boundary(text: str, at: int) -> int:
        start = max(0, at - 500)
        starts = [start + first for first, _ in backend.encode(text[start : at + 500]).offsets if start + first > 0]
        return min(starts, key=lambda place: abs(place - at), default=at)

    return boundary
