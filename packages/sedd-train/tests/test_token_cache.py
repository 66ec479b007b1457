"""The cache of tokens: whole or made again, gone on with after a kill, read by many and by those who may only read."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import psutil
import pytest
from sedd_train import coding, corpora, storage, token_build, token_cache, tokenizers
from sedd_train.tokens import tokenise

UMASK = os.umask(0)
os.umask(UMASK)
TEXTS = ["We the People of the United States, in Order to form a more perfect Union,"] * 30 + ["Fellow-citizens. " * 50]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A file of 100 documents, a million characters."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(3000)]
    file = tmp_path_factory.mktemp("large") / "rows.jsonl"
    rows = [json.dumps({"text": " ".join(draw.choices(words, k=1500))}) for _ in range(100)]
    file.write_text("\n".join(rows))
    return file


def folders(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir() and path.name != "files")


def test_the_cache_is_read_back_and_rebuilt_when_damaged(folder, tmp_path):
    said: list[str] = []
    first = token_cache.prepare(str(folder), "bpe:300", tmp_path, said.append)
    again = token_cache.prepare(str(folder), "bpe:300", tmp_path, said.append)
    assert [line.split()[0] for line in said] == ["tokenising", "tokenised:"]
    assert first.fingerprint == again.fingerprint
    for name in ("train.bin", "train.bin.ends", "train.bin.counts"):
        (file,) = tmp_path.glob(f"*/{name}")
        content = file.read_bytes()
        for damaged in (content[:-2], b"\x01" + content[1:], b""):
            file.write_bytes(damaged)
            rebuilt = token_cache.prepare(str(folder), "bpe:300", tmp_path, said.append)
            assert file.read_bytes() == content
            assert rebuilt.fingerprint == first.fingerprint
    assert len(said) == 2 * 10


def test_a_cache_is_read_whole_once_and_from_a_disk_that_can_only_be_read(folder, tmp_path, monkeypatch):
    summed: list[int] = []
    checksum = token_cache._checksum

    def noted(flat):
        summed.append(len(flat))
        return checksum(flat)

    monkeypatch.setattr(token_cache, "_checksum", noted)
    first = token_cache.prepare(str(folder), "bpe:300", tmp_path / "cache")
    (made,) = folders(tmp_path / "cache")
    assert made.stat().st_mode & 0o777 == 0o777 & ~UMASK  # others may read it
    assert len(summed) == 6
    for path in (tmp_path / "cache").glob("*.lock"):
        path.unlink()

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(storage, "locked", None)  # nothing is locked
    monkeypatch.setattr(storage, "write_text", read_only)
    again = token_cache.prepare(str(folder), "bpe:300", tmp_path / "cache")
    assert again.fingerprint == first.fingerprint
    assert len(summed) == 6
    assert not list((tmp_path / "cache").glob("*.lock"))

    (made / token_cache.VERIFIED).unlink()  # copied to such a disk, and never checked there
    monkeypatch.setattr(storage, "locked", read_only)
    assert token_cache.prepare(str(folder), "bpe:300", tmp_path / "cache").fingerprint == first.fingerprint
    assert len(summed) == 12
    with pytest.raises(OSError, match=r"cannot be written .*Read-only.* give another --cache"):
        token_cache.prepare(str(folder), "bpe:301", tmp_path / "cache")


def test_a_fingerprint_is_of_what_is_trained_on_what_is_watched_and_the_tokenizer(tmp_path):
    def fingerprint(train, valid, tokenizer="bpe:257"):
        texts = corpora.Texts(f"{train}, {valid}", lambda: [train], lambda: [valid], lambda: ["ACAC"])
        return token_cache.prepare(texts, tokenizer, tmp_path).fingerprint

    pairs = [("one", "two"), ("one", "three"), ("four", "two"), ("two", "one")]
    assert len({fingerprint(*pair) for pair in pairs}) == 4
    assert fingerprint("one", "two") != fingerprint("one", "two", "bpe:258")
    same_numbers = fingerprint("AC", "CA", "characters:ACGT"), fingerprint("CA", "AC", "characters:CAGT")
    assert len(set(same_numbers)) == 2


def test_what_killed_builds_left_is_gone_on_with_or_removed(folder, tmp_path):
    token_cache.prepare(str(folder), "bpe:300", tmp_path)
    (made,) = folders(tmp_path)
    (made / "meta.json").unlink()
    for name, age in [(made.name, 0.0), ("0123456789abcdef", 4 * 24 * 3600.0), ("fedcba9876543210", 3600.0)]:
        left = tmp_path / f"{name}.part"
        left.mkdir()
        (left / "train.bin").write_bytes(b"half")
        os.utime(left, (time.time() - age, time.time() - age))
    token_cache.prepare(str(folder), "bpe:300", tmp_path)
    assert [path.name for path in folders(tmp_path)] == sorted([made.name, "fedcba9876543210.part"])


def test_many_documents_are_written_in_batches_and_end_where_they_should(tmp_path, monkeypatch):
    texts = [f"{i} " * (i % 4) for i in range(2345)]  # the tokenizer gets a thousand at a time
    monkeypatch.setattr(coding, "ALONE", 1)
    for processes in (1, 3):
        monkeypatch.setattr(coding, "cores", lambda processes=processes: processes)
        cache = tmp_path / str(processes)
        found = token_cache.prepare(corpora.Texts("one", *[lambda: texts] * 3), "bpe:300", cache)
        tokens = tokenise(texts, found.tokenizer)
        assert found.train.flat.tolist() == tokens.flat.tolist()
        ends = np.flatnonzero(found.train.flat == found.tokenizer.eos_token_id) + 1
        assert found.train.ends.tolist() == ends.tolist() == tokens.ends.tolist()
        assert found.train.documents == len(texts)
        assert found.train.counts(400).tolist() == np.bincount(tokens.flat, minlength=400).tolist()


@pytest.mark.parametrize(("largest", "bytes_a_token"), [(65535, 2), (65536, 4), (131071, 4)])
def test_the_largest_number_of_a_tokenizer_is_kept(largest, bytes_a_token, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": largest - 1, "<end>": largest}, "a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast
    coder = fast(tokenizer_object=words, eos_token="<end>")
    found = token_cache.prepare(corpora.Texts("one", *[lambda: ["a b", "b a"]] * 3), coder, tmp_path)
    assert found.train.flat.tolist() == [0, largest - 1, largest, largest - 1, 0, largest]
    assert found.train.flat.dtype.itemsize == bytes_a_token


def test_a_long_document_is_coded_in_pieces_by_many_and_is_one_document(monkeypatch):
    coder = tokenizers.load_tokenizer("bytes")
    texts = ["a " * 40_000, "", "b" * 70_000, "c"]
    pieces = tokenizers.pieces
    monkeypatch.setattr(coding, "pieces", lambda text: pieces(text, 1000))
    monkeypatch.setattr(coding, "BATCH", 5000)
    monkeypatch.setattr(coding, "ALONE", 1)
    monkeypatch.setattr(coding, "cores", lambda: 3)
    tokens = tokenise(texts, coder)
    assert coder.decode(tokens.flat.tolist()) == "".join(f"{text}<|endoftext|>" for text in texts)
    assert np.diff([0, *tokens.ends]).tolist() == [len(text) + 1 for text in texts]


def test_text_that_cannot_be_written_is_named(monkeypatch):
    coder = tokenizers.load_tokenizer("dna")
    monkeypatch.setattr(coding, "cores", lambda: 1)
    for alone in (8, 0):  # by this process, and by another
        monkeypatch.setattr(coding, "ALONE", alone)
        with pytest.raises(ValueError, match=r"what the tokenizer cannot write: 'R', 'x'"):
            tokenise(["ACGT", "ACxR"], coder)


@pytest.mark.parametrize("processes", [0, 2])
def test_a_build_goes_on_where_it_crashed(large, tmp_path, monkeypatch, processes):
    """At any batch: what is made is the same, to the byte, and no text is coded twice."""
    monkeypatch.setattr(token_build, "JOURNAL_EVERY", 0.0)
    monkeypatch.setattr(coding, "BATCH", 40_000)
    monkeypatch.setattr(coding, "ALONE", 2)
    monkeypatch.setattr(coding, "cores", lambda: processes)
    whole = token_cache.prepare(str(large), "bpe:400", tmp_path / "whole")
    sent, coded, trained = [0], coding.coded, [0]

    def breaking(*args, **options):
        for part in coded(*args, **options):
            sent[0] += 1
            if sent[0] % 3 == 0:
                raise OSError("the power is gone")
            yield part

    def training(*args, **options):
        trained[0] += 1
        return tokenizers.load_tokenizer(*args, **options)

    monkeypatch.setattr(token_build, "coded", breaking)
    monkeypatch.setattr(token_build, "load_tokenizer", training)
    crashes = 0
    while True:
        try:
            again = token_cache.prepare(str(large), "bpe:400", tmp_path / "again")
            break
        except OSError:
            crashes += 1
            assert crashes < 50
    assert crashes >= 5
    assert trained == [1]
    batches = sum(1 for _ in coded(corpora.load_texts(str(large)).train(), whole.tokenizer, np.dtype("u2"))) + 4
    assert sent[0] - crashes <= batches
    assert again.fingerprint == whole.fingerprint
    for file in whole.folder.glob("*.bin*"):
        assert (again.folder / file.name).read_bytes() == file.read_bytes()


def test_what_a_journal_does_not_vouch_for_is_made_again(large, tmp_path, monkeypatch):
    monkeypatch.setattr(token_build, "JOURNAL_EVERY", 0.0)
    monkeypatch.setattr(coding, "BATCH", 40_000)
    monkeypatch.setattr(coding, "cores", lambda: 0)
    whole = token_cache.prepare(str(large), "bytes", tmp_path / "whole")
    for number, damage in enumerate(["longer", "shorter", "other", "journal"]):
        stopped = iter([False] * 9 + [True] * 9)
        cache = tmp_path / str(number)
        with pytest.raises(ValueError, match=r"stopped while tokenising, after .* the same command goes on"):
            token_cache.prepare(str(large), "bytes", cache, stop=functools.partial(next, stopped))
        (part,) = cache.glob("*.part")
        flat = part / "train.bin"
        content = flat.read_bytes()
        if damage == "journal":
            (part / "journal.json").write_text('{"train": {"tok')
        else:
            change = {"longer": content + b"\x01\x02\x03", "shorter": content[:-2], "other": b"\x09" + content[1:]}
            flat.write_bytes(change[damage])
        again = token_cache.prepare(str(large), "bytes", cache)
        assert again.fingerprint == whole.fingerprint


@pytest.mark.parametrize(("kills", "tokenizer"), [(1, "bytes"), pytest.param(20, "bpe:400", marks=pytest.mark.slow)])
def test_a_build_that_is_killed_again_and_again(large, tmp_path, kills, tokenizer):
    """SIGKILL at random moments, of every second one after something was saved; none of its processes stays behind."""
    script, draw, cache = str(Path(__file__).with_name("tokenise_slowly.py")), random.Random(kills), tmp_path / "killed"

    def saved():
        return [path.stat().st_mtime_ns for path in cache.glob("*.part/journal.json")]

    command = [sys.executable, script, str(large), str(cache), tokenizer, "0" if kills == 1 else "0.2"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        going_on = 0
        for number in range(kills):
            before = saved()
            print("kill", file=process.stdin, flush=True)
            child = int(process.stdout.readline())
            deadline = time.monotonic() + 120
            while number % 2 == 0 and saved() == before:
                assert time.monotonic() < deadline, "nothing was saved"
                time.sleep(0.01)
            time.sleep(draw.uniform(0.0, 0.5))
            children = psutil.Process(child).children(recursive=True)
            os.kill(child, signal.SIGKILL)
            assert process.stdout.readline() == "ended\n"
            _, alive = psutil.wait_procs(children, timeout=20)
            assert not alive
            going_on += bool(saved())
        assert going_on >= kills / 2
        whole = token_cache.prepare(str(large), tokenizer, tmp_path / "whole")
        assert process.communicate("\n", timeout=300)[0].split()[1:] == [whole.fingerprint, "ended"]
    (other,) = folders(cache)
    for file in whole.folder.glob("*.bin*"):
        assert (other / file.name).read_bytes() == file.read_bytes()


# Many readers


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    for code in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):

        def refused(self, code=code):
            raise OSError(code, "no locks here")

        monkeypatch.setattr(filelock.FileLock, "_acquire", refused)
        held = storage.locked(tmp_path / "a.lock")
        with held, pytest.raises(filelock.Timeout), storage.locked(tmp_path / "a.lock", timeout=0):
            pass
        with storage.locked(tmp_path / "a.lock", timeout=0):
            pass
    assert not (tmp_path / "a.lock.soft").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a process that has threads
        child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), storage.locked(tmp_path / "a.lock"):
            os._exit(9)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / "a.lock.soft").exists()
    with storage.locked(tmp_path / "a.lock", timeout=30):  # of a process that died
        pass
