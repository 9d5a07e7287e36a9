"""Items made ahead by a thread."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class _Failure:
    error: BaseException


class _End:
    """Marker after the last item."""


class Prefetch(Generic[Item]):
    """Iterator over items made by a thread; the thread's error is raised here, with its traceback.

    The thread ends with the items, with an error, with `close`, and when this object is no longer in use.

    Args:
        items: Source of the items; it must not refer to this object, or to its holder.
        depth: Maximum number of ready items, at least 1.

    """

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        assert depth > 0, "nothing can be made ahead"
        self._ready: queue.SimpleQueue[Item | _Failure | _End] = queue.SimpleQueue()
        # A semaphore made of a queue, as threading's is Python code and takes several times as long.
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(depth):
            self._room.put(None)
        stop = threading.Event()
        arguments = (items, self._ready, self._room, stop)
        thread = threading.Thread(target=_produce, args=arguments, name="prefetch", daemon=True)
        # Also at the exit of the interpreter, which must not find the thread in compiled code.
        self._end = weakref.finalize(self, _finish, stop, self._room, thread)
        thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if not self._end.alive:
            raise StopIteration
        item = self._ready.get()
        self._room.put(None)
        if isinstance(item, _Failure):
            self.close()
            raise item.error
        if isinstance(item, _End):
            self.close()
            raise StopIteration
        return item

    def close(self) -> None:
        """End the thread after its current item; drop the ready items."""
        self._end()


def _produce(
    items: Iterator[Item],
    ready: queue.SimpleQueue[Item | _Failure | _End],
    room: queue.SimpleQueue[None],
    stop: threading.Event,
) -> None:
    try:
        while True:
            room.get()
            if stop.is_set():
                return
            ready.put(next(items))
    except StopIteration:
        ready.put(_End())
    except BaseException as error:  # noqa: BLE001 - whatever it is, the consumer must hear of it
        ready.put(_Failure(error))


def _finish(stop: threading.Event, room: queue.SimpleQueue[None], thread: threading.Thread) -> None:
    stop.set()
    room.put(None)
    # A garbage collection may run in the thread itself.
    if thread is not threading.current_thread():
        thread.join()
