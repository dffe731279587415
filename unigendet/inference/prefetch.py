"""Work done ahead of whoever consumes it, in threads, in order, and never more than a fixed number of results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int, threads: int
) -> Iterator[Result]:
    """``map(function, items)``, with up to ``ahead`` results made or being made before they are asked for.

    ``items`` is read in the consumer's thread. An exception of ``function`` is raised in its item's place. Closing the
    iterator, or an exception, drops what has not begun and waits for what has.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="unigendet-ahead")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
