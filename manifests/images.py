"""Encoded images to pixels. Bytes come from files that others made, so format and size are checked before decoding."""

import io
import warnings

import numpy as np
from PIL import Image

from manifests.errors import one_line

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""What may be decoded. Pillow knows dozens of formats by their content, and hands one of them to Ghostscript."""
MAX_PIXELS = 1 << 26
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound is lower, and an error


def decode(data: bytes, side: int | None = None) -> np.ndarray:
    """uint8 ``[h, w, 3]`` of an encoded image, ``side × side`` where that is given.

    Raises ``ValueError`` for anything else, before a pixel is decoded where its format or size tells.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if side is not None and (width, height) != (side, side):
                raise ValueError(f"{width}×{height} pixels, expected {side}×{side}")
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width}×{height} pixels are more than {MAX_PIXELS}")
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's parsers raise whatever hostile bytes provoke
        raise ValueError(f"not a readable image: {one_line(error, 200)}") from None
