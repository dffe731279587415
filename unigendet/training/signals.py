"""A signal as a request: SIGTERM and SIGINT end a run after its present step, with a checkpoint.

The first one is only noted. One request may come as several signals, to the process and to its group (GNU timeout
does that) or passed on by a parent (make): what comes within ``SAME_REQUEST`` seconds is the same one. A later signal
has its default effect: it ends the process as soon as Python comes to handle it, in the middle of a step or of a save
(which leaves the last good checkpoint as it is).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_REQUEST = 1.0  # seconds


class StopSignals:
    """A context manager within which ``received`` becomes the first signal that asks to stop; before, it is None.

    Handlers can be set in a process's main thread only: in another one nothing is caught. A signal that the process
    ignores, as SIGINT in the background, stays ignored. The handlers that were there before are restored at the end.

    Args:
        clock: the time in seconds, from any beginning.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.received: signal.Signals | None = None
        self._clock, self._since = clock, 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in SIGNALS}
            # None: a handler that is not Python's, which could not be restored.
            self._before = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}
            for number in self._before:
                signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if self._clock() - self._since >= SAME_REQUEST:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.received, self._since = signal.Signals(number), self._clock()
        text = f"{self.received.name}: stopping after the present step (a second signal ends the run at once)\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())  # not print, which the signal may have interrupted
