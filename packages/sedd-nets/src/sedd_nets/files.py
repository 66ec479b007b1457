"""The files of a checkpoint: in a folder, or in a repository on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, TypedDict

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

__all__ = ["HubOptions", "Source"]


class HubOptions(TypedDict, total=False):
    """How a repository on the hub is reached; a folder needs none of them.

    Attributes:
        revision: branch, tag or commit; the main branch unless given.
        token: of an account that may read the repository; the one of `hf auth login` unless given, False for none.
        cache_dir: where downloads are kept; the hub's usual place unless given.
        local_files_only: whether to use what is in that cache and ask nobody.
    """

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool


class Source(NamedTuple):
    """A folder, or a repository and how to reach it; the options are those of `HubOptions`."""

    name: str | os.PathLike[str]
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def file(self, *names: str) -> Path:
        """The path of the first of these files that is there, downloaded into the cache if need be.

        Raises:
            FileNotFoundError: neither a folder nor a repository with any of them; the message is about the first.
            ConnectionError: no such folder, and the hub cannot be reached.
        """
        first: OSError | None = None
        for name in names:
            try:
                return self._one(name)
            except (FileNotFoundError, ConnectionError) as error:
                first = first or error
        assert first is not None
        raise first

    def pinned(self, path: Path) -> Source:
        """This source at the commit that `path`, one of its files, belongs to; those that follow are of the same."""
        in_cache = not Path(self.name).is_dir() and path.parent.parent.name == "snapshots"
        return self._replace(revision=path.parent.name) if in_cache else self

    def _one(self, file: str) -> Path:
        folder = Path(self.name)
        if folder.is_dir():
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder} has no {file}: a checkpoint folder holds config.json and weights")
            return folder / file
        name = os.fspath(self.name)
        try:
            return Path(
                hf_hub_download(
                    name,
                    file,
                    revision=self.revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    local_files_only=self.local_files_only,
                )
            )
        except HFValidationError as error:
            raise FileNotFoundError(f"{name!r} is neither a folder nor a name on the Hugging Face hub") from error
        except LocalEntryNotFoundError as error:  # no answer, and the file is not in the cache
            raise _unreachable(name, error) from error
        except EntryNotFoundError as error:
            raise FileNotFoundError(f"{name} on the Hugging Face hub has no {file}") from error
        except RevisionNotFoundError as error:
            raise FileNotFoundError(f"{name} on the Hugging Face hub has no revision {self.revision!r}") from error
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"{name!r} is neither a folder nor a public repository on the Hugging Face hub "
                "(private ones need `hf auth login`, or token=)"
            ) from error
        except (HfHubHTTPError, OSError) as error:
            raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"{name!r} is no folder here, and the Hugging Face hub cannot be reached ({type(error).__name__}). "
        f"Check the network, HF_HUB_OFFLINE and local_files_only, or run `hf download {name} --local-dir FOLDER` on a "
        "machine that reaches the hub and give that FOLDER"
    )
