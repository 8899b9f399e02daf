"""Errors that a user can act on. Each message is one line: what is wrong, where, and what would be right.

The command line prints the message without a traceback and exits with ``exit_code``.
"""

import difflib
from collections.abc import Iterable


class FactoryError(Exception):
    """A run failed for a reason that its message explains."""

    exit_code = 1
    stops_run = False


class UsageError(FactoryError):
    """A flag, recipe key or combination of settings that cannot work."""

    exit_code = 2


class DataError(FactoryError):
    """A file, dataset or model that is missing, damaged or does not fit."""

    exit_code = 3


class LinkError(DataError):
    """A link or special file inside a folder, where a file or folder itself belongs: the fault of no shard."""

    stops_run = True


class StoreError(FactoryError):
    """A folder or object store that keeps failing, which is the fault of no shard; mended, the same command resumes."""


class StalledError(StoreError):
    """A store from which nothing arrives any more."""

    exit_code = 3


class GoneError(StoreError):
    """The folder that a command works in was moved, deleted or replaced: there is nothing left to write to."""

    stops_run = True


class NumericsError(DataError):
    """Numbers that leave the range of their type: other shards of the plan would meet the same, so the run stops."""

    stops_run = True


class Interrupted(FactoryError):
    """Stopped on request; the same command resumes."""

    exit_code = 130


def check_utf8(text: str) -> str:
    """``text``. Raises UsageError where it is not UTF-8, which neither stores nor JSON can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{text.encode(errors='backslashreplace').decode()}: this name is not UTF-8") from None
    return text


def suggest(word: str, known: Iterable[str], most: int = 12) -> str:
    """What ``word`` was meant to be: ``did you mean …?`` where something is near, else the names that there are.

    >>> suggest("resnet81", ["resnet8", "vgg11"]), suggest("x", ["resnet8", "vgg11"])
    ('did you mean resnet8?', 'there are: resnet8, vgg11')
    """
    names = [*known]
    folded = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(word.lower(), folded, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(folded[name] for name in near)}?"
    return f"there are: {', '.join(names[:most])}" + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """The first line of what ``error`` says; the name of its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException, limit: int = 300) -> str:
    """What ``error`` says, in one line of at most ``limit`` characters; the name of its type if it says nothing."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:limit]


def plain(value: object) -> str:
    """``value`` without what could steer a terminal: control and bidirectional marks become ``\\x1b``-style escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))
