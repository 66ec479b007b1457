"""What a run was trained on, file by file, kept in its folder: a change is seen when it is continued, and named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sedd_train import checkpoint, distributed, storage, token_cache
from sedd_train.checkpoint import Checkpoint, CheckpointError
from sedd_train.corpora import Texts
from sedd_train.distributed import say
from sedd_train.folders import Part
from sedd_train.recipes import Recipe, read_recipe
from sedd_train.token_cache import Corpus

__all__ = ["DATA", "text_of", "pinned", "saved", "write", "trained_on", "changes", "summary"]

DATA = "data.json"
SHOWN = 30  # lines of a summary


def text_of(
    recipe: Recipe, corpus: Texts | str | None, tokenizer: Any, cache: Path, *, stop: Callable[[], bool]
) -> Corpus:
    """The tokenised corpus of a run, which one process of each machine makes, or finds whole. Collective.

    Args:
        recipe: of the run.
        corpus: in place of the recipe's.
        tokenizer: in place of the recipe's.
        cache: the folder of tokenised text.
        stop: asked now and then whether to leave off.

    Raises:
        ValueError, OSError: as `token_cache.prepare`.
    """

    def make() -> str:
        found = token_cache.prepare(
            *(corpus or recipe.corpus, tokenizer or recipe.tokenizer, cache, say),
            stop=stop,
            **recipe.texts,
        )
        return str(found.folder)

    folder = Path(distributed.by_leader(make, f"corpus {recipe.corpus!r} in tokenizer {recipe.tokenizer!r}"))
    found = token_cache.read(folder)
    if found is None:
        raise OSError(f"the token cache {folder} cannot be read by every process of this machine")
    return found


def pinned(recipe: Recipe, text: Corpus) -> Recipe:
    """The recipe, with the commit of the hub's data set that is trained on: continued, it is that one still."""
    commits = {part.commit for part in text.parts if part.commit}
    return dataclasses.replace(recipe, revision=recipe.revision or (commits.pop() if len(commits) == 1 else ""))


def saved(output: Path, text: Corpus) -> Checkpoint:
    """The checkpoint to continue from.

    Raises:
        CheckpointError: there is none, or it was trained on other text; which files are others is said.
    """
    changed = changes(output, text.parts)
    try:
        found = checkpoint.last(output / "checkpoints", text.fingerprint)
    except CheckpointError as error:
        raise CheckpointError(f"{error}: {changed}" if changed and "other text" in str(error) else str(error)) from None
    if changed:
        say(f"since this run began {changed}; what it is trained and watched on is the same")
    return found


def write(output: Path, text: Corpus) -> None:
    """Keep what a run's text was made of."""
    known = {
        "fingerprint": text.fingerprint,
        "cache": str(text.folder.absolute()),
        "parts": [dataclasses.asdict(part) for part in text.parts],
    }
    storage.write_text(output / DATA, json.dumps(known, indent=1, ensure_ascii=False))


def trained_on(checkpoint: str | Path) -> tuple[Recipe, Path]:
    """The recipe of the run that a checkpoint is of, and the cache of its text: of a run, its export or a step of it.

    Raises:
        ValueError: it does not say.
    """
    given = Path(checkpoint)
    for folder in (given, *given.absolute().parents[:2]):
        if (folder / "recipe.toml").is_file():
            try:
                cache = str(json.loads((folder / DATA).read_text(encoding="utf-8"))["cache"])
            except (OSError, ValueError, KeyError, TypeError):
                cache = ""
            return read_recipe(folder / "recipe.toml"), Path(cache)
    raise ValueError(f"{checkpoint} does not say what it was trained on: name what to measure by --corpus")


def changes(output: Path, parts: Sequence[Part]) -> str:
    """Which files are others than the run in this folder began with, in words; nothing if none is known to be."""
    try:
        known = json.loads((output / DATA).read_text(encoding="utf-8"))
        before = {part["file"]: Part(**part) for part in known["parts"]}
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    now = {part.file: part for part in parts}
    said = [f"{name} is gone" for name in before if name not in now]
    said += [f"{name} is new" for name in now if name not in before]
    said += [
        f"{name} has changed" if now[name].sha256 != part.sha256 else f"{name} is now {now[name].split}"
        for name, part in before.items()
        if name in now and (now[name].sha256, now[name].split) != (part.sha256, part.split)
    ]
    return "; ".join(said[:10]) + ("; ..." if len(said) > 10 else "")


def summary(parts: Sequence[Part], output: Path) -> str:
    """What a run is trained on, a line a file; of many those to be watched and the first, and where others stand."""
    if len(parts) > SHOWN:
        parts = sorted(parts, key=lambda part: (part.split == "train") + 2 * (part.split == "left out"))
    lines = [str(part) for part in parts[:SHOWN]]
    more = [f"and {len(parts) - SHOWN} more, in {output / DATA}"] if len(parts) > SHOWN else []
    return "\n".join(["text:", *(f"  {line}" for line in lines + more)])
