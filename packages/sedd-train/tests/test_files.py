"""Files of any format: which they are, what they hold, and which of their rows are no documents."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import time
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sedd_train import corpora, files, folders, rows, tokenizers
from sedd_train.tokens import tokenise

ROWS = ["one, two", 'a "quoted"\nline', "três, 三"]


def documents(path, column="", **options):
    """The documents of a file, and what is said of its rows."""
    file = files.recognise(path, **options)
    assert isinstance(file, files.File), file
    notes = rows.Notes()
    return list(rows.documents(file, column, notes)), str(notes)


def written(path, kind):
    """A file of ROWS of this kind."""
    records: list[Any] = [{"id": i, "text": text} for i, text in enumerate(ROWS)]
    table = pa.table({"id": list(range(3)), "text": ROWS})
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    elif kind == "json list":
        path.write_text(json.dumps(records, indent=2), encoding="utf-8")
    elif kind == "json column":
        path.write_text(json.dumps({"text": ROWS}), encoding="utf-8")
    elif kind == "json data":
        path.write_text(json.dumps({"data": records, "version": 2}), encoding="utf-8")
    elif kind == "json strings":
        path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    elif kind in ("csv", "tsv", "csv;"):
        between = {"csv": ",", "tsv": "\t", "csv;": ";"}[kind]
        quoted = ['"' + text.replace('"', '""') + '"' for text in ROWS]
        lines = [f"{i}{between}{text}" for i, text in enumerate(quoted)]
        path.write_text("\r\n".join([f"id{between}text", *lines]), encoding="utf-8", newline="")
    elif kind == "parquet":
        pq.write_table(table, path, row_group_size=2)
    elif kind == "arrow file":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    elif kind == "arrow stream":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", "jsonl"),
        ("a.json", "jsonl"),
        ("a.ndjson", "jsonl"),
        ("a.json", "json list"),
        ("a.jsonl", "json list"),
        ("a.json", "json column"),
        ("a.json", "json data"),
        ("a.jsonl", "json strings"),
        ("a.csv", "csv"),
        ("a.csv", "csv;"),
        ("a.tsv", "tsv"),
        ("a.parquet", "parquet"),
        ("a.bin", "parquet"),
        ("a.arrow", "arrow file"),
        ("a.arrow", "arrow stream"),
    ],
)
def test_rows_are_the_same_in_every_format(name, kind, tmp_path):
    assert documents(written(tmp_path / name, kind)) == (ROWS, "")


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("frames", [1, 2])
def test_what_is_packed_is_unpacked(suffix, frames, tmp_path):
    pack: Any = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
    }[suffix]
    lines = [json.dumps({"text": f"row {i} " * 50}).encode() + b"\n" for i in range(400)]
    parts = [lines[i * 400 // frames : (i + 1) * 400 // frames] for i in range(frames)]
    content = b"".join(pack(b"".join(part)) for part in parts)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(content)
    found, said = documents(path)
    assert (len(found), said) == (400, "")
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(b"a text"))
    assert documents(tmp_path / f"a.txt{suffix}") == (["a text"], "")
    (tmp_path / "b.jsonl").write_bytes(content)  # whatever it is called
    assert len(documents(tmp_path / "b.jsonl")[0]) == 400
    path.write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(OSError, match=r"a.jsonl.* is damaged or cut short"):
        documents(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_encodings_are_told_from_the_content(encoding, name, tmp_path):
    text = "It was the best of times, déjà vu – 三"
    content = {"a.txt": text, "a.jsonl": json.dumps({"text": text}, ensure_ascii=False)}.get(name, f'text\n"{text}"\n')
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert documents(tmp_path / name) == ([text], "")


@pytest.mark.parametrize("encoding", ["cp1252", "shift_jis", "koi8-r"])
def test_an_old_encoding_is_not_guessed_but_named(encoding, tmp_path):
    text = {"cp1252": "Il était une fois, à l’orée", "shift_jis": "吾輩は猫である", "koi8-r": "Мой дядя"}[encoding]
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8 \(byte \d+ is 0x..\).* name it, for instance --encoding"):
        documents(tmp_path / "a.txt")
    assert documents(tmp_path / "a.txt", encoding=encoding) == ([text], "")
    (tmp_path / "late.txt").write_bytes(b"plain " * 20_000 + text.encode(encoding))
    with pytest.raises(ValueError, match=r"late.txt is not UTF-8 \(byte 12\d{4}"):
        documents(tmp_path / "late.txt")


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\x00\x00", b"text with \x00 inside"])
def test_what_is_no_text_is_none_whatever_its_name(content, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.txt (is not UTF-8|holds zero bytes)"):
        documents(tmp_path / "a.txt")
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"text")
        with pytest.raises(ValueError, match=rf"{name} is no (parquet|arrow) file, for all its name"):
            documents(tmp_path / name)
    pq.write_table(pa.table({"text": ROWS}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(OSError, match=r"a.parquet is damaged or cut short"):
        documents(tmp_path / "a.parquet")


def test_rows_that_are_no_documents_are_counted_and_located(tmp_path):
    lines = ['{"text": "one"}', '{"text": null}', "", '{"id": 1}', '{"text": 3}', '{"text": "tw', '{"text": " "}']
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "[1]", '{"text": "\\ud800"}', '{"text": "last"}']))
    found, said = documents(tmp_path / "a.jsonl")
    assert found == ["one", "last"]
    assert said == (
        "2 left out: no text (rows 2, 4); 1 left out: int in place of text (row 5); 1 left out: not JSON (row 6); "
        "1 left out: empty (row 7); 1 left out: list in place of text (row 8); "
        "1 left out: bytes that are no text (row 9)"
    )
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "one"}\n{"text": "d\xe9j\xe0"}\n' + b'{"text": null}\n' * 9)
    file = files.File(tmp_path / "b.jsonl", "json", encoding="utf-8")  # as if the bad byte came late
    notes = rows.Notes()
    assert list(rows.documents(file, "", notes)) == ["one"]
    assert str(notes) == "1 left out: bytes that are no text (row 2); 9 left out: no text (rows 3, 4, 5, 6, 7, ...)"
    (tmp_path / "c.csv").write_text("id,text\n1,NA\n2\n3,null\n4,\n")
    assert documents(tmp_path / "c.csv") == (
        ["NA", "null"],
        "1 left out: no text (row 2); 1 left out: empty (row 4)",
    )
    pq.write_table(pa.table({"text": ["one", None, "two"]}), tmp_path / "d.parquet")
    assert documents(tmp_path / "d.parquet") == (["one", "two"], "1 left out: no text (row 2)")
    pq.write_table(pa.table({"text": [[1], [2]]}), tmp_path / "d.parquet")
    assert documents(tmp_path / "d.parquet") == ([], "2 left out: list in place of text (rows 1, 2)")


def test_the_column_is_named_or_found(tmp_path):
    def one(**row):
        (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
        return tmp_path / "a.jsonl"

    for name in rows.TEXT_COLUMNS:
        assert documents(one(id=1, **{name: "found"}))[0] == ["found"] * 2
    assert documents(one(words="alone"))[0] == ["alone"] * 2
    assert documents(one(Text="capital", id=1))[0] == ["capital"] * 2
    assert documents(one(content="second", text="first"))[0] == ["first"] * 2
    assert documents(one(content="second", text="first"), "content")[0] == ["second"] * 2
    for path in (one(id=1, words="a"), written(tmp_path / "b.parquet", "parquet"), written(tmp_path / "b.csv", "csv")):
        with pytest.raises(ValueError, match=rf"{path.name} has no column 'missing': its columns are id, (words|text)"):
            documents(path, "missing")
    with pytest.raises(ValueError, match=r"no column called text, content, .* are id, words; name .* by --column"):
        documents(one(id=1, words="a"))


def test_fasta_is_its_sequences(tmp_path):
    (tmp_path / "a.fa").write_text(">one a header\nACGT\nAC\n\n>two\n;a remark\nGG GG\n")
    assert documents(tmp_path / "a.fa") == (["ACGTAC", "GGGG"], "")


def test_json_that_is_none(tmp_path):
    for content in ("{'text': 'one'}", '{"text": "tw', "[1, 2"):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ValueError, match=r"a.json is neither JSON nor a line of JSON a row"):
            documents(tmp_path / "a.json")


# Folders


def test_a_mixed_folder_is_named_file_by_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x.txt").write_text("not seen")
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "sub" / "b.md").write_text("# more")
    written(tmp_path / "c.csv", "csv")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"content": "zipped"}\n{"content": null}'))
    (tmp_path / "e.py").write_text("print()")
    corpus = corpora.load_texts(str(tmp_path))
    assert [str(part) for part in corpus.parts()] == [
        "a.txt: train, text, utf-8, 1 document, 6 bytes",
        f"c.csv: train, csv, utf-8, column text, 3 documents, {(tmp_path / 'c.csv').stat().st_size} bytes",
        f"d.jsonl.gz: train, json, gzip, utf-8, column content, 1 document, "
        f"{(tmp_path / 'd.jsonl.gz').stat().st_size} bytes; 1 left out: no text (row 2)",
        "e.py: left out, as .py is no format of documents",
        "sub/b.md: train, text, utf-8, 1 document, 6 bytes",
    ]
    assert corpora.load_texts(str(tmp_path / "e.py")).parts()[0].documents == 1  # asked for by its own name
    for path in tmp_path.glob("[acds]*"):
        if path.is_file():
            path.unlink()
    (tmp_path / "sub" / "b.md").unlink()
    with pytest.raises(ValueError, match=r"is empty: .*\n  e.py: left out, as .py is no format of documents"):
        corpora.load_texts(str(tmp_path))


def test_a_saved_data_set_has_the_splits_that_it_names(tmp_path):
    import datasets

    def rows_of(*texts):
        return datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": list(texts)})

    both = datasets.DatasetDict({"train": rows_of("one", "two"), "dev": rows_of("three"), "odd": rows_of("four")})
    both.save_to_disk(tmp_path / "both")
    corpus = corpora.load_texts(str(tmp_path / "both"))
    assert list(corpus.train()) == ["one", "two"]
    assert list(corpus.valid()) == ["three"]
    assert [(part.split, part.documents) for part in corpus.parts()] == [("train", 2), ("validation", 1), ("odd", 1)]
    rows_of(*map(str, range(40))).save_to_disk(tmp_path / "one")
    corpus = corpora.load_texts(str(tmp_path / "one"))
    assert (len(list(corpus.train())), len(list(corpus.valid()))) == (38, 2)
    (tmp_path / "one" / "state.json").write_text('{"_data_files": [{"filename": "../../etc/passwd"}]}')
    with pytest.raises(ValueError, match="which lies outside of"):
        corpora.load_texts(str(tmp_path / "one"))
    (tmp_path / "one" / "state.json").write_text("[]")
    with pytest.raises(ValueError, match="does not say which files the data set has"):
        corpora.load_texts(str(tmp_path / "one"))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("test-of-time.txt", "train"),
        ("test.txt", "test"),
        ("a dev diary.md", "train"),
        ("dev.md", "validation"),
        ("test/chapter one.txt", "test"),
        ("latest/a.txt", "train"),
        ("contest.jsonl", "train"),
        ("test_data.jsonl", "test"),
        ("my-valid.csv", "validation"),
        ("the-test-of-time.jsonl", "train"),
    ],
)
def test_a_split_is_no_part_of_a_name(name, split, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"text": "one"}' if name.endswith("jsonl") else "text\none")
    (tmp_path / "other.txt").write_text("another")
    assert {part.file: part.split for part in folders.survey(tmp_path)} == {name: split, "other.txt": "train"}


def test_what_is_watched_is_named(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "watched.jsonl").write_text('{"text": "watched"}\n')
    corpus = corpora.load_texts(str(folder), valid=str(tmp_path / "watched.jsonl"))
    assert len(list(corpus.train())) == 30
    assert list(corpus.valid()) == list(corpus.test()) == ["watched"]
    assert corpus.identity != corpora.load_texts(str(folder)).identity
    inside = corpora.load_texts(str(folder), valid=str(folder / "7.txt"))
    assert (len(list(inside.train())), list(inside.valid())) == (29, ["text 7"])
    (folder / "test.txt").write_text("measured")
    third = corpora.load_texts(str(folder), valid=str(tmp_path / "watched.jsonl"))
    assert (len(list(third.train())), list(third.valid()), list(third.test())) == (30, ["watched"], ["measured"])
    with pytest.raises(ValueError, match="expected the path of a file or folder"):
        corpora.load_texts(str(folder), valid="nowhere")


def test_text_to_measure_is_not_trained_on_under_another_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(ValueError, match=r"test.jsonl \(test\) is the same, byte for byte, as a.jsonl \(train\)"):
        corpora.load_texts(str(tmp_path))
    with pytest.raises(ValueError, match=r"test.jsonl \(validation\) is the same|a.jsonl, which is trained on"):
        corpora.load_texts(str(tmp_path / "a.jsonl"), valid=str(tmp_path / "test.jsonl"))


@pytest.mark.parametrize("kind", ["japanese", "dna", "fasta", "protein"])
def test_a_document_without_spaces_is_cut_between_tokens(kind, tmp_path):
    draw = random.Random(0)
    letters = {"japanese": "吾輩は猫である名前まだ無いどこで生れ", "protein": "ACDEFGHIKLMNPQRSTVWY"}.get(kind, "ACGT")
    text = "".join(draw.choices(letters, k=20_000))
    path = tmp_path / ("a.fa" if kind == "fasta" else "a.txt")
    path.write_text(f">one\n{text}" if kind == "fasta" else text, encoding="utf-8")
    corpus = corpora.load_texts(str(path))
    assert "".join(corpus.train()) + "".join(corpus.valid()) == text
    for name in ("bpe:600", {"japanese": "bytes", "protein": "protein"}.get(kind, "dna")):
        coder = tokenizers.load_tokenizer(name, corpus.train)
        parts = [tokenise(corpus.documents(split, coder), coder) for split in ("train", "valid")]
        ids = [part.flat.tolist()[:-1] for part in parts]  # each with an end of text
        assert ids[0] + ids[1] == coder.encode(text)
        assert parts[1].characters / len(text) == pytest.approx(corpora.HELD_OUT, abs=0.0002)


def test_what_was_found_in_files_is_remembered_until_they_change(tmp_path, monkeypatch):
    read = []
    held = folders._held

    def noted(which, *args):
        read.append(which.path.name)
        return held(which, *args)

    clock = [0]
    monkeypatch.setattr(folders, "_held", noted)
    monkeypatch.setattr(time, "time_ns", lambda: clock[0])
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a.txt", "b.txt"):
        (texts / name).write_text(f"the text {name}")
    clock[0] = (texts / "b.txt").stat().st_ctime_ns + 10**9
    first = corpora.load_texts(str(texts), index=tmp_path / "index")
    assert corpora.load_texts(str(texts), index=tmp_path / "index").identity == first.identity
    assert read == ["a.txt", "b.txt"] * 2  # they were only just written
    clock[0] += 10**10
    for _ in range(3):
        assert corpora.load_texts(str(texts), index=tmp_path / "index").identity == first.identity
    assert read == ["a.txt", "b.txt"] * 3
    (texts / "b.txt").write_text("the text B.txt")
    assert corpora.load_texts(str(texts), index=tmp_path / "index").identity != first.identity
    assert read == [*["a.txt", "b.txt"] * 3, "b.txt"]
    (note,) = (tmp_path / "index").iterdir()
    for damaged in ("[]", "{", '{"a.txt": {"state": 3}}'):
        note.write_text(damaged)
        assert corpora.load_texts(str(texts), index=tmp_path / "index").identity != first.identity
