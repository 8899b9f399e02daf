"""The confusion matrix as a picture: rows are true classes, columns what the model says. Used by ``factory eval``."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

CELL, SMALL_CELL, NUMBERS_UP_TO = 34, 4, 30
INK, PAPER, FULL = (20, 20, 20), (255, 255, 255), (8, 48, 107)


def confusion_picture(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> bytes:
    """PNG bytes of ``counts[true][predicted]``. Shade: share of the row; counts are written into up to 30 classes."""
    table = np.asarray(counts, dtype=np.int64)
    classes = len(table)
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    labelled = classes <= NUMBERS_UP_TO
    cell, name_width, head = (CELL, 110, 34) if labelled else (SMALL_CELL, 2, 18)
    image = Image.new("RGB", (name_width + classes * cell + 2, head + classes * cell + 2), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((2, 2), "true (rows), predicted (columns)", fill=INK)
    for row in range(classes):
        y = head + row * cell
        if labelled:
            draw.text((4, y + cell // 2 - 6), _printable(class_names[row])[:16], fill=INK)
            draw.text((name_width + row * cell + 3, 18), _printable(class_names[row])[:5], fill=INK)
        for column in range(classes):
            x, share = name_width + column * cell, shares[row, column]
            shade = tuple(round(p + (f - p) * share) for p, f in zip(PAPER, FULL, strict=True))
            draw.rectangle(
                (x, y, x + cell - 1, y + cell - 1), fill=shade, outline=(225, 225, 225) if labelled else shade
            )
            if labelled and table[row, column]:
                ink = PAPER if share > 0.5 else INK
                draw.text((x + cell / 2, y + cell / 2), str(table[row, column]), fill=ink, anchor="mm")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _printable(text: str) -> str:
    return text.encode("latin-1", "replace").decode("latin-1")  # what PIL's built-in font can draw
