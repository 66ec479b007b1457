"""The documents of one file, one after another, whatever its format.

| format | suffix | a document is |
|---|---|---|
| text | .txt .text .md .markdown .rst, or none | the whole file; a line of it where lines are asked for |
| json | .json .jsonl .ndjson | a string, or an object's column: of each line, or of each element of one list |
| csv | .csv .tsv, the separator by the first line | a row's column; the first line names the columns |
| fasta | .fasta .fa .faa .fna .ffn | a record's sequence, without its header and line breaks |
| parquet, arrow | any | a row's column |

A row without text is counted, with its number, and left out; so is one that cannot be read where the next one can.
A second column may say the label of each row.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from sedd_train.files import File, opened, read_text

__all__ = ["Notes", "TEXT_COLUMNS", "documents", "labelled", "find_column", "label_of", "why_not"]

TEXT_COLUMNS = ("text", "content", "sentence", "sequence", "article", "document", "passage", "story", "body", "seq")


@dataclass
class Notes:
    """What was seen of a file on reading it: its column, and how many rows are no documents, why, and which."""

    column: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[int]] = field(default_factory=dict)

    def add(self, why: str, row: int) -> None:
        """Count a row, whose number begins with 1."""
        self.counts[why] += 1
        if self.counts[why] <= 5:
            self.first.setdefault(why, []).append(row)

    def __str__(self) -> str:
        """What the summary says of them; nothing if there are none."""
        said = []
        for why, count in self.counts.items():
            rows = ", ".join(map(str, self.first[why])) + (", ..." if count > 5 else "")
            said.append(f"{count} left out: {why} (row{'s' * (count > 1)} {rows})")
        return "; ".join(said)


def documents(file: File, column: str = "", notes: Notes | None = None, *, blank: bool = False) -> Iterator[str]:
    """The documents of a file, in order; rows that are none are counted in `notes`.

    Args:
        file: see `recognise`.
        column: the column of the text; unless given, the one that is called like text, or the only one.
        notes: where rows without text are counted, and the column is noted.
        blank: whether rows of white space are documents.

    Raises:
        ValueError: it has no such column, or its text is in another encoding.
        OSError: it is damaged, or cut short.
    """
    return (text for text, _ in labelled(file, column, notes=notes, blank=blank))


def labelled(
    file: File, column: str = "", label_column: str = "", notes: Notes | None = None, *, blank: bool = False
) -> Iterator[tuple[str, str]]:
    """The documents of a file, each with its label; without one, or where no column of labels is named, with "".

    Args:
        file: see `recognise`.
        column: the column of the text, see `documents`.
        label_column: the column of the labels: words or whole numbers.
        notes: see `documents`.
        blank: the same.

    Raises:
        ValueError, OSError: as `documents`; or there is no such column of labels, or something else in it.
    """
    notes = Notes() if notes is None else notes
    if label_column and file.kind in ("text", "lines", "fasta"):
        raise ValueError(
            f"{file.path} has no columns, and none of labels: {label_column!r} cannot be read from {file.kind}"
        )
    for number, (value, label) in enumerate(READERS[file.kind](file, column, label_column, notes), 1):
        why = why_not(value, blank)
        if not why:
            yield value, label_of(label, label_column, file.path)
        elif value is not NOTHING:
            notes.add(why, number)


def label_of(value: Any, column: str, where: object) -> str:
    """A row's label as a word; nothing where it has none.

    Raises:
        ValueError: it is neither a word nor a whole number.
    """
    if value is None or value != value:  # what tables write for a number that is not there
        return ""
    if isinstance(value, float) and value.is_integer():  # and for whole numbers beside such ones
        value = int(value)
    word = str(value).strip()
    if not isinstance(value, str | int) or any("\udc80" <= letter <= "\udcff" for letter in word):
        raise ValueError(f"{where}: a label is a word or a whole number, and the column {column!r} has {value!r:.100}")
    return word


def why_not(value: Any, blank: bool) -> str:
    """Why a row's value is no document; nothing if it is one."""
    if value is None:
        return "no text"
    if isinstance(value, _Bad):
        return str(value)
    if not isinstance(value, str):
        return f"{type(value).__name__} in place of text"
    if not value.strip() and not blank:
        return "empty"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "bytes that are no text"
    return ""


class _Bad(str):
    """Why a row is none."""


NOTHING = _Bad("an empty line")


def find_column(names: Sequence[str], column: str, where: object) -> str:
    """The column of text among those of these names.

    Raises:
        ValueError: it has not the one asked for; or none is asked for, and none is called like text.
    """
    listed = ", ".join(map(str, names))
    if column:
        if column not in names:
            raise ValueError(f"{where} has no column {column!r}: its columns are {listed}")
        return column
    lower = {str(name).lower(): name for name in reversed(names)}
    found = next((lower[name] for name in TEXT_COLUMNS if name in lower), None)
    if found is None and len(names) == 1:
        found = names[0]
    if found is None:
        raise ValueError(
            f"{where} has no column called {', '.join(TEXT_COLUMNS[:-1])} or {TEXT_COLUMNS[-1]}: its columns are "
            f"{listed}; name the one with the text by --column"
        )
    return found


# Readers: of each row the values of its column of text and of its column of labels, whatever they are


def _text(file: File, column: str, label: str, notes: Notes) -> Iterator[tuple[Any, Any]]:
    yield read_text(file), None


@contextmanager
def _lines_of(file: File) -> Iterator[Iterable[str]]:
    """The lines of a text; a byte that is not in its encoding becomes a surrogate, which marks its row."""
    with opened(file.path, file.packed) as unpacked:
        encoding = "utf-8-sig" if file.encoding == "utf-8" else file.encoding
        try:
            yield io.TextIOWrapper(unpacked, encoding=encoding, errors="surrogateescape", newline="")
        except UnicodeError as error:  # of UTF-16, where bytes have no place of their own
            raise ValueError(f"{file.path} is not {file.encoding} to its end: {error}") from None


def _lines(file: File, column: str, label: str, notes: Notes) -> Iterator[tuple[Any, Any]]:
    with _lines_of(file) as lines:
        yield from ((line, None) for line in lines)


def _json(file: File, column: str, label: str, notes: Notes) -> Iterator[tuple[Any, Any]]:
    with _lines_of(file) as lines:
        iterator, begun = iter(lines), list[str]()
        while sum(bool(line.strip()) for line in begun) < 2 and (line := next(iterator, "")):
            begun.append(line)
        rest, some = chain(begun, iterator), [line.strip() for line in begun if line.strip()]
        by_line = len(some) == 2 and some[0][0] in '{"' and some[0][-1] in '}"'
        found, names, has_label = column, list[str](), not label
        for row in map(_parsed, rest) if by_line else _whole_json(file, "".join(rest)):
            if isinstance(row, dict) and row:
                notes.column = found = found or find_column(list(row), "", file.path)
                names = names if column in names else list(row)
                has_label = has_label or label in row
                yield row.get(found), row.get(label)
            else:
                yield row or None, None
        if column and names:
            find_column(names, column, file.path)
        if names and not has_label:
            find_column(names, label, file.path)


def _parsed(line: str) -> Any:
    if not line.strip():
        return NOTHING
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return _Bad("not JSON")


def _whole_json(file: File, content: str) -> Iterable[Any]:
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.path} is neither JSON nor a line of JSON a row: {error}") from None
    if isinstance(whole, dict):  # {"data": [...]}, {"text": "..."} or {"text": [...]}
        lists = [value for value in whole.values() if isinstance(value, list)]
        whole = lists[0] if len(lists) == 1 else whole
    return whole if isinstance(whole, list) else [whole]


def _csv(file: File, column: str, label: str, notes: Notes) -> Iterator[tuple[Any, Any]]:
    csv.field_size_limit(sys.maxsize)
    with _lines_of(file) as lines:
        iterator = iter(lines)
        header = next(iterator, "")
        between = max("\t,;|", key=header.count) if any(mark in header for mark in "\t,;|") else ","
        names = next(csv.reader([header], delimiter=between), [])
        notes.column = find_column(names, column, file.path) if names else ""
        at = names.index(notes.column) if names else 0
        label_at = names.index(find_column(names, label, file.path)) if names and label else sys.maxsize
        rows = csv.reader(iterator, delimiter=between)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield _Bad(f"not CSV: {error}"), None
                continue
            if row:
                yield row[at] if at < len(row) else None, row[label_at] if label_at < len(row) else None


def _fasta(file: File, column: str, label: str, notes: Notes) -> Iterator[tuple[Any, Any]]:
    with _lines_of(file) as lines:
        parts: list[str] | None = None
        for line in lines:
            if line[:1] in ">;":
                if parts is not None and line[0] == ">":
                    yield "".join(parts), None
                parts = [] if line[0] == ">" else parts
            elif line.strip():
                parts = [] if parts is None else parts
                parts.append("".join(line.split()))
        if parts is not None:
            yield "".join(parts), None


def _parquet(file: File, column: str, label: str, notes: Notes) -> Iterator[tuple[Any, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as table:
            notes.column = found = find_column(table.schema_arrow.names, column, file.path)
            columns = _columns(found, label, table.schema_arrow.names, file)
            for batch in table.iter_batches(1000, columns=columns):
                yield from _pairs(batch, columns)
    except pa.ArrowException as error:
        raise OSError(f"{file.path} is damaged or cut short ({error})") from error


def _arrow(file: File, column: str, label: str, notes: Notes) -> Iterator[tuple[Any, Any]]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(file.path)) as mapped:
            stream = mapped.read(6) != b"ARROW1"
            mapped.seek(0)
            if stream:
                table = pa.ipc.open_stream(mapped)
                batches = iter(table)
            else:
                table = pa.ipc.open_file(mapped)
                batches = (table.get_batch(i) for i in range(table.num_record_batches))
            notes.column = found = find_column(table.schema.names, column, file.path)
            columns = _columns(found, label, table.schema.names, file)
            for batch in batches:
                for start in range(0, len(batch), 1000):
                    yield from _pairs(batch.slice(start, 1000), columns)
    except pa.ArrowException as error:
        raise OSError(f"{file.path} is damaged or cut short ({error})") from error


def _columns(text: str, label: str, names: Sequence[str], file: File) -> list[str]:
    return [text, find_column(names, label, file.path)] if label else [text]


def _pairs(batch: Any, columns: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    values = [batch.column(name).to_pylist() for name in columns]
    return zip(values[0], values[1] if len(values) > 1 else [None] * len(batch), strict=True)


READERS: dict[str, Callable[[File, str, str, Notes], Iterator[tuple[Any, Any]]]] = {
    "text": _text,
    "lines": _lines,
    "json": _json,
    "csv": _csv,
    "fasta": _fasta,
    "parquet": _parquet,
    "arrow": _arrow,
}
