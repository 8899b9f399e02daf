"""The teacher's columns for another teacher or threshold, without new images.

The new manifest lies beside the old one and names the same tars; nothing that is there already is changed.
"""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from manifests.dataset import DatasetInfo
from manifests.errors import DataError, UsageError
from manifests.merge import MANIFEST, write_manifest
from manifests.reader import Manifest
from manifests.storage import split
from pipeline.lease import Lease
from pipeline.plan import prepare, publish
from pipeline.terminal import duration, plain, progress, say
from stages.models.source import resolve
from stages.settings import ModelSettings

DEFAULT = "rescored.parquet"


@dataclass(frozen=True)
class RescoreResult:
    """The new ``manifest`` and the one that it was made from, ``source``; ``teacher``: the identity of the judge."""

    manifest: str
    source: str
    teacher: dict[str, Any]
    threshold: float
    rows: int
    kept_before: int
    kept: int
    seconds: float

    def lines(self) -> Iterator[str]:
        yield (
            f"{self.rows} images, {self.kept} kept (before: {self.kept_before}) at threshold {self.threshold:g}, "
            f"teacher {plain(self.teacher.get('architecture'))}, sha256 {plain(self.teacher.get('sha256'))[:12]}, "
            f"{duration(self.seconds)}"
        )
        yield f"manifest: {plain(self.manifest)}"


def rescore(
    url: str,
    teacher: str | None = None,
    threshold: float | None = None,
    out: str | None = None,
    device: str = "cpu",
    quiet: bool = False,
) -> RescoreResult:
    """Write a manifest like ``url`` with the teacher columns of ``teacher`` (default: the one that the dataset
    carries) and ``kept`` by ``threshold`` (default: the manifest's own).

    Raises UsageError where neither is given, ``out`` lies elsewhere or ``device`` cannot be used, DataError where the
    file exists already, the teacher has other classes, or images are damaged.
    """
    if teacher is None and threshold is None:
        raise UsageError("say what shall change: --teacher, --threshold or both")
    if threshold is not None and not 0 <= threshold <= 1:
        raise UsageError(f"--threshold {threshold:g}: expected a probability, 0 to 1")
    manifest = Manifest.open(url)
    storage, name = manifest.storage, target(manifest, out)
    started = time.monotonic()
    source = resolve(ModelSettings(name=teacher)) if teacher else None
    copy = prepare(source, content_addressed=True) if source else None
    least = own_threshold(manifest.info) if threshold is None else threshold
    from stages.memory import find_device
    from stages.models.loading import check_classes, dataset_teacher, load_teacher
    from stages.synth.scores import rescored as score_again

    device = str(find_device(device))
    model = load_teacher(source, device) if source else dataset_teacher(manifest, device)
    check_classes(model, manifest)  # before anything is written
    rescored = {
        "threshold": least,
        "from_manifest": manifest.digest,
        "from_teacher": manifest.info.teacher.get("sha256"),
    }
    info = replace(manifest.info, teacher=copy.identity if copy else manifest.info.teacher, rescored=rescored)
    with Lease(storage, on_line=say), progress("rescore", quiet=quiet) as shown:
        if copy:
            publish(storage, copy)
        tables = score_again(manifest, model, least, device, lambda rows: shown(rows, manifest.num_rows, ""))
        write_manifest(storage, name, info, tables)
    made = Manifest.open(storage.path(name))
    return RescoreResult(
        manifest=made.url,
        source=manifest.url,
        teacher=info.teacher,
        threshold=least,
        rows=made.num_rows,
        kept_before=manifest.num_kept,
        kept=made.num_kept,
        seconds=round(time.monotonic() - started, 3),
    )


def target(manifest: Manifest, out: str | None) -> str:
    """The name of the new manifest in the dataset's folder, free to be written."""
    storage, name = manifest.storage, DEFAULT
    if out is not None:
        bare = "/" not in out and os.sep not in out
        folder, name = (storage, out) if bare else split(out)
        if folder.url != storage.url:
            raise UsageError(f"--out {out}: a manifest lies beside its tars, in {storage.url}")
        if not name.endswith(".parquet") or name == MANIFEST:
            raise UsageError(f"--out {out}: expected a name that ends in .parquet and is not {MANIFEST}")
    if storage.exists(name):
        raise DataError(f"{storage.path(name)} exists already; name another file with --out, or delete it")
    return name


def own_threshold(info: DatasetInfo) -> float:
    """The threshold by which the rows of a manifest were kept; 0 where it does not tell."""
    source = info.rescored or info.recipe.get("synth")
    value = source.get("threshold" if info.rescored else "min_confidence", 0.0) if isinstance(source, dict) else 0.0
    fits = isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= 1
    return float(value) if fits else 0.0
