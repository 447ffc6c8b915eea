"""Items that are made while the trainer computes: a thread stays a little ahead of the one that reads.

Only the making moves to the thread. Whoever reads gets the same items in the same order, and counts for itself how far
it has come: what lies ready and was never read is simply made again after a stop. A thread is enough, since what takes
long (tokenizing, reading, decompressing) is done by native code that lets other threads run.
"""

import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

PATIENCE = 0.1
"""Seconds after which a thread that waits for room looks whether anybody still reads."""
FAREWELL = 5.0
"""Seconds to wait for the thread when nobody reads any more: it may be in the middle of a slow download."""


class _End:
    """The last thing in the queue: there are no more items, or making the next one failed."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def _fill(items: Iterator[Any], ready: "queue.Queue[Any]", stop: threading.Event) -> None:
    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=PATIENCE)
                return True
            except queue.Full:
                pass
        return False

    end = _End()
    try:
        for item in items:
            if not put(item):
                break
    except BaseException as error:  # it belongs to the reader, whatever it is
        end = _End(error)
    put(end)
    if hasattr(items, "close"):
        items.close()


def _shut(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join(FAREWELL)


class Ahead(Generic[T]):
    """``items``, up to ``depth`` of which lie ready and one more is being made, by a thread that alone reads them.

    An error of the thread is raised where the item would have come. The thread ends with ``close``, with this object,
    or with the process.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._ready: queue.Queue[Any] = queue.Queue(depth)
        self._end: _End | None = None
        stop = threading.Event()
        # The thread must not hold this object, or it would never be collected.
        thread = threading.Thread(target=_fill, args=(items, self._ready, stop), daemon=True, name="bitnet-ahead")
        self.close = weakref.finalize(self, _shut, stop, thread)
        thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self.close.alive or self._end is not None:
            raise StopIteration
        item = self._ready.get()
        if not isinstance(item, _End):
            return item  # type: ignore[no-any-return]
        self._end = item
        self.close()
        if item.error is not None:
            raise item.error
        raise StopIteration


class Feed(Generic[T]):
    """What a loader reads from: the items of one source after another, and how long it has waited for them."""

    def __init__(self, depth: int) -> None:
        """``depth`` items are kept ready by a thread; 0 makes each when it is asked for."""
        self.depth = depth
        self.waited = 0.0
        """Seconds spent in waiting for items, or in making them."""
        self._ahead: Ahead[T] | None = None

    def over(self, items: Iterator[T]) -> Iterator[T]:
        """``items``; the thread of those before has ended then, and that of these ends with the iterator."""
        self.close()
        source = items
        if self.depth:
            source = self._ahead = Ahead(items, self.depth)
        return self._timed(source)

    def _timed(self, source: Iterator[T]) -> Iterator[T]:
        try:
            while True:
                started = time.monotonic()
                try:
                    item = next(source)
                except StopIteration:
                    return
                finally:
                    self.waited += time.monotonic() - started
                yield item
        finally:
            if isinstance(source, Ahead):
                source.close()

    def close(self) -> None:
        """End the thread; what reads then finds that there is no more."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
