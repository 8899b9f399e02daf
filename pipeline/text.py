"""Text for people: control characters out, sizes and times short. Used wherever stored or foreign text is printed."""

import math


def plain(value: object) -> str:
    """``value`` as text that cannot steer a terminal: control and bidirectional marks become ``\\x1b``-style escapes.

    Class names and prompts come from files that others made, so nothing of them is printed raw.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def plain_block(text: str) -> str:
    """Several lines, each made safe to print."""
    return "\n".join(plain(line) for line in text.splitlines())


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
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def flop(count: float) -> str:
    """Floating point operations: ``812 FLOP``, ``98.2 TFLOP``.

    >>> flop(812), flop(98.2e12), flop(3.1e21)
    ('812 FLOP', '98.2 TFLOP', '3100.0 EFLOP')
    """
    for unit in ("", "k", "M", "G", "T", "P"):
        if count < 1000:
            return f"{count:.0f} FLOP" if not unit else f"{count:.1f} {unit}FLOP"
        count /= 1000
    return f"{count:.1f} EFLOP"
