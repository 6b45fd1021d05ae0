"""Items of an iterator, computed ahead in a background thread."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")


class _End:
    """Put in the queue after the last item; holds what the producer raised, if anything."""

    def __init__(self, error: BaseException | None):
        self.error = error


def ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Yields `items`, up to `depth` of them ready before they are asked for; 0: without a thread.

    The thread ends when the iterator is closed or forgotten.
    """
    if depth == 0:
        yield from items
        return
    ready: queue.Queue[T | _End] = queue.Queue(depth)
    closed = threading.Event()

    def put(item: T | _End) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                put(item)
                if closed.is_set():
                    return
            put(_End(None))
        except BaseException as error:  # raised again in the consumer's thread
            put(_End(error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        closed.set()
        thread.join()
