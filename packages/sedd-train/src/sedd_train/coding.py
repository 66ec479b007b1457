"""Documents to tokens, on as many processes as the machine has cores for.

One process reads and writes, the others encode: `tokenizers` is as fast as its Rust, and what Python adds to it (lists
of numbers into arrays) is spread over the cores, too. The order is the text's, however many processes there are.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sedd_train import coding_worker
from sedd_train.tokenizers import pieces

__all__ = ["Coded", "coded", "cores"]

BATCH = 1 << 20  # characters
ALONE = 8  # batches that this process encodes itself, before others do
AHEAD = 2  # of these, as many as it encodes while the others start
Batch = tuple[list[str], list[bool]]


@dataclass(frozen=True)
class Coded:
    """Some of the text in tokens.

    Attributes:
        flat: (tokens,).
        ends: where in them each document ends that ends there, (documents,) int64: the place after its last token.
        pieces: of how many pieces it is made: see `coded`.
        characters: of text.
        size: of that text in bytes of UTF-8.
    """

    flat: NDArray[Any]
    ends: NDArray[np.int64]
    pieces: int
    characters: int
    size: int


def coded(
    texts: Iterable[str], coder: Any, dtype: np.dtype[Any], *, skip: int = 0, processes: int | None = None
) -> Iterator[Coded]:
    """The tokens of documents, one after another, an end-of-text token after each.

    Args:
        texts: the documents; long ones are cut into pieces, see `tokenizers.pieces`.
        coder: a fast tokenizer of transformers.
        dtype: of the tokens.
        skip: pieces to leave out at the beginning, which were coded before.
        processes: how many encode; one for each core unless given; 0: this one alone.

    Raises:
        ValueError: the text has what the tokenizer cannot write.
        OSError: one of the processes was killed.
    """
    description, end = coder.backend_tokenizer.to_str(), coder.eos_token_id
    processes = cores() if processes is None else processes
    batches = _batches(texts, skip)
    tokenizer = coding_worker.plain(description)
    with ExitStack() as held:
        idle = None
        for number, batch in enumerate(islice(batches, ALONE if processes else None)):
            if processes and number == max(0, ALONE - AHEAD):
                idle = held.enter_context(_workers(processes, description))
            try:
                flat, sizes = coding_worker.encode(tokenizer, *batch, end, dtype.str)
            except Exception as error:  # tokenizers raises no other type
                raise _unwritable(str(error), batch, coder) from error
            yield _coded(batch, flat, sizes)
        following = next(batches, None)
        if following is None:
            return
        idle = idle or held.enter_context(_workers(processes, description))
        threads = held.enter_context(ThreadPoolExecutor(processes))
        coming: deque[tuple[Batch, Future[Any]]] = deque()
        while following or coming:
            while following and len(coming) < 2 * processes:
                coming.append((following, threads.submit(_ask, idle, (*following, end, dtype.str))))
                following = next(batches, None)
            batch, future = coming.popleft()
            answer = future.result()
            if isinstance(answer, str):
                raise _unwritable(answer, batch, coder)
            yield _coded(batch, *answer)


def cores() -> int:
    """How many processors this process may use."""
    with suppress(AttributeError):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _batches(texts: Iterable[str], skip: int) -> Iterator[Batch]:
    parts, last, size = list[str](), list[bool](), 0
    for text in texts:
        cut = list(pieces(text)) or [""]
        for number, piece in enumerate(cut, 1):
            if skip:
                skip -= 1
                continue
            parts.append(piece)
            last.append(number == len(cut))
            size += len(piece)
            if size >= BATCH or len(parts) == 1000:
                yield parts, last
                parts, last, size = [], [], 0
    if parts:
        yield parts, last


def _coded(batch: Batch, flat: NDArray[Any], sizes: NDArray[np.int64]) -> Coded:
    parts, last = batch
    ends = sizes.cumsum()[np.asarray(last, bool)]
    size = sum(len(part.encode("utf-8", "surrogatepass")) for part in parts)
    return Coded(flat, ends, len(parts), sum(map(len, parts)), size)


def _unwritable(error: str, batch: Batch, coder: Any) -> ValueError:
    vocabulary = coder.get_vocab()
    odd: set[str] = set()
    if all(len(token) == 1 or token in coder.all_special_tokens for token in vocabulary):  # characters
        odd = {character for part in batch[0] for character in part if character not in vocabulary}
    which = f": {', '.join(map(repr, sorted(odd)[:10]))}" if odd else f" ({error})"
    return ValueError(f"the text has what the tokenizer cannot write{which}")


# Processes


@contextmanager
def _workers(count: int, description: str) -> Iterator[queue.SimpleQueue[subprocess.Popen[bytes]]]:
    """Processes that encode, those that have nothing to do: each as soon as it has started, which none waits for."""
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
    environment = os.environ | {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-P", str(Path(coding_worker.__file__))]  # -P: beside it lie modules with common names
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) for _ in range(count)
    ]
    threads = ThreadPoolExecutor(count)
    try:
        for worker in started:
            threads.submit(_describe, worker, description, idle)
        yield idle
    finally:
        for worker in started:
            worker.kill()
        threads.shutdown()
        for worker in started:
            worker.communicate()


def _describe(worker: subprocess.Popen[bytes], description: str, idle: queue.SimpleQueue[Any]) -> None:
    """Tell a process its tokenizer, which is more than a pipe holds: it is written when the process reads."""
    assert worker.stdin is not None
    with suppress(OSError):  # it was killed, which the first to ask it will find
        pickle.dump(description, worker.stdin, pickle.HIGHEST_PROTOCOL)
        worker.stdin.flush()
    idle.put(worker)


def _ask(idle: queue.SimpleQueue[subprocess.Popen[bytes]], batch: Any) -> Any:
    worker = idle.get()
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        pickle.dump(batch, worker.stdin, pickle.HIGHEST_PROTOCOL)
        worker.stdin.flush()
        return pickle.load(worker.stdout)
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise OSError(
            f"a process that tokenised ended (exit code {worker.poll()}), perhaps for want of memory; what was done "
            "before is kept: start again"
        ) from error
    finally:
        idle.put(worker)
