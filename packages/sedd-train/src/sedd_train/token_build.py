"""Making a token cache: it is written beside its place, and gone on with after a crash, a kill or a full disk.

Now and then what has been written is synchronised to the disk, and a journal says how much that is:

    write tokens, ends -> fsync both -> replace the journal

What lies behind the journal's end is cut off when it goes on; pieces of text before it are read but not coded again.
When all is there the folder gets its name.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import Timeout
from tqdm import tqdm

from sedd_train import storage
from sedd_train.coding import coded
from sedd_train.corpora import Texts
from sedd_train.tokenizers import identity, load_tokenizer, num_tokens
from sedd_train.tokens import counted, numbered

__all__ = ["build", "scratch", "remove_left_overs"]

NAMES = ("train", "valid", "test")
JOURNAL = "journal.json"
JOURNAL_EVERY = 15.0  # seconds
FORGOTTEN = 3 * 24 * 3600.0  # seconds after which what another build left is removed


def scratch(folder: Path) -> Path:
    """Where a cache is while it is made."""
    return folder.with_name(f"{folder.name}.part")


def remove_left_overs(cache: Path, but: str) -> None:
    """Remove what builds left that were killed days ago and never gone on with."""
    for left in cache.glob("*.part/"):
        if left.name == f"{but}.part":
            continue
        with suppress(Timeout, OSError):  # one that is at work, or is done by now
            journal = left / JOURNAL if (left / JOURNAL).exists() else left
            if time.time() - journal.stat().st_mtime >= FORGOTTEN:
                with storage.locked(cache / f"{left.stem}.lock", timeout=0):
                    shutil.rmtree(left)


def build(
    source: Texts,
    tokenizer: Any,
    folder: Path,
    *,
    eos: str = "",
    asked: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Tokenise a corpus into a folder. The caller holds its lock.

    Args:
        source: the corpus.
        tokenizer: or 'bpe:SIZE', for one that is trained on it.
        folder: where the cache will lie.
        eos: the token that ends a document; see `load_tokenizer`.
        asked: in which words it was asked for.
        progress: told how it went.
        stop: asked now and then whether to leave off.

    Raises:
        ValueError: a split has no text, the tokenizer cannot write it, or it was told to stop.
        OSError: reading or writing failed.
    """
    place = scratch(folder)
    place.mkdir(exist_ok=True)
    journal = _journal(place)
    coder = _coder(source, tokenizer, eos, place, journal)
    dtype = np.dtype(np.uint16 if num_tokens(coder) <= 1 << 16 else np.uint32)
    meta: dict[str, Any] = {"dtype": dtype.name, "vocab_size": num_tokens(coder)}
    texts = source.cut_for(coder)
    try:
        for name in NAMES:
            if name == "test" and texts.test is texts.valid:
                meta[name] = meta["valid"]
                continue
            meta[name] = _write(texts, name, coder, dtype, place, journal, stop)
        if texts.labels is not None:
            meta["labels"] = _write_labels(texts.labels, meta, place)
    except ValueError as error:
        if not isinstance(error, _Stopped):  # what was wrong would be wrong again
            shutil.rmtree(place, ignore_errors=True)
        raise
    if meta["test"] is not meta["valid"] and {**meta["test"], "file": "valid.bin"} == meta["valid"]:
        for end in ("", ".ends", ".counts", *([".labels"] if "labels" in meta else [])):
            (place / f"test.bin{end}").unlink()
        meta["test"] = meta["valid"]
    sums = f"{meta['train']['crc32']:08x}{meta['valid']['crc32']:08x}"
    if "labels" in meta:
        known = [meta["labels"], *(meta[name]["labels_crc32"] for name in ("train", "valid"))]
        sums += f"{zlib.crc32(json.dumps(known).encode()):08x}"
    digest = identity(coder).removeprefix("tokenizer:")[:16]
    meta["fingerprint"] = f"{sums}-{num_tokens(coder)}-{digest}"
    meta["asked"] = list(asked)
    meta["parts"] = [dataclasses.asdict(part) for part in texts.parts()]
    (place / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    (place / JOURNAL).unlink(missing_ok=True)
    storage.publish(place, folder)
    tokens = sum(meta[name]["tokens"] for name in ("train", "valid"))
    progress(f"tokenised: {tokens:,} tokens of {meta['vocab_size']:,} kinds")


class _Stopped(ValueError):
    """Told to leave off."""


def _journal(place: Path) -> dict[str, Any]:
    """How far a build came; nothing if it has no tokenizer yet, or says what makes no sense."""
    try:
        journal = json.loads((place / JOURNAL).read_text(encoding="utf-8"))
        return journal if isinstance(journal, dict) else {}
    except (OSError, ValueError):
        return {}


def _coder(source: Texts, tokenizer: Any, eos: str, place: Path, journal: dict[str, Any]) -> Any:
    """The tokenizer, saved in the cache before anything is written with it."""
    from transformers import AutoTokenizer

    if journal:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    coder = load_tokenizer(tokenizer, source.train, eos=eos) if isinstance(tokenizer, str) else tokenizer
    coder.save_pretrained(place)
    return AutoTokenizer.from_pretrained(place, trust_remote_code=False)  # as whoever goes on will have it


def _write(
    texts: Texts,
    name: str,
    coder: Any,
    dtype: np.dtype[Any],
    place: Path,
    journal: dict[str, Any],
    stop: Callable[[], bool],
) -> dict[str, Any]:
    """Tokens of a split's documents in one flat file, their ends in another, and what there is to know about them."""
    path = place / f"{name}.bin"
    state = journal.get(name)
    if state is None or not _cut_back(path, state, dtype):
        state = dict.fromkeys(("tokens", "documents", "characters", "size", "pieces", "crc32", "ends_crc32"), 0)
        state["whole"] = False
        for end in ("", ".ends"):
            path.with_name(f"{path.name}{end}").write_bytes(b"")
    with (
        path.open("ab") as file,
        path.with_name(f"{path.name}.ends").open("ab") as ends_file,
        tqdm(desc=f"tokenising {name}", unit="token", unit_scale=True, initial=state["tokens"], mininterval=1.0) as bar,
    ):

        def note() -> None:
            storage.synchronise(file)
            storage.synchronise(ends_file)
            journal[name] = state
            storage.write_text(place / JOURNAL, json.dumps(journal))

        noted = time.monotonic()
        for part in () if state["whole"] else coded(texts.documents(name), coder, dtype, skip=state["pieces"]):
            data, ends = part.flat.tobytes(), (state["tokens"] + part.ends).tobytes()
            file.write(data)
            ends_file.write(ends)
            state = {
                "tokens": state["tokens"] + len(part.flat),
                "documents": state["documents"] + len(part.ends),
                "characters": state["characters"] + part.characters,
                "size": state["size"] + part.size,
                "pieces": state["pieces"] + part.pieces,
                "crc32": zlib.crc32(data, state["crc32"]),
                "ends_crc32": zlib.crc32(ends, state["ends_crc32"]),
                "whole": False,
            }
            bar.update(len(part.flat))
            if stop() or time.monotonic() - noted > JOURNAL_EVERY:
                note()
                noted = time.monotonic()
            if stop():
                raise _Stopped(
                    f"stopped while tokenising, after {state['tokens']:,} tokens of {name}; they are kept, and the "
                    "same command goes on"
                )
        if state["characters"] == 0:
            raise ValueError(f"the corpus has too little text: nothing is left for its {name} split")
        state = {**state, "whole": True}
        note()
    flat = np.memmap(path, dtype=dtype, mode="r")
    counted(flat).tofile(f"{path}.counts")
    return {"file": path.name} | {key: value for key, value in state.items() if key not in ("whole", "pieces")}


def _write_labels(labels: Callable[[str], Iterable[str]], meta: dict[str, Any], place: Path) -> list[str]:
    """Each split's labels, (documents,) int32, beside its tokens; the words that they number, first come first."""
    numbers: dict[str, int] = {}
    for name in NAMES:
        split = meta[name]
        if "labels_crc32" in split:  # of valid, which test is
            continue
        found = numbered(labels(name), numbers)
        if len(found) != split["documents"]:
            raise ValueError(f"{split['documents']} documents of {name} have {len(found)} labels: give one for each")
        found.tofile(place / f"{split['file']}.labels")
        split["labels_crc32"] = zlib.crc32(found.tobytes())
    if not numbers:
        raise ValueError("no document has a label (--label-column)")
    return list(numbers)


def _cut_back(path: Path, state: dict[str, Any], dtype: np.dtype[Any]) -> bool:
    """Cut the files off where the journal says that they are whole; whether they are."""
    try:
        for file, size, sum in (
            (path, state["tokens"] * dtype.itemsize, state["crc32"]),
            (path.with_name(f"{path.name}.ends"), state["documents"] * 8, state["ends_crc32"]),
        ):
            if file.stat().st_size < size:
                return False
            with file.open("r+b") as opened:
                opened.truncate(size)
                found = 0
                while data := opened.read(1 << 24):
                    found = zlib.crc32(data, found)
            if found != sum:
                return False
    except (OSError, KeyError, TypeError):
        return False
    return True
