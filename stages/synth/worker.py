"""What an executor runs, in its own process or in an actor: ``build_worker`` is the factory that executors name.

Imports torch only when a worker is built, so that the driver and ``--method noise`` do without it.
"""

from collections.abc import Callable
from typing import Any, Protocol

from stages.synth.settings import SynthSettings

OnGroup = Callable[[int, int], None]  # (groups done, groups in the shard)


class Worker(Protocol):
    """Makes shards of one plan."""

    def run(self, shard: int, on_group: OnGroup | None = None) -> dict[str, Any]:
        """Make and commit ``shard`` (at once if it is committed already); a small JSON-able report."""


def build_worker(
    settings: dict[str, Any], storage: str, fingerprint: str, planned: dict[str, Any] | None = None
) -> Worker:
    """A worker for ``settings`` (dumped :class:`SynthSettings`) that commits into the folder or bucket ``storage``.

    Raises DataError where a model that it loads is not the ``planned`` one (:mod:`stages.synth.planned`).
    """
    parsed = SynthSettings.model_validate(settings)
    if parsed.method == "noise":
        from stages.synth.methods.noise import NoiseWorker

        return NoiseWorker(parsed, storage, fingerprint)
    from stages.synth.shard_worker import ShardWorker

    return ShardWorker(parsed, storage, fingerprint, planned)
