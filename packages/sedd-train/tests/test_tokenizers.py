"""Tokenizers of any kind: characters, bytes, files, ends of text, and numbers that no token has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sedd_train import corpora, token_cache, tokenizers
from sedd_train.tokens import tokenise
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def words(vocabulary, **options) -> Any:
    coder = Tokenizer(models.WordLevel(vocabulary, next(iter(vocabulary))))
    coder.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=coder, **options)


@pytest.mark.parametrize(
    ("name", "text", "size"),
    [
        ("dna", "ACGTNNGATTACA", 6),
        ("protein", "MKVLAAGIVGLX*", 29),
        ("characters:ab\n ", "ab ba\nbb", 5),
        ("characters:吾輩は猫である", "吾輩は猫である", 8),
        ("bytes", "any text, déjà 三 \x00", 257),
        ("characters", "a to z", 27),
    ],
)
def test_characters_of_any_alphabet(name, text, size, tmp_path):
    coder = tokenizers.load_tokenizer(name)
    assert tokenizers.num_tokens(coder) == size == tokenizers.vocab_size(name)
    texts = corpora.Texts(text, *[lambda: [text, text]] * 3)
    found = token_cache.prepare(texts, name, tmp_path)
    end = [] if name == "characters" else [coder.eos_token_id]
    assert found.train.flat.tolist() == [*coder.encode(text), *end] * 2
    assert found.tokenizer.decode(found.train.flat.tolist()[: len(coder.encode(text))]) == text
    if name != "bytes":
        assert len(coder.encode(text)) == len(text)


@pytest.mark.parametrize("name", ["characters:", "characters:ABA"])
def test_an_alphabet_that_makes_no_sense(name):
    with pytest.raises(ValueError, match="expected characters, each of them once"):
        tokenizers.load_tokenizer(name)


def test_a_tokenizer_from_a_file_alone(tmp_path):
    made = tokenizers.load_tokenizer("bpe:300", lambda: ["some text"] * 9)
    made.save_pretrained(tmp_path)
    file = str(tmp_path / "tokenizer.json")
    found = tokenizers.load_tokenizer(file)  # whose end of text is known by its name
    assert (found.eos_token, found.eos_token_id) == (made.eos_token, made.eos_token_id)
    assert tokenizers.identity(found) == tokenizers.identity(made)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        tokenizers.load_tokenizer(file)
    with pytest.raises(ValueError, match="there is no such file"):
        tokenizers.load_tokenizer(str(tmp_path / "nothing.json"))


@pytest.mark.parametrize(
    ("vocabulary", "options", "eos", "end"),
    [
        ({"a": 0, "</s>": 1}, {}, "", "</s>"),
        ({"a": 0, "[SEP]": 1, "<sep>": 2}, {"sep_token": "<sep>"}, "", "<sep>"),
        ({"a": 0, "b": 1, "</s>": 2}, {}, "b", "b"),
        ({"a": 0, "b": 1, "</s>": 2}, {"eos_token": "</s>"}, "none", None),
        ({"a": 0, "b": 1}, {}, "none", None),
    ],
)
def test_the_end_of_text_is_named_or_found(vocabulary, options, eos, end, tmp_path):
    words(vocabulary, **options).save_pretrained(tmp_path / "coder")
    found = tokenizers.load_tokenizer(str(tmp_path / "coder"), eos=eos)
    assert found.eos_token == end
    texts = corpora.Texts("one", *[lambda: ["a a", "a"]] * 3)
    corpus = token_cache.prepare(texts, str(tmp_path / "coder"), tmp_path / "cache", eos=eos)
    after = [] if end is None else [vocabulary[end]]
    assert corpus.train.flat.tolist() == [0, 0, *after, 0, *after]
    assert corpus.train.ends.tolist() == [2 + len(after), 3 + 2 * len(after)]
    assert corpus.tokenizer.eos_token == end  # read back


def test_without_an_end_of_text_one_is_asked_for(tmp_path):
    words({"a": 0, "b": 1}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no end-of-text token.* by --eos TOKEN, or write --eos none"):
        tokenizers.load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match=r"eos = 'c': the tokenizer .* has no such token"):
        tokenizers.load_tokenizer(str(tmp_path), eos="c")


def test_numbers_that_no_token_has_are_states(tmp_path):
    """As CamemBERT's: 32 005 tokens, of which the last is number 32 005 or more."""
    coder = words({"a": 0, "b": 3, "</s>": 9}, eos_token="</s>")
    assert len(coder) == 3
    assert tokenizers.num_tokens(coder) == 10
    corpus = token_cache.prepare(corpora.Texts("holes", *[lambda: ["a b", "b"] * 9] * 3), coder, tmp_path)
    assert corpus.train.flat.tolist() == [0, 3, 9, 3, 9] * 9
    assert torch.equal(corpus.train.counts(11), torch.tensor([9, 0, 0, 18, 0, 0, 0, 0, 0, 18, 0]))


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="is none of transformers' fast tokenizers"):
        tokenizers.identity(object())


def test_what_cuts_fills_up_or_frames_does_so_nowhere_here():
    coder = words({"a": 0, "</s>": 1}, eos_token="</s>")
    coder.backend_tokenizer.enable_truncation(2)
    coder.backend_tokenizer.enable_padding(length=7)
    assert tokenise(["a a a a", "a"], coder).flat.tolist() == [0, 0, 0, 0, 1, 0, 1]
