"""From decoded floats to stored bytes, encoded and appended to a shard on a thread beside the sampling."""

import io
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from manifests.images import decode
from manifests.schema import Row
from manifests.shard import ShardWriter


def to_pixels(images: Tensor, size: int | None = None) -> Tensor:
    """``[n, 3, h, w]`` in [−1, 1] to uint8 ``[n, size, size, 3]`` on the CPU (antialiased where it shrinks)."""
    if size is not None and size != images.shape[-1]:
        images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()


def encode_image(pixels: Tensor, kind: str) -> bytes:
    """uint8 ``[h, w, 3]`` as an encoded file; png is lossless, jpg and webp use quality 95."""
    buffer, image = io.BytesIO(), Image.fromarray(pixels.numpy())
    if kind == "png":
        image.save(buffer, "PNG", compress_level=6)
    else:
        image.save(buffer, {"jpg": "JPEG", "webp": "WEBP"}[kind], quality=95)
    return buffer.getvalue()


def as_stored(pixels: Tensor, kind: str) -> tuple[Tensor, list[Tensor] | list[bytes]]:
    """uint8 ``[n, h, w, 3]`` as it will be read back, and for each image what the writer takes: its file where encoding
    changes pixels, else the pixels, which the writer encodes beside the sampling."""
    if kind == "png":
        return pixels, [*pixels]
    encoded = [encode_image(image, kind) for image in pixels]
    return torch.from_numpy(np.stack([decode(data) for data in encoded])), encoded


Sample = tuple[Row, Tensor | bytes]
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
