"""What the page says in words and numbers of a dataset: how it was made, what remained, and what to trust."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from manifests.dataset import MAX_SHARD, unique_names
from manifests.reader import Manifest
from manifests.storage import Storage
from pipeline import plan
from pipeline.events import read_events
from pipeline.plan import PLAN, RESOLVED
from pipeline.report.columns import Columns, class_names
from pipeline.terminal import duration, flop, number, share, size
from stages.settings import SynthSettings

if TYPE_CHECKING:
    from pipeline.report.students import Training

METHODS = {
    "diffdfkd": "diffusion prior, guided by the teacher (DiffDFKD)",
    "dmkd": "diffusion prior, unguided (DM-KD)",
    "dda": "inverted from the teacher, then varied by the diffusion prior (DDA)",
    "cmi": "inverted from the teacher (CMI)",
    "deepinversion": "inverted from the teacher (DeepInversion)",
    "noise": "noise, a load test",
    "import": "images from elsewhere, scored by the teacher",
}
UNGUIDED = ("dmkd", "noise", "import")
AGREEMENT, BALANCE, GAP, DUPLICATES = 0.9, 0.5, 0.5, 0.05
"""Look first below this share of labels that the teacher agrees with; where the smallest class has less than this share
of the largest; from this BatchNorm gap (docs/guidance.md: guided images reach 0.2, wrong normalization begins at 0.6);
above this share of near-duplicates."""

MAX_CLASSES, MAX_SETTINGS = 1000, 100
"""Classes in the table of classes, settings in the list of settings."""


def made_by(manifest: Manifest) -> list[tuple[str, str]]:
    """Teacher, prior, method and identity, as name and value."""
    info = manifest.info
    synth = info.recipe.get("synth")
    method = str(synth.get("method", "")) if isinstance(synth, dict) else ""
    prior, teacher = info.prior, info.teacher
    tars = sum(tar.bytes for tar in info.tars)
    facts = [
        ("recipe", " – ".join(_short(info.recipe[key]) for key in ("name", "description") if info.recipe.get(key))),
        ("method", METHODS.get(method, _short(method))),
        ("teacher", _identity(teacher, "architecture")),
        ("prior", _identity(prior, "name", "pipeline")),
        ("images", f"{info.image_size} × {info.image_size} pixels, {size(tars)} in {len(info.tars)} shards"),
        ("classes", f"{len(info.class_names):,}"),
        ("scores", f"replaced by factory rescore: {_short(info.rescored)}" if info.rescored else ""),
        ("fingerprint", info.fingerprint),
    ]
    return [(name, value) for name, value in facts if value]


def _identity(facts: Mapping[str, Any], *names: str) -> str:
    words = [_short(facts[name]) for name in names if facts.get(name)]
    return ", ".join([*words, f"sha256 {str(facts['sha256'])[:12]}"] if facts.get("sha256") else words)


def changed_settings(manifest: Manifest) -> list[tuple[str, str, str]]:
    """``(key, value, default)`` of every setting of stage 1 that differs from its default."""
    stored = manifest.info.recipe.get("synth")
    changed = plan.changed_settings(stored if isinstance(stored, dict) else {}, SynthSettings().model_dump(mode="json"))
    lines = [(_short(key), _short(value), "" if was == {} else _short(was)) for key, value, was in changed]
    more = [(f"{len(lines) - MAX_SETTINGS:,} more", "", "")] if len(lines) > MAX_SETTINGS else []
    return lines[:MAX_SETTINGS] + more


def _short(value: Any) -> str:
    """A setting in few words.

    >>> _short(None), _short([0.0, 1.0]), _short(["a line", "an arc", "a curve", "a loop"])
    ('none', '0.0, 1.0', '4: a line, an arc, a curve, …')
    """
    if isinstance(value, list) and len(value) > 3:
        return f"{len(value):,}: {', '.join(str(entry)[:40] for entry in value[:3])}, …"
    text = ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
    return text if len(text) <= 160 else f"{text[:159]}…"


def cost(storage: Storage, group_size: int) -> list[tuple[str, str]]:
    """What the shards of a run took, from its events: name and value; nothing where there are none."""
    shards, last, work = dict[int, dict[str, Any]](), 0.0, dict[str, Any]()
    for event in read_events(storage):
        last = event["time"]
        if event["kind"] == "work_counted":
            work = event
        shard = event.get("shard")
        if event["kind"] == "shard_done" and event.get("rows") and isinstance(shard, int) and 0 <= shard < MAX_SHARD:
            kept = ("rows", "seconds", "bytes", "evaluations", "worker")
            shards[shard] = {name: event[name] for name in kept if name in event}
    rows = sum(event["rows"] for event in shards.values())
    if not rows:
        return []
    seconds = sum(event.get("seconds") or 0 for event in shards.values())
    data = sum(event.get("bytes") or 0 for event in shards.values())
    evaluations = sum(n for event in shards.values() if isinstance(n := event.get("evaluations"), int | float))
    workers = {str(event.get("worker")) for event in shards.values()}
    facts = [
        ("time per 1,000 images", f"{duration(1000 * seconds / rows)} of one worker"),
        ("compute per 1,000 images", _compute(work)),
        ("disk per 1,000 images", size(1000 * data / rows)),
        ("prior evaluations an image", f"{evaluations * group_size / rows:.3g}" if evaluations else ""),
        ("work in all", f"{duration(seconds)} for {rows:,} images, workers: {len(workers)}"),
        ("last event", _date(last)),
    ]
    return [(name, value) for name, value in facts if value]


def _compute(work: Mapping[str, Any]) -> str:
    """The counted FLOPs of an event ``work_counted``, with their largest parts."""
    try:
        each = 1000 / work["images_per_trajectory"]
        parts = sorted(((float(count), str(name)) for name, count in work["parts"].items() if count), reverse=True)
        total = each * work["flop_per_trajectory"]
        shares = ", ".join(f"{_short(name)} {share(count * each / total)}" for count, name in parts[:3])
        return f"{flop(total)}, counted: {shares}" if math.isfinite(total) and total > 0 else ""
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError):  # somebody else's
        return ""


def _date(seconds: float) -> str:
    try:
        return f"{np.datetime64(int(seconds), 's').item():%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError):
        return "?"


@dataclass(frozen=True)
class Verdict:
    """One judgment: ``value`` of ``n`` images, whether to trust it, and what it means in a sentence."""

    title: str
    value: str
    n: str
    verdict: Literal["trust", "look here first", "not measured"]
    meaning: str

    @property
    def kind(self) -> str:
        return {"trust": "good", "look here first": "bad"}.get(self.verdict, "none")


def verdicts(manifest: Manifest, columns: Columns, measured: Mapping[str, Any] | str) -> list[Verdict]:
    """Agreement, balance, BatchNorm gap and diversity. ``measured``: of :func:`stages.synth.metrics.measure`, or why
    there is none."""
    metrics = None if isinstance(measured, str) else measured
    why = measured if isinstance(measured, str) else ""
    return [
        _agreement(manifest, columns),
        _balance(manifest, columns),
        _gap(metrics, why),
        _diversity(metrics, why),
    ]


def _verdict(title: str, value: str, n: str, good: bool, meaning: str) -> Verdict:
    return Verdict(title, value, n, "trust" if good else "look here first", meaning)


def _agreement(manifest: Manifest, columns: Columns) -> Verdict:
    title = "Teacher agreement"
    judged = columns.kept & columns.final & (columns.teacher_label >= 0)
    n = int(judged.sum())
    if not n:
        return Verdict(title, "–", "no images", "not measured", "The manifest holds no predictions of the teacher.")
    agreement = float(columns.agrees[judged].mean())
    synth = manifest.info.recipe.get("synth")
    unguided = isinstance(synth, dict) and synth.get("method") in UNGUIDED
    if agreement >= AGREEMENT:
        meaning = "The teacher sees the class that was asked for. It does not say that the images are varied."
    elif unguided:
        meaning = "Nothing guided these images toward their labels: train on the teacher's outputs, not on labels."
    else:
        meaning = "Too little guidance, a prior that cannot draw these classes, or another teacher than the one of now."
    return _verdict(title, str(share(agreement)), f"{n:,} kept final images", agreement >= AGREEMENT, meaning)


def _balance(manifest: Manifest, columns: Columns) -> Verdict:
    counts = np.bincount(columns.label[columns.kept & columns.final], minlength=len(manifest.info.class_names))
    names = class_names(manifest)
    low, high = int(counts.argmin()), int(counts.argmax())
    good = bool(counts[low] >= BALANCE * counts[high] and counts[low] > 0)
    least = f"{names[low]} has {counts[low]:,}, {names[high]} {counts[high]:,}."
    missing = int((counts == 0).sum())
    if missing:
        least = f"{missing:,} of {len(counts):,} classes have no image at all, {names[low]} for one."
    elif counts[low] == counts[high]:
        least = f"Every class has {counts[low]:,}."
    advice = "" if good else " More shards, a lower threshold, or distill.balance would help."
    value = f"{counts[low]:,} to {counts[high]:,}"
    return _verdict("Class balance", value, f"kept final images in {len(counts):,} classes", good, least + advice)


def _gap(metrics: Mapping[str, Any] | None, why: str) -> Verdict:
    title = "BatchNorm gap"
    if metrics is None:
        return Verdict(title, "–", "", "not measured", why)
    gap, n = metrics["bn_gap"], f"{metrics['images']:,} images measured"
    if gap is None:
        return Verdict(title, "–", n, "not measured", "The teacher has no BatchNorm layers.")
    meaning = (
        "Layers see values as they did in training: guided images reach 0.04 to 0.2, unguided ones up to 0.8."
        if gap < GAP
        else "Unguided images, wrong weights or wrong normalization: guided images with the right ones stay below 0.2."
    )
    return _verdict(title, str(number(gap, 2)), n, gap < GAP, meaning)


def _diversity(metrics: Mapping[str, Any] | None, why: str) -> Verdict:
    title = "Diversity"
    if metrics is None:
        return Verdict(title, "–", "", "not measured", why)
    if metrics["near_duplicates"] is None:
        return Verdict(title, "–", "", "not measured", "The teacher shows no features.")
    alike, n = metrics["near_duplicates"], metrics["images"]
    vendi, each = (np.mean([facts[name] for facts in metrics["classes"].values()]) for name in ("vendi", "images"))
    good = alike <= DUPLICATES * n
    same = (
        f"{alike:,} ({share(alike / n)}) hardly differ from an earlier image" if alike else "None repeats another one"
    )
    meaning = (
        f"{same} of the class. To the teacher the {each:.0f} images of "
        f"a class count as {vendi:.1f} with nothing in common (mean Vendi score). Images that are alike teach little."
    )
    return _verdict(title, f"{alike:,} alike", f"{n:,} images measured", good, meaning)


@dataclass(frozen=True)
class ClassRow:
    """One class in the table of classes; ``agreement`` and ``confidence`` are of its ``kept`` images that the teacher
    judged, ``vendi`` and ``alike`` of the ``measured`` ones."""

    label: int
    name: str
    made: int
    kept: int
    agreement: float | None
    confidence: float | None
    measured: int | None
    vendi: float | None
    alike: int | None


def class_rows(manifest: Manifest, columns: Columns, measured: Mapping[str, Any] | str) -> list[ClassRow]:
    """Classes in the order of labels; of more than :data:`MAX_CLASSES` those with the fewest kept images. Counts are of
    all images, predictions included, as the sliders count."""
    names = class_names(manifest)
    classes = {} if isinstance(measured, str) else measured["classes"]

    def count(rows: Any, weights: Any = None) -> Any:
        return np.bincount(columns.label[rows], None if weights is None else weights[rows], minlength=len(names))

    judged = columns.kept & (columns.teacher_label >= 0)
    sure = columns.kept & np.isfinite(columns.scores["confidence"])
    made, kept, seen, agrees = count(slice(None)), count(columns.kept), count(judged), count(judged & columns.agrees)
    known, confidence = count(sure), count(sure, columns.scores["confidence"])
    rows = []
    unique = unique_names(manifest.info.class_names)
    for label in np.sort(np.argsort(kept, kind="stable")[:MAX_CLASSES]).tolist():
        facts = classes.get(unique[label], {})
        rows.append(
            ClassRow(
                label,
                names[label],
                int(made[label]),
                int(kept[label]),
                float(agrees[label] / seen[label]) if seen[label] else None,
                float(confidence[label] / known[label]) if known[label] else None,
                facts.get("images"),
                facts.get("vendi"),
                facts.get("near_duplicates"),
            )
        )
    return rows


def commands(manifest: Manifest, trainings: Sequence["Training"]) -> list[tuple[str, list[str]]]:
    """``(what for, command lines)``: what made all this, and what comes next."""
    storage, name = manifest.storage, _quoted(manifest.url)
    run = _quoted(storage.url)
    made, following = [], []
    if storage.exists(PLAN):
        made.append(f"factory run synth -c {_quoted(storage.path(RESOLVED))} --out {run}")
        following += [f"factory verify {run}", f"factory inspect {name} --metrics"]
    for training in trainings:
        if not training.other_data and training.datasets == 1:  # of several, the others' places are not recorded
            settings = _quoted(f"{training.url}/{RESOLVED}")
            made.append(f"factory run distill --manifest {name} -c {settings} --out {_quoted(training.url)}")
        for student in [*training.students][:1]:
            folder = _quoted(f"{training.url}/{student}")
            following += [f"factory export student {folder} --onnx student.onnx", f"factory eval {folder} DATA"]
    if not trainings:
        following.append(f'factory run distill --manifest {name} --where "confidence >= 0.5"')
    return [(title, lines) for title, lines in (("Made by", made), ("What comes next", following)) if lines]


def _quoted(text: str) -> str:
    return shlex.quote(text)
