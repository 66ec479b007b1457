"""Data sets of the hub, which here is a folder: splits, streams, commits, rows that are no documents."""

from __future__ import annotations

from typing import Any

import datasets
import huggingface_hub
import pytest
from sedd_train import corpora, hub, token_cache

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Data sets: with three splits, with one of 50 rows, and one with bad rows."""
    whole = tmp_path_factory.mktemp("stored")
    texts = {
        "three": {"train": 50, "validation": 4, "test": 3},
        "one": {"train": 50},
        "other": {"train": 50, "dev": 3},
    }
    for name, splits in texts.items():
        (whole / name).mkdir()
        for split, count in splits.items():
            rows = [f"{split} sentence {i} " * (i % 3 + 1) for i in range(count)]
            made = datasets.Dataset.from_dict({"id": list(range(count)), "text": rows})
            made.to_parquet(whole / name / f"{split}.parquet")
    (whole / "bad").mkdir()
    some = ["one", None, "two", " ", "three"]
    datasets.Dataset.from_dict({"id": list(range(5)), "text": some}).to_parquet(whole / "bad" / "train.parquet")
    datasets.Dataset.from_dict({"id": [1], "text": ["v"]}).to_parquet(whole / "bad" / "validation.parquet")
    return whole


@pytest.fixture
def there(stored, monkeypatch, tmp_path):
    """The hub; there[NAME] is the commit that its main branch is at, `asked` what was loaded."""
    commits: dict[str, Any] = dict.fromkeys(("three", "one", "other", "bad"), FIRST)
    asked: list[tuple[Any, ...]] = []
    load = datasets.load_dataset

    class Api:
        def dataset_info(self, name, revision=None, timeout=None):
            if name not in commits:
                raise OSError("no such thing")
            return type("Info", (), {"sha": commits[name]})

    def load_dataset(name, config, *, revision, streaming):
        asked.append((name, config, revision))
        if name not in commits:
            raise OSError("the hub is gone")
        files = {path.stem: str(path) for path in (stored / name).iterdir()}
        return load("parquet", data_files=files, streaming=streaming, cache_dir=str(tmp_path / "datasets"))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    commits["asked"] = asked
    return commits


@pytest.mark.parametrize("name", ["three", "one", "other"])
def test_a_stream_gives_the_documents_of_a_stored_data_set(name, there, monkeypatch):
    for held_out in (100_000, 2):  # the second is what is held out, rather than its share of the rows
        monkeypatch.setattr(corpora, "HELD_OUT_MOST", held_out)
        whole = corpora.load_texts(f"hub:{name}")
        stream = corpora.load_texts(f"hub:{name}", streaming=True)
        assert stream.identity == whole.identity
        assert list(stream.valid()) == list(whole.valid())  # before the rest of it has been read
        for part in ("train", "valid", "test", "train"):
            texts = list(getattr(stream, part)())
            assert texts == list(getattr(whole, part)())
            assert texts
    if name == "other":
        assert [text[:3] for text in whole.valid()] == ["dev"] * 3


def test_a_stream_fills_the_same_cache(there, tmp_path):
    whole = token_cache.prepare("hub:one", "bpe:300", tmp_path / "whole")
    stream = token_cache.prepare("hub:one", "bpe:300", tmp_path / "stream", streaming=True)
    assert stream.fingerprint == whole.fingerprint
    for part in ("train", "valid", "test"):
        assert getattr(stream, part).flat.tolist() == getattr(whole, part).flat.tolist()
    assert stream.folder.name == whole.folder.name


def test_a_stream_is_not_stored(there, tmp_path):
    assert list(corpora.load_texts("hub:three", streaming=True).train())
    assert not list(tmp_path.rglob("*.arrow"))
    assert list(corpora.load_texts("hub:three").train())
    assert list(tmp_path.rglob("*.arrow"))  # so the line before could have failed


def test_a_stream_that_breaks_off(there, monkeypatch):
    def breaking():
        yield from [{"text": "one"}] * 3
        raise RuntimeError("connection lost")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": breaking(), "test": []})
    with pytest.raises(OSError, match=r"could not be read on after 3 rows \(RuntimeError: connection lost\).*try"):
        list(corpora.load_texts("hub:three", streaming=True).train())


def test_bad_rows_of_a_data_set_are_counted_and_located(there):
    corpus = corpora.load_texts("hub:bad")
    assert list(corpus.train()) == ["one", "two", "three"]
    assert [str(part) for part in corpus.parts()] == [
        f"bad@{FIRST}/train: train, data set, column text, 3 documents; 1 left out: no text (row 2); "
        "1 left out: empty (row 4)"
    ]
    with pytest.raises(ValueError, match=r"corpus bad has no column 'words': its columns are id, text"):
        list(corpora.load_texts("hub:bad", column="words").train())


def test_identity_is_the_commit(there, tmp_path):
    first = token_cache.prepare("hub:one", "bpe:300", tmp_path)
    assert {part.commit for part in first.parts} == {FIRST}
    there["one"] = SECOND  # somebody pushed
    second = token_cache.prepare("hub:one", "bpe:300", tmp_path)
    assert second.folder != first.folder
    again = token_cache.prepare("hub:one", "bpe:300", tmp_path, revision=FIRST)
    assert again.folder == first.folder
    assert there["asked"] == [("one", None, FIRST), ("one", None, SECOND)]
    with_config = corpora.load_texts("hub:one:big", revision=FIRST)
    assert list(with_config.train())
    assert there["asked"][-1] == ("one", "big", FIRST)


def test_without_the_hub_what_was_tokenised_before_is_taken_and_said(there, tmp_path):
    token_cache.prepare("hub:one", "bpe:300", tmp_path)
    there["one"] = SECOND
    before = token_cache.prepare("hub:one", "bpe:300", tmp_path)
    del there["one"]
    said: list[str] = []
    found = token_cache.prepare("hub:one", "bpe:300", tmp_path, said.append)
    assert found.folder == before.folder
    assert said[-1].startswith("the hub cannot be reached")
    assert SECOND in said[-1]
    further: list[dict[str, Any]] = [{"revision": "v2"}, {"column": "text"}]
    for options in further:
        with pytest.raises(ConnectionError, match="could not be had from the Hugging Face hub"):
            token_cache.prepare("hub:one", "bpe:300", tmp_path, **options)
    with pytest.raises(ConnectionError, match="could not be had"):
        token_cache.prepare("hub:one", "bpe:301", tmp_path)


def test_a_commit_is_known_from_what_this_machine_heard_last(monkeypatch, tmp_path):
    """Offline, as these tests are."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    assert hub.commit_of("me/texts") == ""
    (tmp_path / "datasets" / "me___texts" / "default" / "0.0.0" / SECOND).mkdir(parents=True)
    assert hub.commit_of("me/texts") == SECOND
    refs = tmp_path / "hub" / "datasets--me--texts" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(FIRST)
    assert hub.commit_of("me/texts") == FIRST
    assert hub.commit_of("me/texts", SECOND) == SECOND


def test_a_folder_in_place_of_a_name_is_a_folder(tmp_path):
    """Whose files are known by what they hold."""
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    before = corpora.load_texts(f"hub:{tmp_path}")
    assert before.identity == corpora.load_texts(str(tmp_path)).identity
    assert list(before.train()) + list(before.valid()) == ["one", "two"]
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "six"}\n')
    assert corpora.load_texts(f"hub:{tmp_path}").identity != before.identity


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (20, 1), (21, 2), (25, 2), (40, 2), (41, 3), (99, 3)])
def test_a_twentieth_of_the_rows_is_held_out_and_a_part_of_one_is_one(count, held_out, streaming):
    """Never none, and no more than are wanted."""
    data = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(count)]})
    found = hub.DataSet(
        name="n",
        config="",
        revision="",
        commit="",
        column="",
        streaming=streaming,
        blank=False,
        share=0.05,
        most=3,
    )
    found.__dict__["data"] = {"train": data.to_iterable_dataset() if streaming else data}
    rows = [f"row {i}" for i in range(count)]
    assert list(found.documents("train")) == rows[:-held_out]
    assert list(found.documents("validation")) == rows[-held_out:]
