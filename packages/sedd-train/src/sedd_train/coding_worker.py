"""Text to tokens: the function, and a process that does nothing else and that `sedd_train.coding` starts.

It is started by its path and imports neither torch nor this package: it is there at once and takes little memory.
"""

from __future__ import annotations

import pickle
import signal
import sys
from collections.abc import Sequence
from itertools import chain
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["encode", "plain"]


def plain(description: str) -> Any:
    """A tokenizer of the library tokenizers from its JSON, which writes text as it is.

    Nothing is cut, filled up or framed, and what spells a special token is text.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(description)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(
    tokenizer: Any, pieces: Sequence[str], last: Sequence[bool], end: int | None, dtype: str
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The tokens of pieces of text, (tokens,), and how many each has, (pieces,).

    Args:
        tokenizer: see `plain`.
        pieces: of documents.
        last: whether a document ends with the piece: then the token `end` follows, if there is one.
        end: the end of text.
        dtype: of the tokens.
    """
    coded = [found.ids for found in tokenizer.encode_batch_fast(pieces, add_special_tokens=False)]
    if end is not None:
        for ids, is_last in zip(coded, last, strict=True):
            if is_last:
                ids.append(end)
    sizes = np.fromiter(map(len, coded), np.int64, len(coded))
    return np.fromiter(chain.from_iterable(coded), dtype, int(sizes.sum())), sizes


def serve(asked: IO[bytes], answered: IO[bytes]) -> None:
    """Encode batch after batch, until there are no more."""
    tokenizer = plain(pickle.load(asked))
    while True:
        try:
            batch = pickle.load(asked)
        except EOFError:
            return
        try:
            flat, sizes = encode(tokenizer, *batch)
            answer: Any = (flat, sizes)
        except Exception as error:  # tokenizers raises no other type
            answer = str(error)
        pickle.dump(answer, answered, pickle.HIGHEST_PROTOCOL)
        answered.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the keyboard's, which is meant for the process that started this one
    serve(sys.stdin.buffer, sys.stdout.buffer)
