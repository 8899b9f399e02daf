"""Images encoded and appended to a shard on a thread of their own, beside the sampling. Used by every shard worker."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from torch import Tensor

from manifests.shard import ShardWriter
from stages.synth.images import encode_image

Sample = tuple[dict[str, Any], Tensor | bytes]
"""A manifest row and its image: pixels, uint8 ``[h, w, 3]`` on the CPU, or the encoded file."""


class ImageWriter:
    """At most one group behind the sampler, in the order given; what goes wrong there is raised by the next call.

    Encoding releases the interpreter lock, so that it costs no time while a GPU samples the next group. A context
    manager: leaving waits for the thread, so that nothing writes into a shard that is given up.
    """

    def __init__(self, shard: ShardWriter, kind: str) -> None:
        self.shard, self.kind = shard, kind
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._pending: Future[None] | None = None

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)

    def write(self, samples: Sequence[Sample]) -> None:
        """Hand over a group, as soon as the one before is written."""
        self.flush()
        self._pending = self._thread.submit(self._write, samples)

    def flush(self) -> None:
        """Wait until everything handed over is in the shard. Call before its commit."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, samples: Sequence[Sample]) -> None:
        for row, image in samples:
            data = image if isinstance(image, bytes) else encode_image(image, self.kind)
            self.shard.add(row, data, self.kind)
