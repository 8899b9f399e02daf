"""Contact sheets: sizes, sharp enlargement, any name."""

import io

from PIL import Image

from pipeline.inspect import GAP, NAME_WIDTH, TITLE_HEIGHT, contact_sheet, hstack, picture, png
from tests.pipeline.fake_worker import image


def test_a_row_per_class_and_a_column_per_image():
    sheet = contact_sheet([("one", [image(0, 0)]), ("two \x1b😀", [image(9, 1), image(9, 2)])], cell=16)
    assert sheet.size == (NAME_WIDTH + 2 * (16 + GAP) + GAP, 2 * (16 + GAP) + GAP)
    assert sheet.getpixel((NAME_WIDTH + 5, 16 + 2 * GAP + 5)) == (9, 1, 128)


def test_small_pictures_grow_by_whole_pixels():
    buffer = io.BytesIO()
    Image.frombytes("L", (2, 1), bytes([0, 255])).save(buffer, "PNG")
    big = picture(buffer.getvalue(), 4)
    assert big.size == (4, 4)
    assert [big.getpixel((x, 0))[0] for x in range(4)] == [0, 0, 255, 255]


def test_panels_stand_side_by_side():
    panel = contact_sheet([("a", [image(0, 0)])], cell=16)
    whole = hstack([("unguided", panel), ("guided", panel)])
    assert whole.size == (2 * panel.width, TITLE_HEIGHT + panel.height)
    assert Image.open(io.BytesIO(png(whole))).size == whole.size


def test_an_empty_sheet_is_still_a_picture():
    assert contact_sheet([]).size == (NAME_WIDTH + GAP, GAP)
