"""Progress of long commands on stderr: a bar where it is a terminal, a line now and then where it is a log file."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from pipeline.text import duration, plain

LINE_SECONDS = 30.0

OnProgress = Callable[[float, float, str], None]  # (done, total, short note)


@contextmanager
def progress(title: str, stream: TextIO | None = None, quiet: bool = False) -> Iterator[OnProgress]:
    """A callable ``(done, total, note)`` that shows where ``title`` stands; cheap to call often."""
    stream = stream or sys.stderr
    if quiet:
        yield _nothing
    elif stream.isatty():
        yield from _bar(title, stream)
    else:
        lines = Lines(title, stream)
        yield lines
        lines.finish()


def _nothing(done: float, total: float, note: str = "") -> None:
    """Shows nothing."""


def say(line: str) -> None:
    """A line for people, on stderr so that stdout holds results only."""
    print(plain(line), file=sys.stderr, flush=True)


class Lines:
    """One line at the start, at the end, and every ``LINE_SECONDS`` between them."""

    def __init__(self, title: str, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.title, self.stream, self.clock = title, stream, clock
        self.started = clock()
        self.first: float | None = None  # what was done before this run must not count as speed
        self.printed_at = float("-inf")
        self.last = self.printed = ""

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """Print a line if one is due."""
        now = self.clock()
        if self.first is None:
            self.first = done
        speed = (done - self.first) / (now - self.started) if now > self.started else 0.0
        left = f"{duration((total - done) / speed)} left" if speed > 0 and done < total else ""
        self.last = f"{self.title}: " + ", ".join(p for p in (f"{done:.4g}/{total:.4g}", note, left) if p)
        if now - self.printed_at >= LINE_SECONDS:
            self.printed_at = now
            self._print()

    def finish(self) -> None:
        """Print where it ended, unless the last line said so."""
        if self.last != self.printed:
            self._print()

    def _print(self) -> None:
        print(plain(self.last), file=self.stream, flush=True)
        self.printed = self.last


def _bar(title: str, stream: TextIO) -> Iterator[OnProgress]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(file=stream), transient=False) as shown:
        task = shown.add_task(escape(title), total=None, note="")

        def update(done: float, total: float, note: str = "") -> None:
            shown.update(task, completed=done, total=total, note=escape(plain(note)))

        yield update
