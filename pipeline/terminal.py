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
from manifests.errors import plain as plain


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


def published_bn(unit: Sequence[float] | None) -> str | None:
    """What a BatchNorm weight of the papers is here (:func:`stages.models.teacher.published_bn_unit`).

    >>> published_bn((160.2, 320.9))
    'a published weight of 1 (Σ of norms) is 160 here for means, 321 for variances'
    """
    if unit is None:
        return None
    means, variances = (f"{value:.3g}" for value in unit)
    return f"a published weight of 1 (Σ of norms) is {means} here for means, {variances} for variances"


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


LINE_SECONDS, BRIEF_SECONDS = 30.0, 10.0
"""Between two lines of progress in a log."""

OnProgress = Callable[[float, float, str], None]  # (done, total, short note)


@contextmanager
def progress(
    title: str, stream: TextIO | None = None, quiet: bool = False, brief: bool = False
) -> Iterator[OnProgress]:
    """A callable ``(done, total, note)`` that shows where ``title`` stands; cheap to call often. ``total`` 0: not
    known. ``brief``: what mostly ends soon, so that a log gets no line of it before ``BRIEF_SECONDS``."""
    stream = stream or sys.stderr
    if quiet:
        yield lambda done, total, note: None
    elif stream.isatty():
        yield from _bar(title, stream)
    else:
        lines = Lines(title, stream, brief=brief)
        yield lines
        lines.finish()


class Pace:
    """Seconds left at the mean speed so far, whoever shows them. What was done before this run is no speed of its."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._started = clock, clock()
        self._first: float | None = None

    def speed(self, done: float) -> float:
        """Units done in a second, 0 where that is not known."""
        if self._first is None:
            self._first = done
        elapsed = self._clock() - self._started
        return (done - self._first) / elapsed if elapsed > 0 else 0.0

    def left(self, done: float, total: float) -> float | None:
        """Seconds until ``total``; None where that is not known."""
        speed = self.speed(done)
        return (total - done) / speed if speed > 0 and done < total else None


def say(line: str) -> None:
    """A line for people, on stderr so that stdout holds results only."""
    print(plain(line), file=sys.stderr, flush=True)


class Lines:
    """One line at the start, at the end, and every ``LINE_SECONDS`` between them; of what is ``brief`` a first line
    after ``BRIEF_SECONDS``, if it lasts that long."""

    def __init__(
        self,
        title: str,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
        brief: bool = False,
    ) -> None:
        self.title, self.stream, self.clock, self.brief = title, stream, clock, brief
        self.every = BRIEF_SECONDS if brief else LINE_SECONDS
        self.pace = Pace(clock)
        self.printed_at = clock() if brief else float("-inf")
        self.last = self.printed = ""

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """Print a line if one is due."""
        now = self.clock()
        seconds = self.pace.left(done, total)
        left = "" if seconds is None else f"{duration(seconds)} left"
        self.last = f"{self.title}: " + ", ".join(
            p for p in (f"{_count(done)}/{_count(total)}" if total else _count(done), note, left) if p
        )
        if now - self.printed_at >= self.every:
            self.printed_at = now
            self._print()

    def finish(self) -> None:
        """Print where it ended, unless the last line said so."""
        if self.last != self.printed and (self.printed or not self.brief):
            self._print()

    def _print(self) -> None:
        print(plain(self.last), file=self.stream, flush=True)
        self.printed = self.last


def _count(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def _bar(title: str, stream: TextIO) -> Iterator[OnProgress]:
    """A bar with percentage, times and, below it, the note."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.text import Text

    console, pace = Console(file=stream), Pace()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=None))
    numbers = (TextColumn("{task.fields[count]}"), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    shown = Progress(*columns, *numbers, console=console)
    task = shown.add_task(title, total=None, count="", left="")
    note_line = Text(no_wrap=True, overflow="ellipsis")
    with Live(Group(shown, note_line), console=console, refresh_per_second=4):

        def update(done: float, total: float, note: str = "") -> None:
            seconds = pace.left(done, total)
            count = f"{_count(done)}/{_count(total)}" if total else _count(done)
            left = "" if seconds is None else f"{duration(seconds)} left"
            shown.update(task, completed=done, total=total or None, count=count, left=left)
            note_line.plain = plain(note)

        yield update
