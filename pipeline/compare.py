"""``factory compare``: runs and their students side by side, what they cost, and which settings differ."""

import html
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from manifests.checked_json import load_checked
from manifests.errors import DataError
from manifests.reader import Manifest
from manifests.storage import Storage
from pipeline.events import read_events
from pipeline.outputs import RESULTS, RUN, trainings
from pipeline.plan import flattened
from pipeline.terminal import duration, number, plain, share, table

SHOWN = 200
"""Characters of a setting."""
COLUMNS = {
    "images": "images trained on, or kept",
    "accuracy": "on the test data",
    "agreement": "with the teacher, on held-out synthetic images",
    "labels": "that the teacher agrees with, of the images trained on",
    "bn_gap": "the images' distance from the teacher's BatchNorm statistics",
    "parameters": "of the student",
    "making": "seconds of a worker for 1,000 images",
    "training": "seconds, all students of the run together",
}
"""Columns of the table and what they mean; those that no run has are left out."""


@dataclass(frozen=True)
class Entry:
    """A student of a run, or a dataset that none was trained on; None: not measured or not known."""

    run: str
    student: str | None
    images: int
    accuracy: float | None = None
    agreement: float | None = None
    labels: float | None = None
    bn_gap: float | None = None
    parameters: int | None = None
    making: float | None = None
    training: float | None = None
    settings: dict[str, str] = field(default_factory=dict)

    def cell(self, column: str) -> str | None:
        value = getattr(self, column)
        if value is None:
            return None
        if column in ("accuracy", "agreement", "labels"):
            return share(value)
        if column in ("making", "training"):
            return duration(value)
        return number(value, 2) if column == "bn_gap" else f"{value:,}"


@dataclass(frozen=True)
class Comparison:
    """All entries in the order of the runs; ``differences``: settings that are not the same in all, with each entry's
    value."""

    entries: list[Entry]
    differences: dict[str, list[str]]

    @property
    def columns(self) -> list[str]:
        return [name for name in COLUMNS if any(getattr(entry, name) is not None for entry in self.entries)]

    def names(self) -> list[str]:
        """What entries are called: as little of the run's path as tells them apart, and the student."""
        parts = [entry.run.rstrip("/").split("/") for entry in self.entries]
        depth = 1
        while depth < max(map(len, parts)) and len({tuple(p[-depth:]) for p in parts}) < len({*map(tuple, parts)}):
            depth += 1
        shown = zip(parts, self.entries, strict=True)
        return [" ".join(("/".join(path[-depth:]), entry.student or "")).strip() for path, entry in shown]

    def lines(self) -> Iterator[str]:
        names = self.names()
        widths = (max(map(len, names)) + 2, *(max(12, len(name) + 2) for name in self.columns))
        rows = [(name, *map(entry.cell, self.columns)) for name, entry in zip(names, self.entries, strict=True)]
        yield from table(widths, ("", *self.columns), *rows)
        yield ""
        yield from (f"{name}: {COLUMNS[name]}" for name in self.columns)
        if self.differences:
            yield ""
            yield "settings that differ, in the order of the rows:"
        for key, values in self.differences.items():
            yield f"  {plain(key)}: {' | '.join(plain(value)[:40] for value in values)}"

    def to_dict(self) -> dict[str, Any]:
        return {"entries": [asdict(entry) for entry in self.entries], "differences": self.differences}

    def page(self) -> bytes:
        """One HTML page without scripts: the same table, shares with a bar, and the settings that differ."""
        names = [html.escape(plain(name)) for name in self.names()]
        head = "".join(f'<th scope="col" title="{html.escape(COLUMNS[name])}">{name}' for name in self.columns)
        body = []
        for name, entry in zip(names, self.entries, strict=True):
            cells = (f"<td>{_bar(entry, column)}{entry.cell(column) or '–'}" for column in self.columns)
            body.append(f'<tr><th scope="row">{name}{"".join(cells)}')
        changed = []
        for key, values in self.differences.items():
            cells = (f"<td>{html.escape(plain(value))}" for value in values)
            changed.append(f'<tr><th scope="row">{html.escape(plain(key))}{"".join(cells)}')
        settings = f"<h2>Settings that differ</h2><table><tr><td>{_cells(names)}{''.join(changed)}</table>"
        meaning = "".join(f"<dt>{name}<dd>{html.escape(COLUMNS[name])}" for name in self.columns)
        return PAGE.format(
            table=f"<table><tr><td>{head}{''.join(body)}</table>",
            settings=settings if changed else "<p>All settings are the same.",
            meaning=meaning,
        ).encode()


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Runs compared</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root{{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}}
body{{margin:2rem auto;max-width:75rem;padding:0 1rem}}
main>div{{overflow-x:auto}}
table{{border-collapse:collapse}}
th,td{{padding:.3rem .8rem;text-align:right;border-bottom:1px solid #8886}}
th[scope=row]{{text-align:left}}
meter{{display:block;width:100%;min-width:5rem}}
</style>
<main><h1>Runs compared</h1><div>{table}</div><div>{settings}</div><h2>Columns</h2><dl>{meaning}</dl></main></html>
"""


def _bar(entry: Entry, column: str) -> str:
    value = getattr(entry, column)
    bars = column in ("accuracy", "agreement", "labels") and value is not None
    return f'<meter min="0" max="1" value="{value:.4f}"></meter>' if bars else ""


def _cells(names: Sequence[str]) -> str:
    return "".join(f'<th scope="col">{name}' for name in names)


def compare(runs: Sequence[str]) -> Comparison:
    """The entries of ``runs``: folders of stage 1 with the students that ``factory status`` lists, manifests, and
    folders of stage 2. Raises DataError where one is neither, or cannot be read."""
    entries = [entry for url in dict.fromkeys(runs) for entry in _entries(url)]
    keys = dict.fromkeys(key for entry in entries for key in entry.settings)
    values = {key: [entry.settings.get(key, "–") for entry in entries] for key in keys}
    return Comparison(entries, {key: each for key, each in values.items() if len({*each}) > 1})


def _entries(url: str) -> Iterator[Entry]:
    storage = Storage(url)
    if not url.endswith(".parquet") and storage.exists(RESULTS):
        yield from _students(url, storage.url, None, {})
        return
    manifest = Manifest.open(url, skip_bad=True)
    synth = manifest.info.recipe.get("synth")
    settings = {"synth." + key: _text(value) for key, value in flattened(synth if isinstance(synth, dict) else {})}
    made, finished = _making(manifest.storage), trainings(manifest.storage, manifest.info.fingerprint)
    students = [folder for folder, is_finished in finished.items() if is_finished]
    for folder in students:
        yield from _students(folder, manifest.storage.url if len(students) == 1 else folder, made, settings)
    if not students:
        yield Entry(manifest.storage.url, None, manifest.num_kept, making=made, settings=settings)


def _students(folder: str, run: str, making: float | None, settings: dict[str, str]) -> Iterator[Entry]:
    from stages.distill.results import read_results

    storage = Storage(folder)
    result = read_results(storage, "run stage 2 again, or delete it")
    if result is None:
        raise DataError(f"{storage.url} holds no finished training: no {RESULTS}")
    try:
        chosen = dict(load_checked(storage.read(RUN))["settings"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{storage.path(RUN)} is damaged: {error}") from None
    settings = settings | {f"distill.{key}": _text(value) for key, value in flattened(chosen) if key != "students"}
    for name, student in result.students.items():
        yield Entry(
            run=run,
            student=name,
            images=result.images,
            accuracy=student.test.accuracy if student.test else None,
            agreement=student.val_agreement,
            labels=result.teacher_check.teacher_label_agreement,
            bn_gap=result.teacher_check.bn_gap,
            parameters=student.parameters,
            making=making,
            training=result.seconds,
            settings=settings,
        )


def _making(storage: Storage) -> float | None:
    """Seconds of a worker for 1,000 images, of the shards' last results; None where no events are left."""
    done = {event.get("shard"): event for event in read_events(storage) if event["kind"] == "shard_done"}
    rows = sum(event.get("rows") or 0 for event in done.values())
    return 1000 * sum(event.get("seconds") or 0 for event in done.values()) / rows if rows else None


def _text(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
