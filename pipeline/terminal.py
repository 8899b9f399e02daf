"""What people see: reports as lines or as JSON, sizes and times in short, progress as a bar or as lines of a log.

Nothing printed here can steer a terminal: class names, prompts and errors come from files that others made.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TextIO

from manifests.checked_json import dump_json


def show(result: Any, as_json: bool = False, lines: Iterable[str] | None = None) -> None:
    """Print what a command found on stdout: ``lines`` (default: the result's own), or one JSON document of its fields
    (its ``to_dict()``, if it has one). Whatever could steer a terminal is escaped."""
    if as_json:
        values = (
            result.to_dict() if hasattr(result, "to_dict") else result if isinstance(result, dict) else asdict(result)
        )
        text = dump_json(values, indent=1, ensure_ascii=False)
        print("".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in text))
        return
    for block in result.lines() if lines is None else lines:
        for line in block.removesuffix("\n").split("\n"):
            print(plain(line))


def table(widths: Sequence[int], *rows: Sequence[object]) -> Iterator[str]:
    """Rows as lines: the first cell to the left and cut to its width, the others to the right, None as a dash.

    >>> list(table((8, 6, 6), ("class", "rows", "kept"), ("zero", 12, None)))
    ['class     rows  kept', 'zero        12     –']
    """
    for first, *rest in rows:
        cells = ("–" if cell is None else plain(cell) for cell in rest)
        right = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        yield f"{plain(first)[: widths[0]]:<{widths[0]}}{right}"


def pairs(width: int, *entries: tuple[str, str | None]) -> Iterator[str]:
    """``key   value`` lines, values below each other; an entry without a value is left out."""
    return (f"{key:<{width}}{plain(value)}" for key, value in entries if value is not None)


def share(value: float | None) -> str | None:
    """A share as a percentage.

    >>> share(0.998), share(None)
    ('99.8%', None)
    """
    return None if value is None else f"{value:.1%}"


def number(value: float | None, digits: int) -> str | None:
    """``value`` with so many digits after the point, None where there is none."""
    return None if value is None else f"{value:.{digits}f}"


def plain(value: object) -> str:
    """``value`` without what could steer a terminal: control and bidirectional marks become ``\\x1b``-style escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 07 min``; ``?`` where unknown.

    >>> duration(42.4), duration(185), duration(7620), duration(float("nan"))
    ('42 s', '3 min 05 s', '2 h 07 min', '?')
    """
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Bytes in decimal units: ``812 B``, ``1.5 MB``.

    >>> size(812), size(1_500_000)
    ('812 B', '1.5 MB')
    """
    return _scaled(count, "B")


def flop(count: float) -> str:
    """Floating point operations: ``812 FLOP``, ``98.2 TFLOP``.

    >>> flop(812), flop(98.2e12), flop(3.1e21)
    ('812 FLOP', '98.2 TFLOP', '3100.0 EFLOP')
    """
    return _scaled(count, "FLOP")


def _scaled(count: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if count < 1000:
            return f"{count:.1f} {prefix}{unit}" if prefix else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} E{unit}"


LINE_SECONDS = 30.0
"""Between two lines of progress in a log."""

OnProgress = Callable[[float, float, str], None]  # (done, total, short note)


@contextmanager
def progress(title: str, stream: TextIO | None = None, quiet: bool = False) -> Iterator[OnProgress]:
    """A callable ``(done, total, note)`` that shows where ``title`` stands; cheap to call often."""
    stream = stream or sys.stderr
    if quiet:
        yield lambda done, total, note: None
    elif stream.isatty():
        yield from _bar(title, stream)
    else:
        lines = Lines(title, stream)
        yield lines
        lines.finish()


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
