"""Tokenization by several processes.

A worker is this module run by a fresh interpreter; it gets the tokenizer and the options, then
lists of records, and answers each with a chunk, all pickled through its pipes. `multiprocessing`
would import the user's own script again, which may not guard its calls.
"""

import os
import pickle
import queue
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, TypeVar

from jaxtune.data.chunks import make_chunk
from jaxtune.data.examples import Example
from jaxtune.data.rows import BadRow
from jaxtune.data.table import Chunk
from jaxtune.data.tokenize import Chat, chat_of
from jaxtune.errors import DataError
from jaxtune.schema import Data

T = TypeVar("T")

BATCH = 512  # records tokenized together
ALONE = 16  # batches before workers are worth their start of a few seconds

LOST = (
    "a process that tokenizes has ended by itself, perhaps for want of memory - set data.workers "
    "lower"
)


def make_chunks(records: Iterator[Example | BadRow], tokenizer: Any, cfg: Data) -> Iterator[Chunk]:
    """Tokenizes records in order, with `cfg.workers` processes once there are many."""
    chat = chat_of(tokenizer)
    batches = batches_of(records)
    for _, batch in zip(range(ALONE), batches, strict=False):
        yield make_chunk(batch, chat, cfg)
    first = next(batches, None)
    if first is None:
        return
    count = cfg.workers or os.cpu_count() or 1
    with ExitStack() as stack:
        idle: queue.Queue[subprocess.Popen[bytes]] = queue.Queue()
        for _ in range(count):
            worker = _started()
            stack.callback(_end, worker)
            _send(worker, (tokenizer, cfg))
            idle.put(worker)
        pool = ThreadPoolExecutor(count)
        stack.callback(pool.shutdown, cancel_futures=True)
        waiting: deque[Future[Chunk]] = deque([pool.submit(_ask, idle, first)])
        for batch in batches:
            waiting.append(pool.submit(_ask, idle, batch))
            if len(waiting) > 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def batches_of(records: Iterator[T]) -> Iterator[list[T]]:
    """Lists of `BATCH` records; the last one may be shorter, or empty."""
    batch: list[T] = []
    for record in records:
        batch.append(record)
        if len(batch) == BATCH:
            yield batch
            batch = []
    yield batch


def _started() -> subprocess.Popen[bytes]:
    """A worker, which ends when its input does."""
    return subprocess.Popen(
        [sys.executable, "-c", "from jaxtune.data import workers; workers.work()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"},
        start_new_session=True,  # Ctrl-C is for the process that asked
    )


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    worker.communicate()


def _ask(idle: "queue.Queue[subprocess.Popen[bytes]]", records: list[Example | BadRow]) -> Chunk:
    worker = idle.get()
    try:
        _send(worker, records)
        assert worker.stdout is not None
        answer = pickle.load(worker.stdout)
    except (EOFError, pickle.UnpicklingError) as error:
        raise DataError(LOST) from error
    finally:
        idle.put(worker)
    if isinstance(answer, Exception):
        raise answer
    return answer


def _send(worker: subprocess.Popen[bytes], value: Any) -> None:
    assert worker.stdin is not None
    try:
        pickle.dump(value, worker.stdin, pickle.HIGHEST_PROTOCOL)
        worker.stdin.flush()
    except BrokenPipeError as error:
        raise DataError(LOST) from error


def work() -> None:
    """What a worker does: answers lists of records with chunks until nobody asks.

    What goes wrong with a list is its answer, an exception.
    """
    asked, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    tokenizer, cfg = pickle.load(asked)
    chat = chat_of(tokenizer)
    try:
        while True:
            answers.write(_answer(pickle.load(asked), chat, cfg))
            answers.flush()
    except (EOFError, BrokenPipeError):
        return


def _answer(records: list[Example | BadRow], chat: Chat, cfg: Data) -> bytes:
    """The chunk of some records, or the exception in its place, pickled."""
    try:
        return pickle.dumps(make_chunk(records, chat, cfg), pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # raised again by the process that asked
        error.add_note(f"in a process that tokenizes: {traceback.format_exc()}")
        try:
            answer = pickle.dumps(error)
            pickle.loads(answer)
        except Exception:  # not every exception can be sent
            answer = pickle.dumps(RuntimeError(traceback.format_exc()))
        return answer
