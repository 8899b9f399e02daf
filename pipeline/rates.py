"""Rates that ``factory bench`` measured, kept for dry runs: what a stage takes, and costs, on the machine that was
measured."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError

from manifests.errors import DataError, UsageError, first_line
from manifests.storage import Storage
from pipeline.recipe import Recipe
from pipeline.terminal import duration, flop, pairs, plain, share
from stages.settings import Settings

FILE = "bench.json"


class Pace(Settings):
    """One stage: images of its unit of work a second (stage 2: views trained on), all ``workers`` together.

    ``group_size``: trajectories together (stage 1). ``flop_per_image``: counted work of one; None where it cannot be
    counted. ``data_wait``: share of the time without a batch (stage 2).
    """

    recipe: str
    images_per_second: float = Field(gt=0, le=1e12)
    flop_per_image: int | None = Field(None, ge=0, le=2**63)
    workers: int = Field(1, gt=0, le=2**20)
    images: int = Field(gt=0, le=2**40)
    seconds: float = Field(gt=0, le=1e9)
    group_size: int | None = Field(None, gt=0, le=2**20)
    steps_per_second: float | None = Field(None, ge=0, le=1e12)
    data_wait: float | None = Field(None, ge=0, le=1)

    @property
    def text(self) -> str:
        many = f" by {self.workers} workers" if self.workers > 1 else ""
        work = f", {flop(self.flop_per_image * self.images_per_second)} a second" if self.flop_per_image else ""
        steps = ""
        if self.steps_per_second is not None:
            steps = f"{self.steps_per_second:.3g} steps a second, {share(self.data_wait)} of the time without a batch; "
        group = f", groups of {self.group_size}" if self.group_size else ""
        took = f"{self.images} in {duration(self.seconds)}{group}"
        return f"{steps}{self.images_per_second:.3g} images a second{many}{work} ({took})"

    def hours(self, images: float, work: int | None, workers: int) -> float:
        """For ``images`` that cost ``work`` FLOPs in all, by ``workers``: as much for one as here."""
        seconds = images / self.images_per_second
        if work and self.flop_per_image:
            seconds = work / (self.flop_per_image * self.images_per_second)
        return seconds * self.workers / workers / 3600


class Bench(Settings):
    """What ``factory bench`` measured, where and when."""

    machine: str
    date: str
    synth: Pace | None = None
    distill: Pace | None = None

    def to_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def lines(self) -> Iterator[str]:
        yield from pairs(
            10,
            ("machine", f"{self.machine}, {self.date}"),
            ("stage 1", self.synth.text if self.synth else None),
            ("stage 2", self.distill.text if self.distill else None),
        )


def bench_file() -> str:
    """Where the last benchmark of this user is: ``FACTORY_BENCH``, else a file in the cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.environ.get("FACTORY_BENCH") or os.path.join(
        os.environ.get("FACTORY_CACHE") or os.path.join(home, "dfkd-factory"), FILE
    )


def read_bench(path: str | None = None) -> Bench | None:
    """The last benchmark, None where there is none. Raises DataError for a file that is not one."""
    name = path or bench_file()
    try:
        with open(name, encoding="utf-8") as file:
            return Bench.model_validate(json.loads(file.read(1 << 16)))
    except FileNotFoundError:
        if path or os.environ.get("FACTORY_BENCH"):
            raise DataError(f"{name}: no such file; `factory bench` writes one") from None
        return None
    except (OSError, ValueError, ValidationError) as error:
        raise DataError(f"{name}: not what `factory bench` wrote; run it again ({first_line(error)})") from None


@dataclass(frozen=True)
class Time:
    """How long a stage takes by a benchmark, and what that costs; its lines belong into a dry run."""

    hours: float
    price: float | None
    workers: int
    source: str
    exact: bool

    @classmethod
    def of(
        cls, stage: str, recipe: Recipe, images: float, work: int | None, workers: int, price: float | None
    ) -> "Time | None":
        """Of ``images`` of a ``stage`` (synth or distill) of ``recipe``. ``price`` is that of one worker's hour."""
        if price is not None and not 0 <= price < 1e6:
            raise UsageError(f"--price {price:g}: expected the price of one GPU's hour")
        found = read_bench()
        pace: Pace | None = getattr(found, stage) if found else None
        if found is None or pace is None:
            if price is not None:
                raise UsageError(
                    "--price needs a rate: run `factory bench` first, on the machine that will do the work"
                )
            return None
        same_work = not work or not pace.flop_per_image or _near(work / images, pace.flop_per_image)
        same_groups = pace.group_size in (None, recipe.synth.group_size)
        exact = pace.recipe == recipe.name and same_work and same_groups
        hours = pace.hours(images, work, workers)
        return cls(hours, None if price is None else hours * workers * price, workers, found.machine, exact)

    def entries(self) -> Sequence[tuple[str, str | None]]:
        how = (
            "as benchmarked"
            if self.exact
            else "scaled by counted work from other settings or smaller groups: a rough figure"
        )
        cost = None if self.price is None else f"{self.price:,.2f}, {self.workers} × {self.hours:.2f} h"
        return (
            ("time", f"about {duration(self.hours * 3600)} on {plain(self.source)} ({how}); see factory bench"),
            ("price", cost),
        )


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= 0.01 * max(one, other)


def save_bench(found: Bench, path: str | None = None) -> str:
    """Keep it for ``--dry-run``; the path of its file."""
    name = os.path.abspath(path or bench_file())
    storage = Storage(os.path.dirname(name))
    storage.write(os.path.basename(name), (json.dumps(found.to_dict(), indent=1) + "\n").encode(), beside=True)
    return name
