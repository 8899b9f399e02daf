"""Which classes a group's trajectories are of, so that a run is balanced. Imports no torch."""

from math import gcd


def group_labels(index: int, size: int, classes: int) -> tuple[int, ...]:
    """Classes of a group: as many as fit with at least two trajectories each, rotating so that the run is balanced.

    Every ``classes`` groups each class has had ``size`` trajectories.

    >>> group_labels(0, 5, 2), group_labels(1, 5, 2), group_labels(1, 4, 10)
    ((0, 1, 0, 1, 0), (1, 0, 1, 0, 1), (2, 3, 2, 3))
    """
    distinct = min(classes, size // 2)
    start = index * (size if distinct == classes else distinct)
    if lap := uneven_lap(size, classes):
        start += index // lap
    return tuple((start + i % distinct) % classes for i in range(size))


def uneven_lap(size: int, classes: int) -> int:
    """Groups after which they would begin with the same classes again, not having begun with each; 0 where it is no
    matter.

    A group of odd ``size`` gives the class that it begins with one trajectory more than the others.

    >>> uneven_lap(5, 10), uneven_lap(5, 9), uneven_lap(4, 10)
    (5, 0, 0)
    """
    distinct = size // 2
    common = gcd(distinct, classes)
    return classes // common if size % 2 and distinct < classes and common > 1 else 0
