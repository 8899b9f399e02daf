"""Ctrl-C for long runs: the first SIGINT or SIGTERM drains, the second stops."""

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """Context manager. ``draining`` turns true at the first signal; the second raises ``KeyboardInterrupt`` and sets
    ``stopping``, for loops to look at: an exception raised inside a callback or a finaliser is swallowed there.

    Outside the main thread, where Python takes no handlers, it changes nothing.
    """

    def __init__(self, until: str = "after the running shards") -> None:
        self.draining = self.stopping = False
        self._line = f"\nstopping {until}; once more stops at once (either way the same command resumes)\n".encode()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.draining:
            self.stopping = True
            raise KeyboardInterrupt
        self.draining = True
        with contextlib.suppress(OSError):
            os.write(2, self._line)  # not print: the signal may have interrupted one
