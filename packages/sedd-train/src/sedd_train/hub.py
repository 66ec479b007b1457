"""Data sets of the Hugging Face hub: which state of one is meant, its splits, and its documents as they come."""

from __future__ import annotations

import functools
import math
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sedd_train.folders import OF_NAME, Part
from sedd_train.rows import Notes, find_column, label_of, why_not

__all__ = ["DataSet", "commit_of"]


@dataclass(frozen=True)
class DataSet:
    """A data set there, loaded when its documents are first asked for.

    Attributes:
        name: OWNER/NAME.
        config: its configuration, or nothing.
        revision: the branch or tag that was asked for, or nothing.
        commit: the state that is meant; nothing where this machine cannot know it.
        streaming: whether it is read as it comes rather than first stored whole.
        column: the column of the text; unless given, the one called like text.
        blank: whether blank rows are documents.
        share: of it that is held out where nothing else is.
        most: documents to be held out, at most.
        label_column: the column of the documents' labels, or nothing.
    """

    name: str
    config: str
    revision: str
    commit: str
    streaming: bool
    column: str
    blank: bool
    share: float
    most: int
    label_column: str = ""
    notes: dict[str, Notes] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    end: list[tuple[str, str]] = field(default_factory=list)  # what is held out of a stream, once it has been read

    @functools.cached_property
    def data(self) -> Any:
        """All its splits."""
        import datasets

        revision = self.commit or self.revision or None
        try:
            loaded = datasets.load_dataset(self.name, self.config or None, revision=revision, streaming=self.streaming)
        except Exception as error:  # the hub's client raises some dozen types, one of them for each way to be offline
            raise ConnectionError(
                f"the data set {self.name!r} could not be had from the Hugging Face hub ({type(error).__name__}: "
                f"{str(error).splitlines()[0][:200] if str(error) else 'no message'}). Either connect this machine (a "
                "proxy: HTTPS_PROXY, a mirror: HF_ENDPOINT); or download it elsewhere with "
                f"`hf download --repo-type dataset {self.name}` and copy the folder ~/.cache/huggingface here; or "
                "train on your own text with --corpus FOLDER; or on the built-in corpus with --recipe tiny"
            ) from error
        for split in loaded.values():
            for file in getattr(split, "cache_files", []):
                other = [part for part in Path(file["filename"]).parts if re.fullmatch("[0-9a-f]{40}", part)]
                if self.commit and other and self.commit not in other:
                    raise ConnectionError(
                        f"the data set {self.name!r} is at commit {self.commit}, and this machine, which cannot reach "
                        f"the hub, has only {other[0]}: give --revision {other[0]}, or connect it"
                    )
        return loaded

    @property
    def splits(self) -> dict[str, Any]:
        """Its splits by the names that they have here: train, validation, test."""
        return {OF_NAME.get(str(name).lower(), str(name)): data for name, data in self.data.items()}

    def documents(self, wanted: str, *, whole: bool = False) -> Iterator[str]:
        """The documents of `labelled`, which see."""
        return (text for text, _ in self.labelled(wanted, whole=whole))

    def labelled(self, wanted: str, *, whole: bool = False) -> Iterator[tuple[str, str]]:
        """The documents to train on, to watch (validation) or to measure (test), each with its label, "" for none.

        Args:
            wanted: which.
            whole: whether nothing of the training split is held out, even if there is no other.

        Raises:
            ValueError: there is no text to train on, no column of text or none of labels.
            OSError: reading them failed.
        """
        splits = self.splits
        others = [name for name in ("validation", "test") if name in splits]
        if wanted == "train" and "train" not in splits:
            raise ValueError(f"corpus {self.name} has no text to train on, only to measure: {', '.join(splits)}")
        if wanted == "train" and (others or whole):
            yield from self._texts("train", splits["train"])
        elif others:
            split = wanted if wanted in splits else others[0]
            yield from self._texts(split, splits[split])
        elif "train" not in splits:
            raise ValueError(f"corpus {self.name} has no split train, validation or test: {', '.join(splits)}")
        elif not hasattr(splits["train"], "__len__"):
            texts = self._but_the_end(self._texts("train", splits["train"]))
            if wanted == "train":
                yield from texts
            else:
                if not self.end:
                    deque(texts, maxlen=0)
                yield from self.end
        else:
            count = len(splits["train"])
            cut = count - self._held_out_of(count)
            rows = range(cut) if wanted == "train" else range(cut, count)
            yield from self._texts("train" if wanted == "train" else "validation", splits["train"].select(rows))

    def parts(self) -> list[Part]:
        """What has been read of it, as a summary names it."""
        name = f"{self.name}{f':{self.config}' if self.config else ''}@{self.commit or self.revision or 'unknown'}"
        return [
            Part(
                *(f"{name}/{split}", split, "data set"),
                column=notes.column,
                documents=self.counts[split],
                left_out=str(notes),
                commit=self.commit,
            )
            for split, notes in self.notes.items()
        ]

    def _texts(self, split: str, rows: Any) -> Iterator[tuple[str, str]]:
        notes = self.notes[split] = Notes()
        self.counts[split] = 0
        word = getattr((getattr(rows, "features", None) or {}).get(self.label_column), "int2str", None)
        number, iterator = 0, iter(rows)
        while True:
            try:
                row = next(iterator)
            except StopIteration:
                return
            except Exception as error:  # a stream may break off in as many ways as there are places to read from
                raise OSError(
                    f"corpus {self.name} could not be read on after {number} rows ({type(error).__name__}: {error}): "
                    "try again, or without streaming"
                ) from error
            number += 1
            if not notes.column:
                notes.column = find_column(list(row), self.column, f"corpus {self.name}")
                if self.label_column:
                    find_column(list(row), self.label_column, f"corpus {self.name}")
            value, label = row.get(notes.column), row.get(self.label_column)
            why = why_not(value, self.blank)
            if why:
                notes.add(why, number)
            else:
                self.counts[split] += 1
                if word and isinstance(label, int):
                    label = word(label) if label >= 0 else None  # -1: not said
                yield value, label_of(label, self.label_column, f"corpus {self.name}")

    def _held_out_of(self, count: int) -> int:
        return min(self.most, math.ceil(count * self.share))

    def _but_the_end(self, texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """All but the held-out end of texts whose number is not known before; that end is kept for later."""
        last: deque[tuple[str, str]] = deque()
        count = 0
        for text in texts:
            count += 1
            last.append(text)
            if len(last) > self.most:
                yield last.popleft()
        while len(last) > self._held_out_of(count):
            yield last.popleft()
        self.end[:] = last


def commit_of(name: str, revision: str = "") -> str:
    """The commit that a branch or tag of a data set is at, as the hub says, or else as this machine last heard.

    Args:
        name: OWNER/NAME.
        revision: a branch, a tag or a commit; the main branch unless given.

    Returns:
        40 hexadecimal digits; nothing where neither the hub nor this machine knows.
    """
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi, constants

    try:
        return str(HfApi().dataset_info(name, revision=revision or None, timeout=15).sha)
    except Exception:  # offline, by whatever name: what cannot be had at all is said when it is loaded
        ref = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "refs" / (revision or "main")
        return ref.read_text().strip() if ref.is_file() else _loaded(name)


def _loaded(name: str) -> str:
    """The one commit whose rows lie ready on this machine."""
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___").lower()
    found = {path.name for path in folder.glob("*/*/*") if re.fullmatch("[0-9a-f]{40}", path.name)}
    return found.pop() if len(found) == 1 else ""
