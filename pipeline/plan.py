"""The plan of a run folder: what it will hold, written once, so that a resumed run cannot mix two datasets.

Used by ``factory run synth`` (create or resume) and read by ``status``, ``gc`` and ``rebuild``.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from manifests.checked_json import dump_checked, load_as, load_checked
from manifests.dataset import DATASET, MAX_SHARD
from manifests.errors import DataError, UsageError
from manifests.schema import FORMAT_VERSION
from manifests.storage import Storage
from pipeline.events import LOCAL as EVENTS
from pipeline.events import quarantined, release
from pipeline.lease import live
from pipeline.recipe import Recipe, to_yaml
from stages.models.folders import WEIGHTS
from stages.models.source import ModelSource
from stages.synth.inputs import SynthInputs, semantics


def local_folder(out: str, why: str) -> Storage:
    """``out`` as a folder of this machine, there already or not.

    Raises UsageError for a URL, saying ``why``, and for a file.
    """
    storage = Storage(out)
    if not storage.is_local:
        raise UsageError(f"--out {out}: {why}")
    storage.refuse_file()
    return storage


FOLDER = "teacher"
"""Where a dataset carries its built-in teacher, so that a manifest alone is enough to distill from."""


@dataclass(frozen=True)
class TeacherCopy:
    """The files to publish below ``folder``, and the identity that the manifest's metadata stores."""

    files: dict[str, bytes]
    identity: dict[str, Any]
    folder: str = FOLDER


def prepare(source: ModelSource, content_addressed: bool = False) -> TeacherCopy:
    """Check and, where its weights are no safetensors file, convert the teacher ``source``. Loading its weights finds a
    damaged file before anything is written.

    The stored identity names the copy (``path``, ``sha256``); where converting changed the bytes, ``source_sha256`` is
    the user's file. An external teacher is not copied: nothing is ever loaded from metadata for it. With
    ``content_addressed`` the folder is named after its files, so that it never replaces another teacher's.

    Raises DataError where the weights are damaged or do not fit.
    """
    identity = source.identity
    if identity["kind"] != "builtin":
        return TeacherCopy({}, identity)
    from stages.models.loading import source_files

    files, folder = source_files(source), FOLDER
    if content_addressed:
        folder += f"-{hashlib.sha256(b''.join(files[name] for name in sorted(files))).hexdigest()[:12]}"
    stored = identity | {"path": f"{folder}/{WEIGHTS}", "sha256": hashlib.sha256(files[WEIGHTS]).hexdigest()}
    if stored["sha256"] != identity["sha256"]:
        stored["source_sha256"] = identity["sha256"]
    return TeacherCopy(files, stored, folder)


def publish(storage: Storage, copy: TeacherCopy) -> None:
    """Write the files that are not there with the same content (a plan that was never started may be replaced)."""
    for name, data in copy.files.items():
        target = f"{copy.folder}/{name}"
        if storage.size(target) != len(data) or storage.read(target, most=None) != data:
            storage.write(target, data)


PLAN = "plan.json"
BEFORE_SHARDS = (FOLDER, "decoder", "events", "lease", "failed")
"""Folders that stage 1 may write into before its first shard."""
RESOLVED = "resolved.yaml"
RECORDED_VERSIONS = ("dfkd-factory", "torch", "diffusers", "transformers", "numpy", "pillow", "pyarrow", "ray")


@dataclass(frozen=True)
class Plan:
    """``fingerprint`` covers ``semantics`` only: not the number of shards, nor versions (recorded, not compared)."""

    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    shards: Annotated[int, Field(strict=True, ge=1, le=MAX_SHARD + 1)]
    recipe: dict[str, Any]
    semantics: dict[str, Any]
    versions: dict[str, str]
    format_version: int = FORMAT_VERSION

    __pydantic_config__ = ConfigDict(extra="forbid")

    def to_json(self) -> bytes:
        """Readable, with its own checksum."""
        return dump_checked(asdict(self))

    @classmethod
    def from_json(cls, data: bytes, where: str) -> "Plan":
        """Raises DataError where ``data`` is no plan; ``where`` names it in the message."""
        try:
            values = load_checked(data)
            if "recipe" in values and (version := values.get("format_version", 1)) != FORMAT_VERSION:
                raise ValueError(f"its format version is {version}, this program's {FORMAT_VERSION}: use another --out")
            return load_as(cls, values)
        except ValueError as error:
            raise DataError(f"{where} is not a plan of this program ({error})") from None


def make_plan(recipe: Recipe, inputs: SynthInputs) -> Plan:
    """The plan of stage 1 for ``recipe`` with the prior and teacher that ``inputs`` identifies."""
    meant = semantics(recipe.synth, inputs)
    return Plan(
        fingerprint=fingerprint(meant),
        shards=recipe.synth.shards,
        recipe=recipe.model_dump(mode="json"),
        semantics=json.loads(json.dumps(meant)),
        versions=versions(),
    )


def fingerprint(meant: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of what is meant: sorted keys, no spaces, no NaN."""
    text = json.dumps(meant, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_plan(storage: Storage) -> Plan:
    """The plan of a run folder; DataError where there is none."""
    if not storage.exists(PLAN):
        raise DataError(f"{storage.url} is not a run folder: it holds no {PLAN}")
    return Plan.from_json(storage.read(PLAN), storage.path(PLAN))


def open_or_create(storage: Storage, plan: Plan) -> bool:
    """Write ``plan`` into an empty folder, or check that the one there allows it; changes nothing else. True where it
    was written.

    Raises DataError with the differences where the folder belongs to another plan, UsageError for fewer shards.
    """
    if check_folder(storage, plan):
        if storage.create(PLAN, plan.to_json()):
            return True
        check_folder(storage, plan)  # another driver was quicker
    return False


def check_folder(storage: Storage, plan: Plan) -> bool:
    """Whether ``plan`` would be the folder's first. Writes nothing; errors as :func:`open_or_create`."""
    if not storage.exists(PLAN):
        storage.refuse_file()
        _refuse_foreign(storage)
        return True
    stored = read_plan(storage)
    if stored.fingerprint != plan.fingerprint and live(storage) is not None:
        raise _another_plan(storage, stored, plan)
    _check(storage, stored, plan)
    return False


def withdraw(storage: Storage) -> None:
    """Take back a plan that was written just now and cannot be carried out (its models do not fit each other, say).

    Deletes what stage 1 writes before the first shard, by name, the plan last, and then what folders are empty. Does
    nothing where there are shards or another driver is at work.
    """
    if live(storage) or storage.list("done") or storage.list("shards"):
        return
    for name in storage.temporary()[0]:
        storage.drop_temporary(name)
    for folder in BEFORE_SHARDS:
        for name in storage.list(folder):
            storage.delete(name)
    for name in (RESOLVED, DATASET, EVENTS, "progress.json", "wandb-id.txt", "mlflow-id.txt", PLAN):
        storage.delete(name)
    for folder in (*BEFORE_SHARDS, "shards", "tmp", "") if storage.is_local else ():
        with suppress(OSError):  # absent, or it holds somebody's file
            os.rmdir(os.path.join(storage.url, folder))


def resume_plan(storage: Storage, plan: Plan, on_line: Callable[[str], None] = lambda line: None) -> Plan:
    """The plan to work by, called while holding the folder's lease: more shards than stored are added, and a plan
    of which nothing was made (its prior was damaged, say) is replaced. Errors as :func:`open_or_create`.

    Settings of stage 2 decide no image: those of ``plan`` replace the stored ones, and ``on_line`` is given a line
    that names what changed.
    """
    stored = read_plan(storage)
    _check(storage, stored, plan)
    settled = stored
    edited = differences(*({"distill": recipe.get("distill")} for recipe in (stored.recipe, plan.recipe)))
    if stored.fingerprint != plan.fingerprint:
        release(storage, quarantined(storage))
        settled = plan
    elif plan.shards > stored.shards or edited:
        settled = replace(stored, shards=plan.shards, recipe=plan.recipe)
        if edited:
            on_line(f"stage 2's settings stored in {storage.url} are replaced: {'; '.join(edited)}")
    if settled is not stored or not storage.exists(RESOLVED):  # the plan last: it decides whether this is done again
        storage.write(RESOLVED, to_yaml(Recipe.model_validate(settled.recipe)))
    if settled is not stored:
        storage.write(PLAN, settled.to_json())
    return settled


def _check(storage: Storage, stored: Plan, plan: Plan) -> None:
    if stored.fingerprint != plan.fingerprint:
        is_begun = bool(storage.list("done"))
        if is_begun or storage.list("shards"):  # a tar does not tell its plan: it could be taken for one of this one's
            way_out = "" if is_begun else " (or delete its unfinished shards with factory gc)"
            raise _another_plan(storage, stored, plan, way_out)
    elif plan.shards < stored.shards:
        raise UsageError(
            f"{storage.url} is planned for {stored.shards} shards, {plan.shards} asked for: shards can only grow "
            f"(--shards {stored.shards} or more)"
        )


def _another_plan(storage: Storage, stored: Plan, plan: Plan, way_out: str = "") -> DataError:
    head = f"{storage.url} holds another plan; give another --out, or its own settings ({RESOLVED} there){way_out}"
    return DataError("\n".join([head, *(f"  {line}" for line in differences(_described(stored), _described(plan)))]))


def _described(plan: Plan) -> dict[str, Any]:
    """What the fingerprint covers, with the defaults that :func:`stages.synth.inputs.semantics` leaves out."""
    settings = dict(plan.recipe.get("synth", {}))
    for place in ("shards", "device", "loggers", "teacher", "adversary"):
        settings.pop(place, None)
    for section, place in (("prior", "path"), ("prior", "lora"), ("guidance", "tiny_decoder")):
        settings[section] = {key: value for key, value in settings.get(section, {}).items() if key != place}
    return {**plan.semantics, "settings": settings}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """``settings.guidance.step_size: 0.1 there, 0.2 here``, one line for each key that differs."""
    left, right = dict(flattened(there)), dict(flattened(here))
    lines = []
    for key in sorted(left.keys() | right.keys()):
        a, b = left.get(key, "absent"), right.get(key, "absent")
        if a != b:
            lines.append(f"{key}: {_short(a)} there, {_short(b)} here")
    return lines


def versions() -> dict[str, str]:
    """Versions of what makes the bytes, without importing any of it."""
    found = {}
    for name in RECORDED_VERSIONS:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _refuse_foreign(storage: Storage) -> None:
    """A folder without a plan must hold nothing else, so that no user's files end up inside a dataset."""
    found = sorted(os.listdir(storage.url)) if storage.is_local and os.path.isdir(storage.url) else storage.list("")
    if found == ["tmp"] and not storage.temporary()[1]:
        return  # a run killed while it wrote its plan
    if found:
        raise DataError(f"{storage.url} is no run folder and not empty (it holds {found[0]}); give another --out")


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested ``values`` by its dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def changed_settings(
    values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """``(key, value, default)`` of every setting in nested ``values`` that differs from its default; a default that is
    not there is {}."""
    usual = dict(flattened(defaults))
    found = ((key, value, usual.get(key, {})) for key, value in flattened(values))
    return [(prefix + key, value, default) for key, value, default in found if value != default]


def changed_lines(
    values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, str | None]]:
    """:func:`changed_settings` as entries of a report, in few words each."""
    changed = changed_settings(values, defaults, prefix)
    yield "settings", f"{len(changed)} differ from the defaults (all of them: --json)" if changed else "all defaults"
    for key, value, default in changed:
        was = "" if default in ({}, None, [], "") else f" (default {_short(default)})"
        yield "", f"{key} = {_short(value)}{was}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:24]}…{text[-24:]}"
