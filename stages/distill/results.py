"""``results.json`` of a run, and the test scores in it, which a later command without test data keeps."""

from collections.abc import Mapping
from typing import Any

from manifests.checked_json import dump_checked, load_checked
from manifests.dataset import is_count, is_sha256
from manifests.errors import DataError
from manifests.storage import Storage
from stages.distill.runtime import Callbacks

RESULTS = "results.json"
WEIGHTS = "weights_sha256"
MAX_BYTES = 256 << 20
"""Of results that are read again; a confusion matrix of 1000 classes takes some 10 MB."""
Scores = Mapping[str, tuple[str, dict[str, Any]]]
"""By student the sha256 of the weights that were scored, and the score as ``evaluate_net`` returns it."""


def write_results(storage: Storage, results: Mapping[str, Any]) -> None:
    """Replace the results, sealed: a score that is kept must be the one that was measured."""
    storage.write(RESULTS, dump_checked(results))


def measured_before(storage: Storage, measured_now: bool = False) -> Scores:
    """The test scores that an earlier command left.

    Raises DataError if they cannot be read and are not ``measured_now`` again: they would be lost.
    """
    size = storage.size(RESULTS)
    if size is None:
        return {}
    try:
        if size > MAX_BYTES:
            raise ValueError(f"{size} bytes")
        students = load_checked(storage.read(RESULTS))["students"]
        found = {name: (facts[WEIGHTS], facts["test"]) for name, facts in students.items() if facts["test"]}
        for weights, test in found.values():
            _check(weights, test)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if measured_now:
            return {}
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise DataError(
            f"{storage.path(RESULTS)} is damaged ({reason[:200]}), so its test scores cannot be kept: "
            "measure them again with --test-data, or delete it"
        ) from None
    return found


def keep_score(name: str, weights: str, before: Scores, callbacks: Callbacks) -> dict[str, Any] | None:
    """The score that ``weights`` of student ``name`` were given before; None, with a warning, where others were."""
    if name not in before:
        return None
    scored, test = before[name]
    of = f"{test['accuracy']:.1%} on {test['images']} images of {test['data']['path']}"
    if scored != weights:
        callbacks.on_event("warning", message=f"{name}: its weights changed since its test score: {of} is left out")
        return None
    callbacks.on_event("note", message=f"{name}: its test score was measured before and is kept: {of}")
    return test


def _check(weights: Any, test: Any) -> None:
    """Raises ValueError, KeyError or TypeError for what is no score."""
    shares = [test[name] for name in ("accuracy", "agreement", "teacher_accuracy")]
    fine = (
        is_sha256(weights)
        and is_sha256(test["data"]["sha256"])
        and isinstance(test["data"]["path"], str)
        and is_count(test["images"])
        and all(isinstance(share, float) and 0 <= share <= 1 for share in shares)
    )
    if not fine:
        raise ValueError("a score is damaged")
