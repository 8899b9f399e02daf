"""Contact sheets: rows of samples with their names, as one PNG. Used by ``factory inspect``, ``eval`` and ``demo``."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from manifests.errors import DataError, StoreError
from manifests.images import decode

GAP = 2
NAME_WIDTH = 64
TITLE_HEIGHT = 16
BACKGROUND, INK = (250, 250, 250), (20, 20, 20)


def contact_sheet(rows: Sequence[tuple[str, Sequence[bytes]]], cell: int = 48) -> Image.Image:
    """One row of pictures per ``(name, encoded images)``; pictures are scaled to fit ``cell`` pixels."""
    columns = max((len(images) for _, images in rows), default=0)
    step = cell + GAP
    sheet = Image.new("RGB", (NAME_WIDTH + columns * step + GAP, len(rows) * step + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for y, (name, images) in enumerate(rows):
        draw.text((GAP, y * step + step // 2 - 6), printable(name)[:10], fill=INK)
        for x, data in enumerate(images):
            sheet.paste(picture(data, cell), (NAME_WIDTH + x * step, y * step + GAP))
    return sheet


def beside(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Panels next to each other, each under its title."""
    width = sum(panel.width for _, panel in panels)
    whole = Image.new("RGB", (width, TITLE_HEIGHT + max(panel.height for _, panel in panels)), BACKGROUND)
    draw, x = ImageDraw.Draw(whole), 0
    for title, panel in panels:
        draw.text((x + NAME_WIDTH, 2), printable(title), fill=INK)
        whole.paste(panel, (x, TITLE_HEIGHT))
        x += panel.width
    return whole


def picture(data: bytes, cell: int) -> Image.Image:
    """An encoded image as RGB, ``cell`` pixels square; small ones grow by whole pixels so that they stay sharp.

    Raises DataError where it is none."""
    try:
        rgb = Image.fromarray(decode(data))
    except ValueError as error:
        raise DataError(f"an image of the contact sheet is {error}") from None
    small = max(rgb.size) <= cell
    return rgb.resize((cell, cell), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)


def png(image: Image.Image) -> bytes:
    """The picture as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save(data: bytes, path: Path) -> None:
    """Write an encoded picture, and nothing beside it. Raises StoreError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise StoreError(f"{path}: cannot write: {error.strerror or error}") from error


def printable(text: str) -> str:
    """What PIL's built-in font can draw."""
    return text.encode("latin-1", "replace").decode("latin-1")
