"""``factory import``: images from elsewhere, public or unlabeled, as a dataset that a teacher has scored.

The images are cut to the teacher's view, in the order of their source; shard ``k`` holds places ``k·n`` to ``(k+1)·n``
of it without those that are no image. Everything is read once before the first shard is made: its checksum is part of
the plan, so that a resumed import cannot mix two sources.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from manifests.dataset import DATASET, DatasetInfo
from manifests.errors import DataError, UsageError
from manifests.images import LABELED_FORMATS, decode
from manifests.schema import Row
from manifests.shard import ShardWriter, done_record
from manifests.storage import Storage, check_url
from pipeline.executors.settings import executor
from pipeline.recipe import Recipe
from pipeline.synth import SynthResult, run_synth
from pipeline.terminal import plain, progress, say
from stages.distill.eval_data import LabeledImages, Sample, labeled_images, unlabeled_images
from stages.memory import find_device
from stages.models.inputs import InputSpec, to_unit
from stages.models.loading import load_teacher
from stages.models.source import ModelSource
from stages.progress import OnProgress, ShardWatch
from stages.settings import InputSettings, SynthSettings
from stages.synth.images import as_stored, encode_image, to_pixels
from stages.synth.inputs import SynthInputs, check_network, model_sources
from stages.synth.scores import judge, score

METHOD = "import"
DEFAULTS = {"name": METHOD, "synth": {"groups_per_shard": 20, "group_size": 50}}
"""Below the user's settings: 1,000 images a shard."""
LABELS = ("auto", "data", "teacher")
WORKER = "pipeline.import_data:ImportWorker"
MAX_SHOWN = 5


@dataclass
class Source:
    """The images at ``data``, in their order. ``labels``: whether those of the data count, else all are the teacher's;
    ``total``, ``digest``: of everything that was read at first; ``bad``: images that this process could not decode."""

    data: str
    class_names: tuple[str, ...]
    labels: bool
    total: int = 0
    digest: str = ""
    bad: list[str] = field(default_factory=list)
    _walk: Iterator[Sample] | None = None
    _at: int = 0

    def images(self) -> LabeledImages:
        return (labeled_images if self.labels else unlabeled_images)(self.data, self.class_names)

    def take(self, start: int, count: int) -> list[Sample]:
        """``count`` samples from place ``start``, fewer at the end. Raises DataError where the source has changed."""
        if self._walk is None or self._at > start:
            self._walk, self._at = iter(self.images()), 0
        walk, self._walk = self._walk, None  # a walk that fails is begun again
        for _ in islice(walk, start - self._at):
            pass
        samples = list(islice(walk, count))
        if len(samples) != max(0, min(count, self.total - start)):
            raise DataError(f"{self.data} has changed while it was imported: it held {self.total} images")
        self._walk, self._at = walk, start + len(samples)
        return samples


@dataclass(frozen=True)
class ImportResult:
    """``dataset``: what was made; ``labels``: where labels come from; ``bad``: images that could not be decoded, of
    ``images`` in ``source``."""

    dataset: SynthResult
    source: str
    labels: str
    images: int
    bad: int

    def lines(self) -> Iterator[str]:
        yield from self.dataset.lines()
        yield f"labels: {plain(self.labels)}"
        if self.bad:
            yield f"left out: {self.bad:,} of {self.images:,} could not be decoded"


def import_data(
    recipe: Recipe, data: str, out: str, labels: str = "auto", source: str | None = None, license_: str | None = None
) -> ImportResult:
    """Make a dataset in ``out`` of the images at ``data`` (a folder, tars or Parquet), with the teacher of ``recipe``;
    the same call resumes.

    ``labels``: ``data`` takes the labels of the data, which must fit the teacher's classes, ``teacher`` the teacher's
    answers, ``auto`` the former where they fit. ``source``, ``license_``: what the dataset's card says of them.

    Raises UsageError for settings that cannot work, DataError where the data cannot be read or the folder holds another
    dataset, Interrupted where a signal stopped it.
    """
    if labels not in LABELS:
        raise UsageError(f"--labels {labels}: expected {', '.join(LABELS)}")
    check_outside(data, out)
    sources = model_sources(recipe.synth)
    config = sources["teacher"].config
    found, line = look(data, config.class_names, labels)
    say(f"labels: {line}")
    if recipe.synth.images.intermediates:
        raise UsageError("imported images have no intermediate ones: leave images.intermediates at 0")
    per_shard = recipe.synth.groups_per_shard * recipe.synth.group_size
    recipe = recipe.changed(f"synth.method={METHOD}", f"synth.shards={-(-found.total // per_shard)}")
    prior = notes(out) | {"name": METHOD, "sha256": found.digest, "conditioning": "none"}
    prior["source"] = source or prior.get("source") or os.path.basename(data.rstrip("/"))
    prior["license"] = license_ or prior.get("license")
    side = recipe.synth.images.size or config.input.size
    inputs = SynthInputs(prior, sources["teacher"].identity, None, config.class_names, side, sources)
    place = executor(workers=1)
    dataset = run_synth(
        recipe,
        out,
        place,
        worker=WORKER,
        title=METHOD,
        inputs=inputs,
        local={"source": found, "teacher": sources["teacher"]},
    )
    for problem in found.bad[:MAX_SHOWN]:
        say(f"left out: {problem}")
    if not dataset.rows:
        raise DataError(f"{data}: none of {found.total:,} images could be decoded")
    return ImportResult(dataset, data, line, found.total, found.total - dataset.rows)


def notes(out: str) -> dict[str, Any]:
    """What an earlier call said of the images' source and license; {} where there was none."""
    storage = Storage(out)
    if not storage.exists(DATASET):
        return {}
    said = DatasetInfo.from_json(storage.read(DATASET), storage.path(DATASET)).prior
    return {name: said[name] for name in ("source", "license") if isinstance(said.get(name), str)}


def check_outside(data: str, out: str) -> None:
    """Raises UsageError where ``out`` lies in the folder ``data``: its shards would be read as data the next time."""
    url = check_url(out)
    if "://" not in data and "://" not in url and os.path.isdir(data):
        folder = os.path.realpath(data)
        if os.path.commonpath((folder, os.path.realpath(url))) == folder:
            raise UsageError(f"--out {out} would lie inside {data}, which is only read: name another folder")


def look(data: str, class_names: tuple[str, ...], labels: str) -> tuple[Source, str]:
    """The source with its total and checksum, and where its labels come from. Reads everything once."""
    line = "the teacher's answers"
    if labels != "teacher":
        source = Source(data, class_names, labels=True)
        try:
            return source, read_through(source)
        except DataError as error:
            if labels == "data":
                raise
            if source.total:  # labels that fitted so far: to drop them all for one is the user's decision
                raise DataError(f"{error}; --labels teacher takes the teacher's answers for all images") from None
            line = f"the teacher's answers, since those of the data do not fit ({error})"
    source = Source(data, class_names, labels=False)
    read_through(source)
    return source, line


def read_through(source: Source) -> str:
    """Fill in total and checksum; what the labels mean. Raises DataError for what is no such data."""
    images = source.images()
    if images.of_dataset:
        raise UsageError(f"{source.data} is a dataset already: factory rescore judges it by another teacher")
    with progress("read", brief=True) as shown:
        for _ in images:
            source.total = images.count
            shown(images.count, images.total or 0, "")
    say(f"images: {images.line}")
    kind = b"data" if source.labels else b"teacher"
    source.total, source.digest = images.count, hashlib.sha256(kind + images.digest.digest()).hexdigest()
    return images.class_order


class ImportWorker:
    """A worker that makes shards of ``source``; the others of stage 1 are in :mod:`stages.synth`."""

    def __init__(
        self,
        settings: dict[str, Any],
        storage: str,
        fingerprint: str,
        planned: Mapping[str, Any],
        source: Source,
        teacher: ModelSource,
    ) -> None:
        self.settings = SynthSettings.model_validate(settings)
        self.storage, self.fingerprint, self.source = Storage(storage), fingerprint, source
        self.storage.hold()
        torch.set_num_threads(self.settings.threads)
        self.device = find_device(self.settings.device)
        self.teacher = load_teacher(teacher, self.device)
        check_network(planned, "teacher", self.settings.teacher.name, self.teacher.identity)
        weights = self.teacher.class_weights
        self.weights = None if weights is None else weights.cpu()
        self.view = InputSpec(scaled(self.teacher.input.settings, self.settings.images.size)).view

    def run(self, shard: int, on_progress: OnProgress | None = None) -> dict[str, Any]:
        """Make and commit ``shard`` (at once if it is committed already); a small report of JSON values."""
        started, groups, bad = time.monotonic(), self.settings.groups_per_shard, len(self.source.bad)
        watch = ShardWatch(shard, groups, 1, on_progress)
        record = done_record(self.storage, shard)
        if record is None:
            with ShardWriter(self.storage, shard, self.fingerprint) as writer:
                for group in range(shard * groups, (shard + 1) * groups):
                    watch.end_group(self.add_group(writer, group))
                record = writer.commit()
        bad = len(self.source.bad) - bad
        return {
            "shard": shard,
            **record.report,
            "seconds": round(time.monotonic() - started, 3),
            **watch.judgment,
            **({"warnings": [f"{bad} images could not be decoded"]} if bad else {}),
        }

    def add_group(self, writer: ShardWriter, group: int) -> list[Row]:
        """Score and append the images of ``group``; their rows."""
        settings, size = self.settings, self.settings.group_size
        pixels, places, given = [], [], []
        for place, (key, data, label) in enumerate(self.source.take(group * size, size), group * size):
            try:
                picture = torch.from_numpy(decode(data, None, LABELED_FORMATS).copy())
            except ValueError as error:
                self.source.bad.append(f"{key}: {error}")
                continue
            pixels.append(to_pixels(self.view(to_unit(picture[None]))))
            places.append(place)
            given.append(label)
        if not pixels:
            return []
        kind = settings.images.format
        stored, files = as_stored(torch.cat(pixels), kind)
        encoded = [encode_image(file, kind) if isinstance(file, torch.Tensor) else file for file in files]
        logits, features = judge(self.teacher, to_unit(stored).to(self.device))
        labels = given if self.source.labels else logits.argmax(1).tolist()
        rows = [
            {
                "key": f"{group}-{place}",
                "label": label,
                "class_name": self.teacher.class_names[label],
                "method": METHOD,
                "seed": settings.seed,
                "group": group,
                "trajectory": place,
                "timestep": 0,
                "source_key": None,
                "cosine_ref": f"class:{label}",
                "cosine_space": "teacher",
            }
            for place, label in zip(places, labels, strict=True)
        ]
        columns = score(rows, logits, features, self.weights, settings.min_confidence, 0.0)
        for row, column, values, file in zip(rows, columns, logits.half().tolist(), encoded, strict=True):
            row |= column | ({"logits": values} if settings.store_logits else {})
            del row["key"]  # the writer's
            writer.add(row, file, kind)
        return rows


def scaled(rule: InputSettings, side: int | None) -> InputSettings:
    """The teacher's input ``rule`` for images that are stored with another ``side``: the same crop of the picture."""
    if side is None or side == rule.size:
        return rule
    short = rule.resize_size
    if isinstance(short, int):
        short = max(side, round(short * side / rule.size))
    elif short is not None:
        short = (max(side, round(short[0] * side / rule.size)), max(side, round(short[1] * side / rule.size)))
    return rule.model_copy(update={"size": side, "resize_size": short})
