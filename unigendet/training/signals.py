"""A signal as a request: SIGTERM and SIGINT end a run after its present step, with a checkpoint.

The first one is only noted. From then on both have their default effect again, so a second one ends the process at
once, wherever it is, in the middle of a step or of a save (which leaves the last good checkpoint as it is).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """A context manager within which ``received`` becomes the first signal that asks to stop; before, it is None.

    Handlers can be set in a process's main thread only: in another one nothing is caught. A signal that the process
    ignores, as SIGINT in the background, stays ignored. The handlers that were there before are restored at the end.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
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
        self.received = signal.Signals(number)
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        text = f"{self.received.name}: stopping after the present step (a second signal ends the run at once)\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())  # not print, which the signal may have interrupted
