"""A tokenised corpus in a memory-mapped cache, made once and shared by runs.

All documents' tokens are one flat file a split, and a second file says where each ends. So neither tokens nor blocks
depend on how many processes did the work, and the cache serves every block length, packed or padded. Its name is a
fingerprint of everything it was made from. `sedd_train.token_build` makes it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sedd_train import corpora, storage, token_build
from sedd_train.corpora import Texts, load_texts
from sedd_train.folders import Part
from sedd_train.tokenizers import identity, load_tokenizer
from sedd_train.tokens import Tokens

__all__ = ["Corpus", "prepare", "cached", "read"]

VERIFIED = "verified.json"
FORMAT = 7  # of the cache: counted up when the same sources give other files


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus.

    `test` is what published numbers of the corpus are measured on: `valid` again where there is no such part.

    Attributes:
        train: what to train on.
        valid: what to watch.
        test: what to measure.
        tokenizer: that wrote it.
        fingerprint: of what is trained on and watched and of the tokenizer, for a resumed run to compare.
        parts: what it was made of, file by file.
        folder: where it lies.
        labels: the words that the documents' labels number; none where they have none.
    """

    train: Tokens
    valid: Tokens
    test: Tokens
    tokenizer: Any
    fingerprint: str
    parts: tuple[Part, ...] = ()
    folder: Path = Path()
    labels: tuple[str, ...] = ()

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
    corpus: str | Texts,
    tokenizer: Any,
    cache: Path,
    progress: Callable[[str], None] = lambda _: None,
    *,
    eos: str = "",
    stop: Callable[[], bool] = lambda: False,
    **options: Any,
) -> Corpus:
    """The tokenised corpus, from the cache if it is there and whole, else made and cached.

    Every process may call this: one does the work while the others wait for its lock. What a process did that was
    killed is gone on with. A cache file that is missing, cut short or altered is noticed by its size, time of change
    and checksum, and made again. What is there is read without any lock, by whoever may read it.

    Args:
        corpus: a name (see `load_texts`), or a corpus of your own.
        tokenizer: a name (see `load_tokenizer`), or one of transformers' fast tokenizers.
        cache: the folder.
        progress: told what is done.
        eos: the token that ends a document; see `load_tokenizer`.
        stop: asked now and then whether to leave off.
        options: of `load_texts`.

    Raises:
        ValueError: the corpus is empty, unreadable, or unknown; so the tokenizer; or it was told to stop.
        OSError: the cache cannot be written.
        ConnectionError: the hub cannot be reached.
    """
    coder = _coder(tokenizer, eos)
    source = load_texts(corpus, index=cache / "files", **options) if isinstance(corpus, str) else corpus
    folder = _folder(source, coder, eos, cache)
    if _verified(folder) and (found := read(folder)) is not None:
        return found
    names = [given if isinstance(given, str) else type(given).__name__ for given in (corpus, tokenizer)]
    said = {
        key: value for key, value in sorted(options.items()) if key != "streaming" and (value or key != "label_column")
    }
    asked = [names[0], *(f"{key}={value}" for key, value in said.items())]
    asked.append(coder + eos if isinstance(coder, str) else identity(coder))

    def make() -> None:
        how = "going on to tokenise" if token_build.scratch(folder).exists() else "tokenising"
        progress(f"{how} {names[0]} with {names[1]} (once; kept in {folder})")
        token_build.build(source, coder, folder, eos=eos, asked=asked, progress=progress, stop=stop)

    try:
        return _made(folder, make)
    except ConnectionError:
        earlier = _made_before(cache, asked) if isinstance(corpus, str) else None
        if earlier is None:
            raise
        commit = ", ".join({part.commit for part in earlier.parts if part.commit}) or "unknown"
        progress(f"the hub cannot be reached: {names[0]} is taken as it was tokenised before, at commit {commit}")
        return earlier


def _made(folder: Path, make: Callable[[], None]) -> Corpus:
    """The corpus in a folder, made there if it is not there and whole, by one process at a time."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with storage.locked(folder.with_name(f"{folder.name}.lock")):
            found = _open(folder)  # another process may have made it meanwhile
            if found is None:
                token_build.remove_left_overs(folder.parent, folder.name)
                make()
                found = _open(folder)
    except OSError as error:  # a disk that can only be read, and no note on it that all was found right
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        found = _open(folder)
        if found is None:
            raise OSError(
                f"the token cache {folder.parent} cannot be written ({error}): give another --cache"
            ) from error
    if found is None:
        raise OSError(f"the token cache {folder} could not be read back after it was written")
    return found


def _made_before(cache: Path, asked: list[str]) -> Corpus | None:
    """The last corpus that was made of what was asked for in the same words."""
    found = []
    for path in cache.glob("*/meta.json"):
        with suppress(OSError, ValueError):
            if json.loads(path.read_text(encoding="utf-8")).get("asked") == asked:
                found.append((path.stat().st_mtime, path))
    return _open(max(found)[1].parent) if found else None


def cached(corpus: str, tokenizer: Any, cache: Path, *, eos: str = "", **options: Any) -> Corpus | None:
    """The tokenised corpus if it is in the cache; it is not made. Arguments as for `prepare`.

    Raises:
        ValueError: the corpus is empty, unreadable, or unknown.
    """
    source, coder = load_texts(corpus, index=cache / "files", **options), _coder(tokenizer, eos)
    return read(_folder(source, coder, eos, cache))


def read(folder: Path) -> Corpus | None:
    """The corpus in a folder that `prepare` has made and found right; its tokens are not read. None if it is not there.

    The files have the sizes that they should have.
    """
    return _open(folder, verify=False)


def _coder(tokenizer: Any, eos: str) -> Any:
    """The tokenizer, or its name where it is yet to be trained."""
    if not isinstance(tokenizer, str) or tokenizer.startswith("bpe:"):
        return tokenizer
    return load_tokenizer(tokenizer, eos=eos)


def _folder(source: Texts, tokenizer: Any, eos: str, cache: Path) -> Path:
    name = f"{tokenizer} {eos}" if isinstance(tokenizer, str) else identity(tokenizer)
    sources = [FORMAT, source.identity, name, corpora.HELD_OUT, corpora.HELD_OUT_MOST]
    return cache / hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:16]


def _open(folder: Path, *, verify: bool = True) -> Corpus | None:
    """The cached corpus, or None if anything about it is not as it was written.

    Files that have the sizes and times of change at which their checksums were last found right are taken for what they
    were: only the first of the processes that read a cache reads all of it.
    """
    from transformers import AutoTokenizer

    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        verify = verify and not _verified(folder)
        splits = {}
        for name in ("train", "valid", "test"):
            file = folder / meta[name]["file"]
            flat: NDArray[Any] = np.memmap(file, dtype=meta["dtype"], mode="r")
            ends: NDArray[Any] = np.memmap(f"{file}.ends", dtype=np.int64, mode="r")
            if len(flat) != meta[name]["tokens"] or len(ends) != meta[name]["documents"]:
                return None
            sums = (meta[name]["crc32"], meta[name]["ends_crc32"])
            if verify and (_checksum(flat), _checksum(ends)) != sums:
                return None
            counts = np.fromfile(f"{file}.counts", np.int64)
            if counts.sum() != len(flat):
                return None
            labels = np.memmap(f"{file}.labels", dtype=np.int32, mode="r") if meta.get("labels") else None
            if labels is not None and len(labels) != len(ends):
                return None
            if verify and labels is not None and _checksum(labels) != meta[name]["labels_crc32"]:
                return None
            splits[name] = Tokens(flat, ends, meta[name]["characters"], counts, meta[name]["size"], labels)
        if verify:
            with suppress(OSError):  # of someone who may only read it
                storage.write_text(folder / VERIFIED, json.dumps(_states(folder, meta)))
        return Corpus(
            **splits,
            tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
            fingerprint=str(meta["fingerprint"]),
            parts=tuple(Part(**part) for part in meta["parts"]),
            folder=folder,
            labels=tuple(meta.get("labels", ())),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _verified(folder: Path) -> bool:
    """Whether the files are as they were when their checksums were last found right."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        return bool(_states(folder, meta) == json.loads((folder / VERIFIED).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _states(folder: Path, meta: dict[str, Any]) -> dict[str, list[int]]:
    """Size and time of change of the files of tokens."""
    ends = ("", ".ends", ".counts", *([".labels"] if meta.get("labels") else []))
    files = {f"{meta[name]['file']}{end}" for name in ("train", "valid", "test") for end in ends}
    stats = {file: (folder / file).stat() for file in sorted(files)}
    return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


def _checksum(flat: NDArray[Any]) -> int:
    value = 0
    for start in range(0, len(flat), 1 << 24):
        data: Any = flat[start : start + (1 << 24)]
        value = zlib.crc32(data, value)
    return value
