"""Encoded images to pixels. Bytes come from files that others made, so format and size are checked before decoding."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""What a dataset's own images may be. Pillow knows dozens of formats by their content, and hands one to Ghostscript."""
LABELED_FORMATS = (*FORMATS, "TIFF", "PPM", "GIF")
"""What labeled images of others may be."""
MAX_PIXELS = 1 << 26
ORIENTATION = 0x0112  # EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED, SCALED = "turned as EXIF says", "16 bits a channel reduced to 8"
OPAQUE, FIRST = "transparency ignored", "first of several frames"
_BITS, _PHOTOMETRIC = 258, 262  # TIFF tags; photometric 0: zero is white
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound is lower, and an error
warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged metadata, none of which is used


def decode(
    data: bytes, side: int | None = None, formats: tuple[str, ...] = FORMATS, notes: list[str] | None = None
) -> np.ndarray:
    """uint8 ``[h, w, 3]`` of an encoded image as a viewer shows it, ``side × side`` where that is given.

    Turned as its EXIF orientation says; of more than 8 bits a channel the upper 8; the first of several frames. Colors
    below transparency are taken as they are stored, as ``convert("RGB")`` in torchvision, timm and transformers does.
    ``notes``: receives which of these changed the picture. Raises ``ValueError`` for anything else, before a pixel is
    decoded where its format or size tells.
    """
    with _opened(data, side, formats) as image:
        changes = []
        if image.format == "TIFF" and image.tag_v2.get(ORIENTATION) in TURNS:  # type: ignore[attr-defined]
            changes.append(TURNED)  # by Pillow, as it loads
        image.load()
        if getattr(image, "is_animated", False) and image.format != "MPO":  # whose first picture is the photograph
            changes.append(FIRST)
        turn = TURNS.get(_orientation(image) or 1)
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
            kind = "floating-point" if image.mode == "F" else "32-bit"
            raise ValueError(f"its pixels are {kind} numbers, and no rule says which one is white; save 8 or 16 bits")
        if image.mode.startswith("I"):
            changes.append(SCALED)
            pixels = np.repeat(_upper_bits(image)[..., None], 3, axis=2)
            turned = Image.fromarray(pixels) if turn is not None else None
        else:
            if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
                changes.append(OPAQUE)
            turned = image.convert("RGB")
            pixels = np.asarray(turned)
        if turn is not None and turned is not None:
            changes.append(TURNED)
            pixels = np.asarray(turned.transpose(turn))
        if notes is not None:
            notes += changes
        return pixels


def check_header(data: bytes, formats: tuple[str, ...] = FORMATS) -> None:
    """What :func:`decode` refuses before it decodes. Raises ``ValueError``."""
    with _opened(data, None, formats):
        pass


def extension(data: bytes) -> str:
    """How a stored image is called: png, jpg or webp, by its first bytes."""
    return "png" if data.startswith(b"\x89PNG") else "jpg" if data.startswith(b"\xff\xd8") else "webp"


@contextmanager
def _opened(data: bytes, side: int | None, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # training scripts set it, and a user's teacher may lie in one
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            width, height = image.size
            if side is not None and (width, height) != (side, side):
                raise ValueError(f"{width}×{height} pixels, expected {side}×{side}")
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width}×{height} pixels are more than {MAX_PIXELS}")
            yield image
    except UnidentifiedImageError:
        raise ValueError(f"not a readable image: {_looks_like(data)}, expected {', '.join(formats)}") from None
    except Exception as error:  # Pillow's parsers raise whatever hostile bytes provoke
        text = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "it", " ".join(str(error).split()))
        raise ValueError(f"not a readable image: {text[:200] or type(error).__name__}") from None


def _orientation(image: Image.Image) -> int | None:
    """The EXIF orientation; None where there is none that can be read, as viewers do."""
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:
        return None


def _upper_bits(image: Image.Image) -> np.ndarray:
    """uint8 ``[h, w]`` of gray of up to 16 bits."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS, (16,))[0]
    pixels = np.asarray(image).astype(np.int64).clip(0, (1 << bits) - 1) >> bits - 8
    return (255 - pixels if tags.get(_PHOTOMETRIC) == 0 else pixels).astype(np.uint8)


def _looks_like(data: bytes) -> str:
    """What bytes that are no known image are, for people."""
    if not data:
        return "the file is empty"
    if data.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer (git lfs pull fetches the image)"
    if data[4:8] == b"ftyp":
        return "it is HEIC, AVIF or a video"
    if data.lstrip()[:1] == b"<":
        return "it is HTML or SVG text"
    return "unknown content"
