"""A tokenised corpus in a memory-mapped cache, made once and shared by runs.

All documents' tokens are one flat file a split, and a second file says where each ends. So neither tokens nor blocks
depend on how many processes did the work, and the cache serves every block length, packed or padded. Its name is a
fingerprint of everything it was made from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from sedd_train import corpora, storage
from sedd_train.corpora import Texts, content_of, load_texts
from sedd_train.tokenizers import identity, load_tokenizer
from sedd_train.tokens import Tokens, coded

__all__ = ["Corpus", "prepare", "cached"]

VERIFIED = "verified.json"
FORMAT = 5  # of the cache: counted up when the same sources give other files


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
    corpus: str | Texts,
    tokenizer: Any,
    cache: Path,
    progress: Callable[[str], None] = lambda _: None,
    *,
    streaming: bool = False,
) -> Corpus:
    """The tokenised corpus, from the cache if it is there and whole, else made and cached.

    Corpus and tokenizer are names (see `load_texts`, `load_tokenizer`), or a corpus of your own and one of
    transformers' fast tokenizers.

    With `streaming` a data set is read as it comes (see `load_texts`); what is made, and where it is kept, is the same.

    Every process may call this: one does the work while the others wait for its lock. A cache file that is missing, cut
    short or altered is noticed by its size, time of change and checksum, and made again. What is there is read without
    any lock, by whoever may read it.

    Raises:
        ValueError: the corpus is empty, unreadable, or unknown; so the tokenizer.
        ConnectionError: the hub cannot be reached.
    """
    source = load_texts(corpus, streaming=streaming) if isinstance(corpus, str) else corpus
    folder = _folder(source, tokenizer, cache)
    found = _open(folder)  # what has its name is whole: on a disk that can only be read, too
    if found is not None:
        return found
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{folder.name}.lock", mode=0o666):
        found = _open(folder)  # another process may have made it meanwhile
        if found is None:
            names = [given if isinstance(given, str) else type(given).__name__ for given in (corpus, tokenizer)]
            progress(f"tokenising {names[0]} with {names[1]} (once; kept in {folder})")
            for left in cache.glob(f"{folder.name}.*/"):  # by a process that was killed: the lock is ours
                shutil.rmtree(left)
            _build(source, tokenizer, folder)
            found = _open(folder)
        if found is None:
            raise OSError(f"the token cache {folder} could not be read back after it was written")
    return found


def cached(corpus: str, tokenizer_name: str, cache: Path) -> Corpus | None:
    """The tokenised corpus if it is in the cache, and whole; it is not made.

    Raises:
        ValueError: the corpus is empty, unreadable, or unknown.
    """
    return _open(_folder(load_texts(corpus), tokenizer_name, cache))


def _folder(source: Texts, tokenizer: Any, cache: Path) -> Path:
    name = tokenizer if isinstance(tokenizer, str) else identity(tokenizer)
    if isinstance(tokenizer, str) and Path(tokenizer).is_dir():  # which may be trained anew in its place
        name = content_of(sorted(path for path in Path(tokenizer).iterdir() if path.is_file()))
    sources = [FORMAT, source.identity, name, corpora.HELD_OUT, corpora.HELD_OUT_HUB]
    return cache / hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:16]


def _open(folder: Path) -> Corpus | None:
    """The cached corpus, or None if anything about it is not as it was written.

    Files that have the sizes and times of change at which their checksums were last found right are taken for what they
    were: only the first of the processes that read a cache reads all of it.
    """
    from transformers import AutoTokenizer

    try:
        meta = json.loads((folder / "meta.json").read_text())
        verified = _states(folder, meta) == _last_verified(folder)
        splits = {}
        for name in ("train", "valid", "test"):
            flat: NDArray[Any] = np.memmap(folder / meta[name]["file"], dtype=meta["dtype"], mode="r")
            ends: NDArray[Any] = np.memmap(folder / f"{meta[name]['file']}.ends", dtype=np.int64, mode="r")
            if len(flat) != meta[name]["tokens"] or len(ends) != meta[name]["documents"]:
                return None
            sums = (meta[name]["crc32"], meta[name]["ends_crc32"])
            if not verified and (_checksum(flat), _checksum(ends)) != sums:
                return None
            splits[name] = Tokens(flat, ends, meta[name]["characters"])
        if not verified:
            with suppress(OSError):  # of someone who may only read it
                storage.write_text(folder / VERIFIED, json.dumps(_states(folder, meta)))
        return Corpus(**splits, tokenizer=AutoTokenizer.from_pretrained(folder), fingerprint=str(meta["fingerprint"]))
    except (OSError, ValueError, KeyError):
        return None


def _states(folder: Path, meta: dict[str, Any]) -> dict[str, list[int]]:
    """Size and time of change of the files of tokens."""
    files = {f"{meta[name]['file']}{end}" for name in ("train", "valid", "test") for end in ("", ".ends")}
    stats = {file: (folder / file).stat() for file in sorted(files)}
    return {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}


def _last_verified(folder: Path) -> Any:
    try:
        return json.loads((folder / VERIFIED).read_text())
    except (OSError, ValueError):
        return None


def _build(source: Texts, tokenizer: Any, folder: Path) -> None:
    coder = load_tokenizer(tokenizer, source.train) if isinstance(tokenizer, str) else tokenizer
    dtype = np.dtype(np.uint16 if len(coder) <= 1 << 16 else np.uint32)
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}")
    scratch.mkdir()  # for whom the umask says, unlike tempfile's
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
        storage.publish(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(texts: Iterable[str], coder: Any, dtype: np.dtype[Any], path: Path) -> dict[str, Any]:
    """Tokens of all documents in one flat file, their ends in another, and what there is to know about them."""
    tokens = documents = characters = checksum = ends_checksum = 0
    with path.open("wb") as file, path.with_name(f"{path.name}.ends").open("wb") as ends_file:
        for flat, sizes, seen in coded(texts, coder, dtype):
            data, ends = flat.tobytes(), (tokens + sizes.cumsum()).tobytes()
            file.write(data)
            ends_file.write(ends)
            checksum, ends_checksum = zlib.crc32(data, checksum), zlib.crc32(ends, ends_checksum)
            tokens += len(flat)
            documents += len(sizes)
            characters += seen
    return {
        "file": path.name,
        "tokens": tokens,
        "documents": documents,
        "characters": characters,
        "crc32": checksum,
        "ends_crc32": ends_checksum,
    }


def _checksum(flat: NDArray[Any]) -> int:
    value = 0
    for start in range(0, len(flat), 1 << 24):
        value = zlib.crc32(flat[start : start + (1 << 24)].tobytes(), value)
    return value
