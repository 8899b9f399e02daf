"""The demo: what guidance is worth at equal images, measured on real digits that neither stage has seen.

``factory demo`` makes a guided and an unguided dataset from one recipe (unguided: method ``dmkd``, the same prior,
seeds and number of images), distils one student from each, and prints teacher and students side by side.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from manifests.errors import FactoryError
from manifests.local import temporary_name
from manifests.merge import MANIFEST
from manifests.reader import Manifest
from manifests.storage import Storage
from pipeline.distill import learnt_by, run_distill
from pipeline.executors.settings import synth_place
from pipeline.inspect import contact_sheet, hstack, png, samples
from pipeline.plan import local_folder
from pipeline.recipe import resolve
from pipeline.synth import run_synth
from pipeline.terminal import duration, plain, say
from stages.settings import SynthSettings, student_name

MINUTES = 2
UNGUIDED = "dmkd"
PICTURE = "guidance.png"
TEST = "test-digits.parquet"
PICTURES_PER_CLASS = 6


def run_demo(out: str, sets: Sequence[str] = (), workers: int = 1, retry_failed: bool = False) -> dict[str, Any]:
    """Run everything into ``out`` (resuming what is there); returns the table's numbers and the paths. JSON-able.

    Raises UsageError, before anything runs, for an ``out`` that is no local folder and for ``workers`` below 1,
    FactoryError where the first student was parked.
    """
    guided = resolve("demo", sets=sets)
    flags = {"workers": ("--workers", workers), "retry_failed": ("--retry-failed", retry_failed)}
    place = synth_place(guided.synth, flags)
    root = local_folder(out, "the demo needs a local folder, since the real digits lie there")
    say(f"about {MINUTES} minutes on two CPU cores: guided and unguided images, then a student from each")
    started = time.monotonic()
    unguided = guided.model_copy(
        update={
            "synth": without_guidance(guided.synth),
            "distill": guided.distill.model_copy(update={"min_agreement": 0.0}),  # no news: nothing guided it
        }
    )
    runs: dict[str, dict[str, Any]] = {}
    for name, recipe in (("guided", guided), ("unguided", unguided)):
        runs[name] = {"synth": run_synth(recipe, root.folder(name), place, title=f"{name} images")}
    root.write(PICTURE, picture(root.path("unguided"), root.path("guided")))
    test = _test_digits(root)
    students: dict[str, dict[str, Any]] = {}
    for name, recipe in (("guided", guided), ("unguided", unguided)):
        sources = [(root.path(f"{name}/{MANIFEST}"), 1.0)]
        runs[name]["distill"] = run_distill(
            recipe, sources, root.folder(f"{name}/distill"), test_data=test, title=f"{name} student"
        )
        students[name] = learnt_by(student_name(recipe.distill.students[0]), runs[name]["distill"], f"{name} student")
        if students[name]["test"] is None:  # a warning said why
            raise FactoryError(f"the {name} student has no score on the test digits")
    return {
        "out": root.url,
        "teacher": runs["guided"]["distill"]["teacher_accuracy"],
        "guided": students["guided"]["test"]["accuracy"],
        "unguided": students["unguided"]["test"]["accuracy"],
        "images": runs["guided"]["synth"]["kept"],
        "images_unguided": runs["unguided"]["synth"]["kept"],
        "picture": root.path(PICTURE),
        "student": students["guided"]["folder"],
        "seconds": round(time.monotonic() - started, 1),
    }


def without_guidance(synth: SynthSettings) -> SynthSettings:
    """The same prior, seeds and number of images; nothing that :data:`UNGUIDED` would refuse as unused."""
    guidance = synth.guidance.model_copy(update={"adversarial": 0.0})
    lca = synth.lca.model_copy(update={"every": 0})
    return synth.model_copy(update={"method": UNGUIDED, "guidance": guidance, "lca": lca, "adversary": None})


def picture(unguided: str, guided: str) -> bytes:
    """Samples of both datasets, the same classes in the same rows, as PNG bytes."""
    panels = []
    for title, folder in (("unguided", unguided), ("guided", guided)):
        panels.append((title, contact_sheet(samples(Manifest.open(folder), columns=PICTURES_PER_CLASS))))
    return png(hstack(panels))


def _test_digits(root: Storage) -> str:
    """The real digits that score the students; written here, read by nothing before the very end."""
    from stages.digits import write_split

    root.put_file(write_split("test", root.scratch() / temporary_name("write")), TEST)
    return root.path(TEST)


def lines(result: dict[str, Any]) -> Iterator[str]:
    """The table."""
    yield ""
    yield f"{'accuracy on real digits':<36}{'images':>8}{'test':>9}"
    yield f"{'teacher (the real training digits)':<36}{'':>8}{result['teacher']:>9.1%}"
    yield f"{'student, guided synthesis':<36}{result['images']:>8}{result['guided']:>9.1%}"
    yield f"{'student, unguided synthesis':<36}{result['images_unguided']:>8}{result['unguided']:>9.1%}"
    yield ""
    yield f"pictures: {plain(result['picture'])} (unguided beside guided)"
    yield f"student:  {plain(result['student'])}"
    yield f"took {duration(result['seconds'])}"
