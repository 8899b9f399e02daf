"""Files that a user names and others may have written: regular, of bounded size, parsed into plain values.

What lies inside a dataset or run folder goes through :mod:`manifests.storage` instead, which follows no link.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from manifests.checked_json import DEEPEST, is_text
from manifests.errors import UsageError

MAX_SETTINGS = 4 * 2**20
"""Bytes of a settings file: 100,000 class names take half of that."""


def read_regular(path: str | os.PathLike[str], most: int | None = None) -> bytes:
    """The content of a regular file of at most ``most`` bytes; a FIFO or device is not waited for.

    Raises OSError, whose ``strerror`` says in words what is wrong: with a larger or special file or an impossible name,
    too.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
            if os.fstat(file.fileno()).st_size > _MEMORY:
                raise OSError(errno.EFBIG, f"it has more than the {_MEMORY} bytes of this machine's memory", str(path))
            data = file.read() if most is None else file.read(most + 1)
    except MemoryError:
        raise OSError(errno.ENOMEM, "there is not enough memory to read it") from None
    except ValueError:  # a zero byte, or text that no file system can encode
        raise OSError(errno.EINVAL, "this is no name of a file") from None
    if most is not None and len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", os.fspath(path))
    return data


_MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
_UNREAD = ("timestamp", "merge", "value")


class _PlainLoader(yaml.SafeLoader):
    """YAML that means what JSON can say: no dates, sets, bytes, merged mappings, tags or aliases, since a few lines of
    aliases stand for billions of values, and constructors raise whatever Python raises."""

    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(":")[2] not in _UNREAD]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    levels = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        why = None
        if isinstance(event, yaml.AliasEvent):
            why = f"aliases are not read: write out what *{event.anchor} stands for"
        elif event.tag is not None:
            why = f"tags are not read: leave {event.tag} out"
        elif isinstance(event, yaml.ScalarEvent) and not is_text(event.value):
            why = "half of a surrogate pair is no text"
        elif self.levels == DEEPEST:
            why = f"nested more than {DEEPEST} deep"
        if why:
            raise yaml.MarkedYAMLError(problem=why, problem_mark=event.start_mark)
        self.levels += 1
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node


Lines = dict[tuple[str, ...], int]
"""The line of each key, by its path of keys."""


def load_yaml(text: str | bytes, where: str) -> tuple[Any, Lines]:
    """The value of a YAML document, and where its keys are. Raises UsageError where it is broken, says a key twice or
    holds what JSON has no word for; ``where`` names it."""
    lines: Lines = {}
    try:
        loader = _PlainLoader(text if isinstance(text, str) else text.decode("utf-8-sig"))
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
        _mark(node, (), lines)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: 0x_ is a number to YAML
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        why = " ".join(str(getattr(error, "problem", None) or error).split())[:200]
        raise UsageError(f"{place}: not valid YAML: {why}") from None
    return values, lines


def _mark(node: Any, path: tuple[str, ...], lines: Lines) -> None:
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        at = (*path, key.value)
        if at in lines:
            raise yaml.MarkedYAMLError(problem=f"{'.'.join(at)} is given twice", problem_mark=key.start_mark)
        lines[at] = key.start_mark.line + 1
        _mark(value, at, lines)


def load_yaml_file(path: str | Path) -> tuple[Any, Lines]:
    """:func:`load_yaml` of a file. Raises UsageError where it cannot be read, too."""
    try:
        return load_yaml(read_regular(path, MAX_SETTINGS), str(path))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
