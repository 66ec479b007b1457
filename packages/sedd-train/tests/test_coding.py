"""Documents to tokens: in which batches, with which ends, from where on, by whom, and what is said of what fails."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
from typing import Any

import numpy as np
import pytest
from sedd_train import coding, coding_worker, tokenizers
from sedd_train.coding import coded

BYTES = np.dtype(np.uint16)


@pytest.fixture(scope="module")
def coder():
    return tokenizers.load_tokenizer("characters:ab ")  # a b space end


def batches(texts, skip=0):
    return [(parts, last) for parts, last in coding._batches(texts, skip)]


def test_a_batch_is_full_with_so_many_characters_or_pieces(monkeypatch):
    assert (coding.BATCH, coding.ALONE, coding.AHEAD) == (1 << 20, 8, 2)
    monkeypatch.setattr(coding, "BATCH", 5)
    assert batches(["aa", "aaa", "a", "", "aaaa"]) == [(["aa", "aaa"], [True] * 2), (["a", "", "aaaa"], [True] * 3)]
    assert batches(["aaaa"]) == [(["aaaa"], [True])]
    assert batches([]) == []
    assert [len(parts) for parts, _ in batches([""] * 2001)] == [1000, 1000, 1]


def test_pieces_of_a_document_end_with_its_last_and_those_coded_before_are_skipped(monkeypatch):
    monkeypatch.setattr(coding, "pieces", lambda text: [text[i : i + 2] for i in range(0, len(text), 2)])
    texts = ["abab", "", "ab ", "a"]
    whole = (["ab", "ab", "", "ab", " ", "a"], [False, True, True, False, True, True])
    assert batches(texts) == [whole]
    for skip in range(6):
        assert batches(texts, skip) == [(whole[0][skip:], whole[1][skip:])]
    assert batches(texts, 6) == batches(texts, 9) == []


def test_what_is_said_of_a_batch(coder, monkeypatch):
    monkeypatch.setattr(coding, "pieces", lambda text: [text[i : i + 2] for i in range(0, len(text), 2)])
    (found,) = coded(["aba", "", "b"], coder, BYTES, processes=0)
    assert found.flat.tolist() == [0, 1, 0, 3, 3, 1, 3]
    assert found.flat.dtype == np.uint16
    assert found.ends.dtype == np.int64
    assert found.ends.tolist() == [4, 5, 7]
    assert (found.pieces, found.characters) == (4, 4)
    (rest,) = coded(["aba", "", "b"], coder, np.dtype(np.uint32), skip=1, processes=0)
    assert rest.flat.tolist() == [0, 3, 3, 1, 3]
    assert rest.flat.dtype == np.uint32
    assert (rest.ends.tolist(), rest.pieces, rest.characters) == ([2, 3, 5], 3, 2)
    assert list(coded(["ab"], coder, BYTES, skip=1, processes=0)) == []


def test_the_first_batches_are_coded_here_and_others_are_started_before_they_are_needed(coder, monkeypatch):
    started: list[int] = []
    workers = coding._workers

    def noted(count, description):
        started.append(count)
        return workers(count, description)

    monkeypatch.setattr(coding, "_workers", noted)
    monkeypatch.setattr(coding, "BATCH", 1)
    monkeypatch.setattr(coding, "cores", lambda: 3)
    texts = ["a", "b"] * 4
    found = [part.flat.tolist() for part in coded(texts[:6], coder, BYTES)]
    assert (found, started) == ([[0, 3], [1, 3]] * 3, [])
    found = [part.flat.tolist() for part in coded(texts[:7], coder, BYTES)]
    assert (found[6], started.pop()) == ([0, 3], 3)
    found = [part.flat.tolist() for part in coded([*texts, "ab"], coder, BYTES)]
    assert (found, started) == ([*[[0, 3], [1, 3]] * 4, [0, 1, 3]], [3])
    found = [part.flat.tolist() for part in coded([*texts, "ab"], coder, BYTES, processes=0)]
    assert (len(found), started) == (9, [3])
    assert coding_worker.plain(coder.backend_tokenizer.to_str()).get_vocab_size() == 4


def test_processors_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5} if pid == 0 else {1}, raising=False)
    assert coding.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert coding.cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert coding.cores() == 1


def test_what_cannot_be_written_is_told_by_character_where_tokens_are(coder):
    told = "'A', 'B', 'C', 'D', 'E', 'F', 'G', 'H', 'I', 'J'$"  # ten of them
    with pytest.raises(ValueError, match=f"what the tokenizer cannot write: {told}"):
        list(coded(["KJIHGFEDCBA"], coder, BYTES, processes=0))
    words = tokenizers.load_tokenizer("bytes")
    assert str(coding._unwritable("no such word", (["x"], [True]), words)).endswith("cannot write (no such word)")


def test_a_process_that_was_killed_is_told(coder, monkeypatch):
    processes: list[Any] = []
    popen = subprocess.Popen

    def started(command, **how):
        assert how["env"]["TOKENIZERS_PARALLELISM"] == "false"
        processes.append(popen(command, **how))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(coding, "ALONE", 1)
    monkeypatch.setattr(coding, "BATCH", 1)

    def texts():
        yield "a"
        yield "b"
        while not processes:  # the third is asked for when they have started
            yield "a"
        for process in processes:
            process.kill()
            process.wait()
        yield from ["ab"] * 9

    with pytest.raises(OSError, match=r"a process that tokenised ended \(exit code .*\).*what was done before is kept"):
        list(coded(texts(), coder, BYTES, processes=1))
    assert all(process.poll() is not None for process in processes)


# What the other process does


def test_a_document_s_end_is_put_after_its_last_piece_alone(coder):
    plain = coding_worker.plain(coder.backend_tokenizer.to_str())
    flat, sizes = coding_worker.encode(plain, ["ab", "a", ""], [False, True, True], 9, "<u2")
    assert (flat.tolist(), sizes.tolist()) == ([0, 1, 0, 9, 9], [2, 2, 1])
    assert flat.dtype == np.uint16
    assert sizes.dtype == np.int64
    flat, sizes = coding_worker.encode(plain, ["ab", "a"], [False, True], None, "<u4")
    assert (flat.tolist(), sizes.tolist()) == ([0, 1, 0], [2, 1])
    assert flat.dtype == np.uint32
    flat, sizes = coding_worker.encode(plain, ["ab"], [True], 0, "<u2")  # the first token may end texts, too
    assert flat.tolist() == [0, 1, 0]


def test_it_answers_batch_after_batch_and_what_fails_by_its_words(coder):
    asked, answered = io.BytesIO(), io.BytesIO()
    for part in (
        coder.backend_tokenizer.to_str(),
        (["a"], [True], 3, "<u2"),
        (["x"], [True], 3, "<u2"),
        (["b"], [False], 3, "<u2"),
    ):
        pickle.dump(part, asked)
    asked.seek(0)
    coding_worker.serve(asked, answered)
    answered.seek(0)
    first, second, third = (pickle.load(answered) for _ in range(3))
    assert [part.tolist() for part in first] == [[0, 3], [2]]
    assert isinstance(second, str)
    assert [part.tolist() for part in third] == [[1], [1]]
    assert answered.read() == b""
