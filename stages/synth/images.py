"""From decoded floats to stored bytes."""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from manifests.images import decode


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
