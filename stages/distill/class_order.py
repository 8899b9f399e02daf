"""Which of the model's classes a label means: one rule for every kind of labeled data.

- Names (folders, text, the names that Parquet metadata or a manifest lists) are matched to the model's class names;
  capitals, spaces and underscores may differ where that leaves one class. A name that the model lacks is an error.
- Names that are all whole numbers are class numbers (folder ``10`` is class 10), unless the model's names are numbers.
- Numbers without names are class numbers.
- A model without names of its own (``class 0`` …, ``LABEL_0`` …) takes a list of as many names in its order, and
  folders in their sorted order, as torchvision's ImageFolder does.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from manifests.errors import DataError

Label = int | str
BY_NAME = "labels are matched to the model's classes by name"
BY_NUMBER = "labels are numbers without names, read as the model's class numbers"
NAMED_BY_NUMBER = "labels are named by numbers, read as the model's class numbers"
NAME_THEM = (
    "to name the model's classes as the data does, write a YAML file with name: MODEL and class_names: [...] in the "
    "model's order, and give it in place of the model"
)
_NUMBER = re.compile(r"[0-9]+")
_NUMERIC = re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|nan|inf|infinity)", re.IGNORECASE)
SHOWN = 60
"""Characters of a name in an error."""


@dataclass(frozen=True)
class NamedNumber:
    """A label that the data stores as a class number with the name of the class."""

    number: int
    name: str


@dataclass(frozen=True)
class ClassOrder:
    """``index``: the model's class number of every label; ``line``: how it was found, for people."""

    index: Mapping[Any, int]
    line: str


def read_label(value: Any) -> Label:
    """A label as data stores it: a whole number (1.0 is one) or a name. Raises ValueError for anything else.

    >>> read_label(1.0), read_label(b" cat ")
    (1, 'cat')
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8")
    if isinstance(value, str) and value.strip():
        return value.strip()
    if not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
        return int(value)
    raise ValueError(f"label {_short(value)} is neither a whole number nor a class name")


def read_text_label(text: bytes) -> Label:
    """A label in a file that holds it alone (``KEY.cls``): whatever is a number there is no name.

    >>> read_text_label(b"10"), read_text_label(b"1.0"), read_text_label(b"cat")
    (10, 1, 'cat')
    """
    label = read_label(text)
    if not isinstance(label, str) or not _NUMERIC.fullmatch(label):
        return label
    return read_label(int(label) if label.lstrip("+-").isdecimal() else float(label))


def class_order(
    labels: Mapping[Any, str],
    class_names: tuple[str, ...],
    where: str,
    listed: tuple[str, ...] = (),
    folders: bool = False,
) -> ClassOrder:
    """What ``labels`` mean to a model of ``class_names``.

    ``labels``: every distinct label, with the first place that has it; ``listed``: the names of the data's numbers, by
    number, where it has them; ``folders``: the labels are the names of sub-folders. Raises DataError naming what does
    not fit, and what would.
    """
    numbers = {label: place for label, place in labels.items() if isinstance(label, int)}
    names = {label: place for label, place in labels.items() if isinstance(label, str)}
    if numbers and names:
        raise DataError(
            f"{where} mixes labels that are numbers ({_first(numbers)}) and labels that are names ({_first(names)})"
        )
    if names:
        return _of_names(names, class_names, where, folders)
    if listed:
        return _of_listed(numbers, class_names, where, listed)
    return _of_numbers(numbers, class_names, where, BY_NUMBER)


class GrowingClassOrder:
    """:func:`class_order` of labels that come one by one; all must be of the first one's kind.

    A number may come with its name, as in a dataset's shards: the name decides, unless it or the model's is only a
    number's; the number tells classes of one name apart.
    """

    def __init__(self, class_names: tuple[str, ...], where: str) -> None:
        self.line = ""
        self._class_names, self._where = class_names, where
        self._index: dict[Label | NamedNumber, int] = {}

    def add(self, label: Label | NamedNumber, place: str) -> int:
        """The model's class number of ``label``. Raises DataError as :func:`class_order` does."""
        if label not in self._index:
            self._index[label], line = self._settled(label, place)
            if self.line and line != self.line:
                raise DataError(f"{self._where} mixes labels that are numbers and labels that are names ({place})")
            self.line = line
        return self._index[label]

    def _settled(self, label: Label | NamedNumber, place: str) -> tuple[int, str]:
        names = self._class_names
        if isinstance(label, NamedNumber):
            number, name = label.number, label.name
            if not is_unnamed(names) and 0 <= number < len(names) and _key(names[number]) == _key(name):
                return number, BY_NAME
            label = number if is_unnamed(names) or _key(name) in _placeholders(number) else name
        order = class_order({label: place}, names, self._where)
        return order.index[label], order.line


@lru_cache(8)
def is_unnamed(class_names: tuple[str, ...]) -> bool:
    """Whether ``class_names`` only count: ``class 0`` …, as the factory fills in, or ``LABEL_0`` …, as transformers.

    >>> is_unnamed(("class 0", "class 1")), is_unnamed(("cat", "class 1"))
    (True, False)
    """
    return all(_key(name) in _placeholders(number) for number, name in enumerate(class_names))


def _of_numbers(
    labels: Mapping[Any, str], class_names: tuple[str, ...], where: str, line: str, mend: str = ""
) -> ClassOrder:
    for label, place in labels.items():
        if not 0 <= label < len(class_names):
            last = len(class_names) - 1
            raise DataError(f"{where}: {place} has label {_short(label)}, but the model has classes 0…{last}{mend}")
    return ClassOrder({label: label for label in labels}, f"{line} ({_numbered(class_names)})")


def _of_listed(
    labels: Mapping[int, str], class_names: tuple[str, ...], where: str, listed: tuple[str, ...]
) -> ClassOrder:
    for label, place in labels.items():
        if not 0 <= label < len(listed):
            raise DataError(f"{where}: {place} has label {label}, but the data names classes 0…{len(listed) - 1}")
    same = {label: label for label in labels}
    if [*map(_key, listed)] == [*map(_key, class_names)]:
        return ClassOrder(same, BY_NAME)
    names = {listed[label]: place for label, place in labels.items()}
    if all(map(_NUMBER.fullmatch, listed)):  # of folders, say, which are numbered in the order of text: 0, 1, 10, 2
        names = dict.fromkeys(listed, "its list of classes")
    elif is_unnamed(class_names) or is_unnamed(listed):
        whose, seen = ("model", listed) if is_unnamed(class_names) else ("data", class_names)
        if len(listed) != len(class_names):
            raise DataError(
                f"{where} has {len(listed)} classes ({_some(listed)}), the model {len(class_names)} "
                f"({_some(class_names)}), and those of the {whose} have no names; {NAME_THEM}"
            )
        line = f"the {whose}'s classes have no names: labels are read as the model's class numbers"
        return ClassOrder(same, f"{line} ({_numbered(seen)})")
    elif len(names) < len(labels):
        twice = next(name for name, count in Counter(listed[label] for label in labels).items() if count > 1)
        raise DataError(f"{where} has several classes called {_some([twice])}, in another order than the model's")
    order = _of_names(names, class_names, where, False)
    return ClassOrder({label: order.index[listed[label]] for label in labels}, order.line)


def _of_names(names: Mapping[str, str], class_names: tuple[str, ...], where: str, folders: bool) -> ClassOrder:
    matches = {name: classes_called(name, class_names) for name in names}
    several = [name for name, classes in matches.items() if len(classes) > 1]
    unknown = [name for name, classes in matches.items() if not classes]
    if several:
        raise DataError(f"{where}: {_some(several)} may be several of the model's classes; {NAME_THEM}")
    if not unknown:
        return ClassOrder({name: classes[0] for name, classes in matches.items()}, BY_NAME)
    if all(map(_NUMBER.fullmatch, names)) and not all(map(_NUMBER.fullmatch, class_names)):
        numbers = {name: _number(name) for name in names}
        if len(set(numbers.values())) < len(numbers):
            raise DataError(f"{where}: several of {_some([*names])} are the same number")
        places = {number: names[name] for name, number in numbers.items()}
        order = _of_numbers(places, class_names, where, NAMED_BY_NUMBER, f"; {NAME_THEM}")
        return ClassOrder({name: order.index[number] for name, number in numbers.items()}, order.line)
    if folders and is_unnamed(class_names) and len(unknown) == len(names) == len(class_names):
        line = f"the model's classes have no names: they are the folders in sorted order ({_numbered(sorted(names))})"
        return ClassOrder({name: number for number, name in enumerate(sorted(names))}, line)
    what = f"{len(names)} sub-folders, of which" if folders else "labels of which"
    has = f"has {len(class_names)} classes without names" if is_unnamed(class_names) else f"knows {_some(class_names)}"
    ids = "; these are WordNet ids, whose sorted order is that of ImageNet's classes" if _are_ids(unknown) else ""
    raise DataError(
        f"{where} has {what} {len(unknown)} name no class of the model: {_some(unknown)} "
        f"({names[unknown[0]]}); the model {has}; {NAME_THEM}{ids}"
    )


def _are_ids(names: Sequence[str]) -> bool:
    return all(re.fullmatch(r"n[0-9]{8}", name) for name in names)


def classes_called(name: str, class_names: tuple[str, ...]) -> tuple[int, ...]:
    """The classes of exactly this name, else those whose names differ only as people write them (:func:`_key`)."""
    exact, alike = _by_name(class_names)
    return exact.get(name) or alike.get(_key(name), ())


@lru_cache(8)
def _by_name(class_names: tuple[str, ...]) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Class numbers by name, and by :func:`_key`."""
    exact: dict[str, tuple[int, ...]] = {}
    alike: dict[str, tuple[int, ...]] = {}
    for number, name in enumerate(class_names):
        exact[name] = (*exact.get(name, ()), number)
        alike[_key(name)] = (*alike.get(_key(name), ()), number)
    return exact, alike


def _key(name: str) -> str:
    """``name`` without what people write differently: capitals, spaces, underscores, hyphens in words, leading zeros.

    >>> _key("Pickup_Truck"), _key("T-shirt / top") == _key("tshirt/top"), _key("01"), _key("-1")
    ('pickuptruck', True, '1', '-1')
    """
    text = re.sub(r"[\s_]+", "", unicodedata.normalize("NFKC", name).casefold())
    text = re.sub(r"(?<=[^\W\d])-(?=[^\W\d])", "", text)
    return (text.lstrip("0") or "0") if _NUMBER.fullmatch(text) else text


def _number(name: str) -> int:
    """A text of digits as a number; one that is too long for any class is larger than all."""
    return int(name) if len(name) < 20 else 10**20


def _placeholders(number: int) -> tuple[str, str]:
    return f"class{number}", f"label{number}"


def _numbered(names: Sequence[str]) -> str:
    """What the first classes are called, for people."""
    first = ", ".join(f"{number} = {name[:SHOWN]}" for number, name in enumerate(names[:3]))
    return first + (", …" if len(names) > 3 else "")


def _some(names: Sequence[str]) -> str:
    return ", ".join(name[:SHOWN] for name in names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _first(labels: Mapping[Any, str]) -> str:
    label, place = next(iter(labels.items()))
    return f"{_short(label)}, {place}"
