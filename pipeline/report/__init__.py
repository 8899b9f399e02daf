"""``factory report``: one HTML page that shows a dataset and its students. It needs no network and no other file.

Everything on it that comes from a file is text: the template escapes what it prints, control and bidirectional
characters become escapes as in a terminal, and a Content-Security-Policy allows the page's own script and style alone,
by their hashes.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from manifests.errors import DataError, FactoryError
from manifests.reader import Manifest
from manifests.storage import Storage
from pipeline import outputs
from pipeline.report import facts
from pipeline.report.columns import AGREES, FINAL, KEPT, SCORES, Columns, packed, read_columns, sliders
from pipeline.report.pictures import Picture, Pictures, cuts, flags, gallery_rows, trajectories
from pipeline.report.students import TestImages, Training, confusion, read_training, reliability_points, student_facts
from pipeline.terminal import number, plain, say, share

REPORT = "report.html"
MEASURED = 1024
"""Images that the teacher is run on, about."""


@dataclass(frozen=True)
class Page:
    """A finished page, how many rows it is about, and how many of their images it shows."""

    html: bytes
    rows: int
    pictures: int


def make_report(
    url: str, students: Sequence[str] | None = None, test_data: str | None = None, measure: bool = True
) -> Page:
    """The page of the dataset at ``url`` (folder or manifest).

    ``students``: folders of stage 2; None: those that :func:`pipeline.outputs.trainings` finds. ``test_data``: labeled
    images to find those that a student gets wrong and the teacher right. ``measure``: run the dataset's teacher on
    about :data:`MEASURED` images, for BatchNorm gap and diversity. Raises DataError where dataset or students cannot be
    read; what is merely absent is named on the page.
    """
    manifest = Manifest.open(url, skip_bad=True)
    if not manifest.num_rows:
        raise DataError(f"{manifest.url} holds no rows")
    columns, pictures = read_columns(manifest), Pictures(manifest)
    absent = [f"Images of a tar: {problem}" for problem in manifest.problems]
    teacher, why = _teacher(manifest) if measure or test_data else (None, "Left out with --no-metrics.")
    measured = _measured(manifest, teacher, why) if measure else "Left out with --no-metrics."
    tests = TestImages(test_data, teacher, manifest) if test_data else None
    trainings = [read_training(folder, manifest, tests) for folder in students or ()]
    unnamed = outputs.trainings(manifest.storage, manifest.info.fingerprint) if students is None else {}
    for folder in (folder for folder, finished in unnamed.items() if finished):
        try:
            trainings.append(read_training(folder, manifest, tests))
        except DataError as error:  # of files that nobody named
            absent.append(f"Students: {error}")

    classes = len(np.unique(columns.label))
    chosen = gallery_rows(columns, classes, pictures.affordable)
    pictures.load(row for rows in chosen.values() for row in rows)
    gallery = [(pictures.names[label], pictures[rows], _finals(columns, label)) for label, rows in chosen.items()]
    strips = [pictures[rows] for rows in trajectories(columns)]
    synth = manifest.info.recipe.get("synth")
    synth = synth if isinstance(synth, dict) else {}
    lca = synth.get("lca")
    mixed = cuts(pictures, columns, str(lca.get("kind", "cutmix")) if isinstance(lca, dict) else "cutmix")
    duplicates, examined = ([], 0) if isinstance(measured, str) else (measured["duplicates"], measured["images"])
    flagged = flags(pictures, columns, duplicates, examined)
    if not strips:
        absent.append("Trajectories: of none several steps are stored (images.intermediates).")
    if not mixed:
        absent.append("Latent CutMix: no stored image went through it.")
    if not flagged:
        unmeasured = "; near-duplicates were not looked for" if isinstance(measured, str) else ""
        absent.append(f"Flagged images: there are none{unmeasured}.")
    if students is None and not any(unnamed.values()):
        absent.append("Students: no finished training in the default place; --students FOLDER names one elsewhere.")
    absent += [training.note for training in trainings if training.note]
    if len(chosen) < classes:
        absent.append(f"Images of {classes - len(chosen):,} of {classes:,} classes.")
    if pictures.bad:
        first = next(iter(pictures.bad.values()))
        absent.append(f"Images that cannot be read: {len(pictures.bad)}. The first: {first}")

    group_size = synth.get("group_size")
    book = Book(columns)
    html = _render(
        book=book,
        name=str(manifest.info.recipe.get("name") or manifest.storage.url.rsplit("/", 1)[-1])[:80],
        manifest=manifest,
        columns=columns,
        made_by=facts.made_by(manifest),
        changed=facts.changed_settings(manifest),
        cost=facts.cost(manifest.storage, group_size if isinstance(group_size, int) else 1),
        verdicts=facts.verdicts(manifest, columns, measured),
        classes=facts.class_rows(manifest, columns, measured),
        commands=facts.commands(manifest, trainings),
        funnel=_funnel(columns, trainings),
        gallery=gallery,
        scale=pictures.scale,
        strips=[strip for strip in strips if strip],
        cuts=mixed,
        flags=flagged,
        trainings=trainings,
        absent=absent,
        packed=packed(columns, len(manifest.info.class_names)),
        finals=int(columns.final.sum()),
    )
    return Page(html, manifest.num_rows, len(book.entries))


def write_report(
    run: str, out: str | None = None, students: Sequence[str] | None = None, test_data: str | None = None
) -> None:
    """``report.html`` of the dataset ``run`` in the folder ``out`` (default: the run's own), at the end of a command
    that made either. What goes wrong is a line, and no more than that: the run itself is finished."""
    try:
        page = make_report(run, students, test_data)
        storage = Storage(out if out is not None else Manifest.open(run, skip_bad=True).storage.url)
        storage.write(REPORT, page.html, beside=True)
        say(f"report: {storage.path(REPORT)}")
    except Exception as error:
        say(f"no report: {' '.join(str(error).split()) or type(error).__name__}")


def _finals(columns: Columns, label: int) -> int:
    """How many images of a class its gallery was chosen from."""
    mine = columns.label == label
    return int((mine & columns.final).sum() if columns.final.any() else mine.sum())


def _teacher(manifest: Manifest) -> tuple[Any, str]:
    from stages.models.loading import dataset_teacher

    try:
        return dataset_teacher(manifest, ask="give it one with factory rescore --teacher"), ""
    except FactoryError as error:
        return None, f"Not measured: {error}."


def _measured(manifest: Manifest, teacher: Any, why: str) -> dict[str, Any] | str:
    """The metrics of kept final images, or why there are none."""
    if teacher is None:
        return why
    from stages.synth.metrics import measure

    try:
        selection = _final_images(manifest)
        per_class = max(2, MEASURED // len(np.unique(selection.labels)))
        return measure(selection, teacher, per_class)
    except FactoryError as error:
        return f"Not measured: {error}."


def _final_images(manifest: Manifest) -> Manifest:
    try:
        return manifest.where("timestep == 0")
    except DataError:  # of a method without timesteps
        return manifest.where()


def _funnel(columns: Columns, trainings: Sequence[Training]) -> list[tuple[str, int, str]]:
    """(name, images, remark) from what was made to what was trained on."""
    made, kept = len(columns.kept), int(columns.kept.sum())
    steps = [("made", made, f"{int(columns.final.sum()):,} final images" if not columns.final.all() else "")]
    steps.append(("kept", kept, f"{share(kept / made)} pass the filters of stage 1"))
    for training in (each for each in trainings if not each.other_data):
        held = f"{training.result.val_images:,} of them held out"
        selection = f"; --where {training.where}" if training.where else ""
        other = f"; of {training.datasets} datasets" if training.datasets > 1 else ""
        steps.append((f"used by {_last(training.url)}", training.used, held + selection + other))
    return steps


def _last(url: str) -> str:
    return "/".join(url.rstrip("/").rsplit("/", 2)[-2:])


class Book:
    """Pictures as the page's script knows them: details for people, and what the sliders decide by."""

    def __init__(self, columns: Columns) -> None:
        self.entries: list[dict[str, Any]] = []
        self._passed = [each.passed for each in sliders(columns)]
        self._flags = columns.kept * KEPT + columns.agrees * AGREES + columns.final * FINAL

    def add(self, picture: Picture) -> int:
        """The number of ``picture`` on the page."""
        details, row = picture.details, picture.row
        shown = {
            "class": picture.class_name,
            "teacher sees": picture.teacher_class,
            **{name: number(details[name], 4) for name in (*SCORES, "margin")},
            "timestep": f"{details['timestep']} (step {details['step']})" if details["timestep"] else None,
            "prompt": details["prompt"],
            "prior's class": details["prior_label"],
            "BatchNorm loss": number(details["loss_bn"], 3),
            "rejected": None if details["kept"] else details["reject_reason"] or "yes",
            "group": details["group"],
            "trajectory": details["trajectory"],
        }
        self.entries.append(
            {
                "key": plain(details["key"]),
                "facts": [[name, plain(value)[:400]] for name, value in shown.items() if value is not None],
                "passed": [int(passed[row]) for passed in self._passed],
                "flags": int(self._flags[row]),
            }
        )
        return len(self.entries) - 1


def _render(**values: Any) -> bytes:
    """The template filled in. Control and bidirectional characters of any text become escapes, and all is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def readable(value: Any) -> Any:
        return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=readable, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"share": share, "number": number, "embedded": lambda v: Markup(_json(v)), "last": _last}
    environment.globals |= {
        "confusion": confusion,
        "student_facts": student_facts,
        "reliability_points": reliability_points,
    }
    style, script = _asset("report.css"), _asset("report.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    page = environment.from_string(_asset("report.html.j2"))
    return page.render(style=Markup(style), script=Markup(script), policy=policy, **values).encode()


def _json(value: Any) -> str:
    """JSON for a script element, which nothing inside can end."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _asset(name: str) -> str:
    return (resources.files("pipeline.report") / name).read_text(encoding="utf-8")
