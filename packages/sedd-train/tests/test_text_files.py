"""Formats and encodings at their edges, and rows in every odd shape that a file may have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
from sedd_train import files, hub, rows
from sedd_train.files import File
from sedd_train.rows import Notes, find_column, why_not


def recognised(path: Any, **how: Any) -> File:
    found = files.recognise(path, **how)
    assert isinstance(found, File)
    return found


@pytest.mark.parametrize(
    ("kind", "suffixes"),
    [
        ("text", ["", ".txt", ".text", ".md", ".markdown", ".rst"]),
        ("json", [".json", ".jsonl", ".ndjson"]),
        ("csv", [".csv", ".tsv"]),
        ("fasta", [".fasta", ".fa", ".faa", ".fna", ".ffn"]),
    ],
)
def test_formats_by_their_suffixes(kind, suffixes, tmp_path):
    for suffix in suffixes:
        for name in (f"a{suffix}", f"a.b{suffix}" if suffix else "b", f"A{suffix.upper()}"):
            (tmp_path / name).write_text("text")
            assert recognised(tmp_path / name) == File(tmp_path / name, kind, "", "utf-8")
            assert recognised(tmp_path / name, lines=True).kind == ("lines" if kind == "text" else kind)
    (tmp_path / "a.py").write_text("text")
    assert files.recognise(tmp_path / "a.py") == ".py is no format of documents"
    assert recognised(tmp_path / "a.py", named=True).kind == "text"


@pytest.mark.parametrize(
    ("head", "kind"),
    [(b"PAR1", "parquet"), (b"ARROW1", "arrow"), (b"\xff\xff\xff\xff", "arrow"), (b"PAR", ""), (b"xPAR1", "")],
)
def test_tables_are_told_by_their_first_bytes(head, kind, tmp_path):
    (tmp_path / "a.txt").write_bytes(head + b"rest")
    if kind:
        assert recognised(tmp_path / "a.txt") == File(tmp_path / "a.txt", kind)
    else:
        assert recognised(tmp_path / "a.txt").kind == "text"


def test_a_table_inside_a_packed_file_is_told_of(tmp_path):
    import gzip

    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"PAR1 and more"))
    assert files.recognise(tmp_path / "a.parquet.gz") == "parquet inside gzip: unpack it"
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"text": "x"}'))
    assert recognised(tmp_path / "a.jsonl").packed == "gzip"


def test_a_character_may_stand_across_the_end_of_what_is_looked_at(tmp_path):
    """But a file that ends within one is none of UTF-8."""
    assert files.HEAD == 1 << 16
    for shift in range(4):
        (tmp_path / "a.txt").write_bytes(b"x" * ((1 << 16) - shift) + "三".encode() + b" more")
        assert recognised(tmp_path / "a.txt").encoding == "utf-8"
    (tmp_path / "b.txt").write_bytes(b"x" + "三".encode()[:2])
    with pytest.raises(ValueError, match=r"b.txt is not UTF-8 \(byte 1 is 0xe4\)"):
        recognised(tmp_path / "b.txt")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["plain", "plain text, déjà vu", "a 三 b 三 c plain letters all the same"])
def test_zeros_tell_wide_letters_apart(encoding, text, tmp_path):
    (tmp_path / "a.txt").write_bytes((text * 9).encode(encoding))
    found = recognised(tmp_path / "a.txt")
    assert found.encoding == encoding
    assert files.read_text(found) == text * 9


def test_marks_of_encodings_are_told_before_all_else(tmp_path):
    for encoding, told in [("utf-8-sig", "utf-8-sig"), ("utf-16", "utf-16"), ("utf-32", "utf-32")]:
        (tmp_path / "a.txt").write_bytes("ü".encode(encoding))
        assert recognised(tmp_path / "a.txt", encoding="cp1252").encoding == told
        assert files.read_text(recognised(tmp_path / "a.txt")) == "ü"
    (tmp_path / "a.txt").write_bytes("ü".encode())
    assert recognised(tmp_path / "a.txt", encoding="cp1252").encoding == "utf-8"  # as it is


# Columns and rows


def test_a_column_is_found_by_its_name_in_this_order():
    order = ["text", "content", "sentence", "sequence", "article", "document", "passage", "story", "body", "seq"]
    assert list(rows.TEXT_COLUMNS) == order
    assert find_column(["seq", "Body", "TEXT"], "", "x") == "TEXT"
    assert find_column(["Text", "text"], "", "x") == "Text"  # the first of two
    assert find_column(["id"], "", "x") == "id"
    assert find_column(["id", "words"], "words", "x") == "words"
    with pytest.raises(ValueError, match="x has no column 'Words': its columns are id, words"):
        find_column(["id", "words"], "Words", "x")
    with pytest.raises(ValueError, match=r"x has no column called text, .* or seq: its columns are ; name the one"):
        find_column([], "", "x")


@pytest.mark.parametrize(
    ("value", "blank", "why"),
    [
        ("a", False, ""),
        (" \n", False, "empty"),
        (" \n", True, ""),
        ("", True, ""),
        (None, True, "no text"),
        (3, False, "int in place of text"),
        (["a"], False, "list in place of text"),
        (True, False, "bool in place of text"),
        ("\ud800", False, "bytes that are no text"),
        (rows._Bad("not JSON"), False, "not JSON"),
    ],
)
def test_why_a_value_is_no_document(value, blank, why):
    assert why_not(value, blank) == why


def test_rows_are_counted_and_the_first_five_located():
    notes = Notes()
    assert str(notes) == ""
    for row in range(1, 8):
        notes.add("empty", row)
        if row == 3:
            notes.add("no text", row)
    assert notes.first == {"empty": [1, 2, 3, 4, 5], "no text": [3]}
    assert str(notes) == "7 left out: empty (rows 1, 2, 3, 4, 5, ...); 1 left out: no text (row 3)"
    five = Notes()
    for row in range(5):
        five.add("empty", row)
    assert str(five) == "5 left out: empty (rows 0, 1, 2, 3, 4)"


def documents(path: Any, content: str, column: str = "", *, blank: bool = False) -> tuple[list[str], str, str]:
    path.write_text(content, encoding="utf-8", newline="")
    notes = Notes()
    return list(rows.documents(recognised(path), column, notes, blank=blank)), notes.column, str(notes)


@pytest.mark.parametrize(
    ("content", "found", "column"),
    [
        ('{"text": "a", "text2": "b"}', ["a"], "text"),
        ('{"only": "a"}\n{"only": "b"}\n', ["a", "b"], "only"),
        ('{"text": ["a", "b"]}', ["a", "b"], ""),
        ('{"one": ["a"], "two": ["b"], "text": "c"}', ["c"], "text"),
        ('["a", "b"]', ["a", "b"], ""),
        ('"a"\n"b"', ["a", "b"], ""),
        ('"a"', ["a"], ""),
        ('\n\n{"text": "a"}\n\n\n{"text": "b"}\n', ["a", "b"], "text"),
        ('[\n{"text": "a"},\n{"text": "b"}\n]', ["a", "b"], "text"),
        ('{"data": [{"content": "a"}], "n": 1}', ["a"], "content"),
    ],
)
def test_json_in_all_its_shapes(content, found, column, tmp_path):
    assert documents(tmp_path / "a.json", content)[:2] == (found, column)


def test_json_rows_may_differ_in_their_keys(tmp_path):
    some = '{"text": "a", "more": "x"}\n{"more": "y"}\n{}\n{"text": "b"}\n'
    assert documents(tmp_path / "a.jsonl", some) == (["a", "b"], "text", "2 left out: no text (rows 2, 3)")
    assert documents(tmp_path / "a.jsonl", some, "more")[0] == ["x", "y"]
    with pytest.raises(ValueError, match=r"has no column 'none': its columns are text"):
        documents(tmp_path / "a.jsonl", some, "none")


@pytest.mark.parametrize("between", ["\t", ",", ";", "|"])
def test_the_separator_is_the_commonest_mark_of_the_first_line(between, tmp_path):
    content = between.join(["id", "text", "more"]) + "\n" + between.join(["1", '"a\nb"', "c"]) + "\n\n1\n"
    assert documents(tmp_path / "a.csv", content) == (["a\nb"], "text", "1 left out: no text (row 2)")


def test_csv_of_one_column_and_of_none(tmp_path):
    assert documents(tmp_path / "a.csv", "words\none two\nthree\n")[:2] == (["one two", "three"], "words")
    assert documents(tmp_path / "a.csv", "")[0] == []
    assert documents(tmp_path / "a.csv", "text\n \n", blank=True)[0] == [" "]
    long = "x" * 200_000  # beyond the reader's own limit
    assert documents(tmp_path / "a.csv", f"text\n{long}\n")[0] == [long]


def test_fasta_without_a_header_and_with_remarks(tmp_path):
    assert documents(tmp_path / "a.fa", "ACGT\n AC \n>x\n>y\nGG\n;z\nTT")[0] == ["ACGTAC", "GGTT"]
    assert documents(tmp_path / "a.fa", ";only\n")[0] == []
    assert documents(tmp_path / "a.fa", ">a\r\nAC\r\nGT\r\n")[0] == ["ACGT"]


def test_long_tables_are_read_in_parts(tmp_path):
    texts = [f"row {i}" for i in range(2500)]
    table = pa.table({"text": texts})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert list(rows.documents(recognised(tmp_path / "a.arrow"))) == texts


# A data set of the hub whose splits have odd names


def data_set(splits: dict[str, Any], **how: Any) -> hub.DataSet:
    given: dict[str, Any] = {"name": "me/it", "config": "", "revision": "", "commit": "", "streaming": False}
    given |= {"column": "", "blank": False, "share": 0.05, "most": 3} | how
    found = hub.DataSet(**given)
    found.__dict__["data"] = splits
    return found


def texts(*values: Any) -> list[dict[str, Any]]:
    return [{"id": i, "text": value} for i, value in enumerate(values)]


def test_splits_by_any_of_their_names():
    found = data_set({"Training": texts("a"), "dev": texts("b"), "Evaluation": texts("c"), "odd": texts("d")})
    assert list(found.splits) == ["train", "validation", "test", "odd"]
    assert [list(found.documents(wanted)) for wanted in ("train", "validation", "test")] == [["a"], ["b"], ["c"]]
    only_test = data_set({"train": texts("a", "b"), "test": texts("c")})
    assert list(only_test.documents("validation")) == list(only_test.documents("test")) == ["c"]
    assert list(only_test.documents("train")) == ["a", "b"]  # all of it
    only_dev = data_set({"train": texts("a"), "dev": texts("b")})
    assert list(only_dev.documents("test")) == ["b"]
    measured = data_set({"test": texts("a")})
    with pytest.raises(ValueError, match="corpus me/it has no text to train on, only to measure: test"):
        list(measured.documents("train"))
    with pytest.raises(ValueError, match="corpus me/it has no split train, validation or test: odd"):
        list(data_set({"odd": texts("a")}).documents("test"))


def test_a_whole_split_is_trained_on_where_something_else_is_watched():
    class Rows(list[Any]):
        def select(self, numbers: Any) -> Rows:
            return Rows(self[i] for i in numbers)

    found = data_set({"train": Rows(texts("a", "b", "c"))})
    assert list(found.documents("train", whole=True)) == ["a", "b", "c"]
    assert list(found.documents("train")) == ["a", "b"]
    assert list(found.documents("test")) == ["c"]
    assert [(part.split, part.documents) for part in found.parts()] == [("train", 2), ("validation", 1)]


def test_what_has_been_read_is_told_by_its_state():
    for how, name in [
        ({"commit": "c0", "config": "big"}, "me/it:big@c0/train"),
        ({"revision": "v1"}, "me/it@v1/train"),
        ({}, "me/it@unknown/train"),
    ]:
        found = data_set({"train": texts("a", None, " "), "test": texts("b")}, **how)
        assert found.parts() == []
        assert list(found.documents("train")) == ["a"]
        (part,) = found.parts()
        assert (part.file, part.split, part.format, part.column, part.documents) == (
            name,
            "train",
            "data set",
            "text",
            1,
        )
        assert (part.commit, part.left_out) == (
            how.get("commit", ""),
            "1 left out: no text (row 2); 1 left out: empty (row 3)",
        )
    blank = data_set({"train": texts("a", " "), "test": texts("b")}, blank=True)
    assert list(blank.documents("train")) == ["a", " "]


def test_the_end_of_a_stream_is_held_out_once_it_is_known():
    def streamed(count: int) -> hub.DataSet:
        class Stream:
            def __iter__(self) -> Iterator[Any]:
                return iter(texts(*(f"t{i}" for i in range(count))))

        return data_set({"train": Stream()})

    for count, held in [(1, 1), (20, 1), (21, 2), (100, 3)]:
        every = [f"t{i}" for i in range(count)]
        found = streamed(count)
        assert list(found.documents("validation")) == every[-held:]
        assert list(found.documents("train")) == every[:-held]
        assert list(found.documents("test")) == every[-held:]


def test_what_cannot_be_loaded_says_what_to_do(monkeypatch):
    import datasets

    asked: list[Any] = []

    def load(name, config, *, revision, streaming):
        asked.append((name, config, revision, streaming))
        raise RuntimeError("first line\nsecond" if len(asked) == 1 else "")

    monkeypatch.setattr(datasets, "load_dataset", load)
    given: dict[str, Any] = {"name": "me/it", "column": "", "blank": False, "share": 0.05, "most": 3}
    made = hub.DataSet(config="big", revision="v1", commit="c0", streaming=True, **given)
    told = r"the data set 'me/it' could not be had .* \(RuntimeError: first line\)\. .*--repo-type dataset me/it"
    with pytest.raises(ConnectionError, match=told):
        _ = made.data
    with pytest.raises(ConnectionError, match=r"\(RuntimeError: no message\)"):
        _ = hub.DataSet(config="", revision="", commit="", streaming=False, **given).data
    with pytest.raises(ConnectionError):
        _ = hub.DataSet(config="", revision="v1", commit="", streaming=False, **given).data
    assert asked == [("me/it", "big", "c0", True), ("me/it", None, None, False), ("me/it", None, "v1", False)]


def test_another_commit_than_the_one_meant_is_refused(monkeypatch):
    import datasets

    there = "a" * 40

    class Split(list[Any]):
        cache_files = ({"filename": f"/cache/me___it/default/0.0.0/{there}/it-train.arrow"},)

    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **how: {"train": Split(texts("a"))})
    given: dict[str, Any] = {"name": "me/it", "column": "", "blank": False, "share": 0.05, "most": 3, "config": ""}
    for commit in (there, ""):
        assert hub.DataSet(revision="", commit=commit, streaming=False, **given).data
    told = f"is at commit {'b' * 40}, and this machine, .*, has only {there}: give --revision {there}"
    with pytest.raises(ConnectionError, match=told):
        _ = hub.DataSet(revision="", commit="b" * 40, streaming=False, **given).data


def test_json_lines_are_dumped_and_read_back(tmp_path):
    values = ["é", "a\nb", '"']
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": value}) for value in values))
    assert list(rows.documents(recognised(tmp_path / "a.jsonl"))) == values
