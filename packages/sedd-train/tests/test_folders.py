"""What of a folder is held out, where a long document is cut, and what a summary says, to the letter."""

from __future__ import annotations

import hashlib
import math
import random
from pathlib import Path
from typing import Any

import pytest
from sedd_train import corpora, files, folders, tokenizers
from sedd_train.folders import Chosen, Part, chosen, held_out, near_space


@pytest.mark.parametrize(
    ("part", "line"),
    [
        (Part("a.txt", "train", "text, utf-8", documents=1, bytes=6), "a.txt: train, text, utf-8, 1 document, 6 bytes"),
        (
            Part(
                "b.csv", "test", "csv", column="text", documents=1234, bytes=56789, left_out="1 left out: empty (row 2)"
            ),
            "b.csv: test, csv, column text, 1,234 documents, 56,789 bytes; 1 left out: empty (row 2)",
        ),
        (Part("c.py", "left out", ".py is no format of documents"), "c.py: left out, as .py is no format of documents"),
        (Part("d@1/train", "train", "data set"), "d@1/train: train, data set, documents"),
    ],
)
def test_a_file_is_told_in_a_line(part, line):
    assert str(part) == line


@pytest.mark.parametrize(
    ("documents", "count"), [(1, 0), (9, 0), (10, 0), (11, 1), (29, 1), (31, 2), (100, 5), (10_000, 300)]
)
def test_a_share_of_the_documents_is_held_out_as_a_fixed_seed_draws_them(documents, count):
    """A twentieth, rounded, and 300 at most; the same for everybody, for ever."""
    found = chosen(documents, 100 * documents, 100 if documents > 20 else 1, 0.05, 300)
    assert found.numbers == set(random.Random(0).sample(range(documents), count))
    assert found.longer == math.inf
    assert found == chosen(documents, 100 * documents, 1, 0.05, 300)


def test_of_a_data_set_the_last_rows_are_held_out():
    assert chosen(41, 1, 1, 0.05, 100, end=True) == Chosen(frozenset({38, 39, 40}), math.inf)
    assert chosen(41, 1, 1, 0.05, 2, end=True) == Chosen(frozenset({39, 40}), math.inf)
    assert chosen(1, 1, 1, 0.05, 2, end=True).numbers == {0}
    assert chosen(0, 0, 0, 0.05, 2, end=True).numbers == set()


def test_documents_longer_than_what_is_held_out_are_cut():
    assert chosen(40, 1000, 50, 0.05, 9).longer == math.inf  # as long as that, no longer
    assert chosen(40, 1000, 51, 0.05, 9).longer == 50
    assert chosen(40, 1000, 51, 0.05, 9, end=True).longer == math.inf


def test_each_document_is_on_one_side_and_of_long_ones_the_end_is_held_out():
    texts = [("a" * 10, "0"), ("b" * 11, "1"), ("c", "2"), ("d" * 20, "3"), ("e", "4")]  # each with its label
    what = Chosen(frozenset({0, 2}), 10)
    asked: list[tuple[int, int]] = []

    def boundary(text: str, at: int) -> int:
        asked.append((len(text), at))
        return at - 1

    assert list(held_out(texts, what, 0.25, True, boundary)) == [("b" * 7, "1"), ("d" * 14, "3"), ("e", "4")]
    trained = [("a" * 10, "0"), ("b" * 4, "1"), ("c", "2"), ("d" * 6, "3")]
    assert list(held_out(texts, what, 0.25, False, boundary)) == trained
    assert asked == [(11, 8), (20, 15)] * 2
    blank = [("x" * 10 + " " * 10, "")]
    assert list(held_out(blank, Chosen(frozenset(), 5), 0.5, True, lambda text, at: at)) == [("x" * 10, "")]
    assert list(held_out(blank, Chosen(frozenset(), 5), 0.5, False, lambda text, at: at)) == []


def test_a_text_is_cut_at_the_nearest_space_that_is_near():
    text = "x" * 100 + " " + "y" * 100 + "\n" + "z" * 500
    assert near_space(text, 120) == 100
    assert near_space(text, 152) == 201
    assert near_space(text, 300) == 201
    assert near_space(text, 401) == 201  # 200 before it
    assert near_space(text, 402) == 402
    assert near_space("x" * 400 + " x", 200) == 200  # 200 behind it is too far
    assert near_space("x" * 399 + " x", 200) == 399
    assert near_space(" " + "x" * 50, 3) == 3  # nothing is cut off before the first character
    assert near_space("x" * 50 + " ", 48) == 48  # nor behind the last


def test_a_text_is_cut_where_two_tokens_meet():
    class Backend:
        def encode(self, part: str) -> Any:
            parts.append(part)
            return type("Coded", (), {"offsets": [(i, i + 3) for i in range(0, len(part), 3)]})

    parts: list[str] = []
    boundary = folders.between_tokens(type("Coder", (), {"backend_tokenizer": Backend()}))
    assert boundary("x" * 2000, 1001) == 1002  # tokens begin at 501 + 3 k
    assert boundary("x" * 2000, 1002) == 1003  # and at 502 + 3 k
    assert [len(part) for part in parts] == [1000, 1000]
    assert boundary("x" * 20, 1) == 3  # nothing is cut off before the first token
    assert boundary("x" * 20, 10) == 9
    assert boundary("xx", 1) == 1


def test_a_split_s_words_and_folders():
    assert folders.SPLITS == {
        "train": ("train", "training"),
        "validation": ("valid", "validation", "val", "dev", "development"),
        "test": ("test", "testing", "eval", "evaluation"),
    }
    for split, words in folders.SPLITS.items():
        for word in words:
            assert folders._split_of(Path(f"{word}.jsonl.gz"), "json") == split
            assert folders._split_of(Path(word.upper()) / "a.txt", "text") == split
            assert folders._split_of(Path(f"my-{word}-00001-of-00002.csv"), "csv") == split
            assert folders._split_of(Path(f"my-{word}.fa"), "fasta") == "train"
            assert folders._split_of(Path(f"{word}.fa"), "fasta") == split
    assert folders._split_of(Path("test/test.txt"), "text") == "test"
    with pytest.raises(ValueError, match="is of two splits by its name, validation and test: rename it"):
        folders._split_of(Path("test/dev.txt"), "text")


def test_what_is_remembered_of_a_file_is_all_that_is_said_of_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "three"}\n{"text": null}\n')
    which = files.recognise(tmp_path / "a.jsonl")
    assert isinstance(which, files.File)
    held = folders._held(which, "", "", False)
    assert held == {
        **{"column": "text", "documents": 2, "characters": 8, "longest": 5, "bytes": 49},
        "left_out": "1 left out: no text (row 3)",
        "sha256": hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest(),
    }


def test_hidden_files_of_a_folder_are_left_alone(tmp_path):
    for name in ("b.txt", "a.txt", ".c.txt", "sub/.d/e.txt", "sub/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [part.file for part in folders.survey(tmp_path)] == ["a.txt", "b.txt", "sub/f.txt"]
    assert list(corpora.load_texts(str(tmp_path / ".c.txt")).train()) == [".c.txt"]  # asked for by its name


def test_a_corpus_of_one_long_document_is_cut_at_a_twentieth_from_its_end(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 2000)
    corpus = corpora.load_texts(str(tmp_path / "a.txt"))
    (train,), (valid,), (test,) = corpus.train(), corpus.valid(), corpus.test()
    assert train + valid == "word " * 2000
    assert valid == test
    assert len(valid) == pytest.approx(500, abs=5)
    assert valid.startswith(" ")
    coder = tokenizers.load_tokenizer("bytes")
    (piece,) = corpus.documents("valid", coder)
    assert len(piece) == 500
