"""Decoding: known formats and bounded sizes only, whatever the bytes are called."""

import io
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from manifests import images
from manifests.images import LABELED_FORMATS, decode


def encoded(kind: str, side: int = 8, **more: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(side * side * 3, dtype=np.uint8).reshape(side, side, 3)).save(buffer, kind, **more)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(99_999)))
        + chunk(b"IEND", b"")
    )


def test_what_stage_1_writes_comes_back() -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        assert decode(encoded(kind), 8).shape == (8, 8, 3)
    assert decode(encoded("PNG"))[0, 1].tolist() == [3, 4, 5]


@pytest.mark.parametrize("size", [(1 << 30, 1 << 30), (30_000, 30_000), (8192, 8193), (1 << 26, 2)])
def test_bombs_are_refused_before_decoding(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"not a readable image: [^\n]*pixels"):
        decode(png_claiming(*size))
    with pytest.raises(ValueError, match="expected 8×8|pixels"):
        decode(png_claiming(*size), 8)


def test_text_bombs_are_refused() -> None:
    text = b"x\0\0" + zlib.compress(bytes(100 << 20))
    data = encoded("PNG")
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    with pytest.raises(ValueError, match="not a readable image"):
        decode(data[:33] + chunk + data[33:])


def test_formats_that_run_other_programs_are_not_even_recognized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow gives EPS to Ghostscript, if it is asked to look for EPS at all."""
    marker = tmp_path / "ran"
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {marker}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ValueError, match="unknown content, expected PNG, JPEG, WEBP, BMP$"):
        decode(eps, 8)
    for kind in ("GIF", "TIFF", "PPM", "TGA", "ICO", "PCX", "JPEG2000"):
        with pytest.raises(ValueError):
            decode(encoded(kind))
    assert not marker.exists()
    assert "EPS" not in images.FORMATS


def shown(image: Image.Image, kind: str, **more: object) -> tuple[np.ndarray, list[str]]:
    """Pixels of ``image`` after a round through a file, and what decoding changed."""
    buffer, notes = io.BytesIO(), list[str]()
    image.save(buffer, kind, **more)
    return decode(buffer.getvalue(), None, LABELED_FORMATS, notes), notes


GRAY = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)


class TestWhatAViewerShows:
    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
    def test_sixteen_bits(self, kind: str) -> None:
        pixels, notes = shown(Image.fromarray(GRAY), kind)
        assert (pixels == (GRAY >> 8)[..., None]).all() and notes == [images.SCALED]

    def test_sixteen_bits_of_tiff(self) -> None:
        swapped = Image.frombytes("I;16B", (8, 8), GRAY.byteswap().tobytes())
        assert (shown(swapped, "TIFF")[0] == (GRAY >> 8)[..., None]).all()
        inverted, _ = shown(Image.fromarray(GRAY), "TIFF", tiffinfo={262: 0})  # zero is white
        assert (inverted == 255 - (GRAY >> 8)[..., None]).all()
        for kind in (np.int32, np.float32):
            with pytest.raises(ValueError, match="no rule says which one is white"):
                shown(Image.fromarray(GRAY.astype(kind)), "TIFF")

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
    def test_exif_orientation(self, kind: str) -> None:
        upright = np.zeros((16, 32, 3), np.uint8)
        upright[:8, :16] = 255  # top left
        turns = (None, (), (1,), (0, 1), (0,), "t", ("t", 1), ("t", 0, 1), ("t", 0))
        for orientation in range(1, 9):
            stored = upright
            for turn in turns[orientation]:
                stored = stored.transpose(1, 0, 2) if turn == "t" else np.flip(stored, turn)
            if orientation in (6, 8):  # stored so that turning clockwise (6) or back (8) shows it upright
                stored = np.rot90(upright, 1 if orientation == 6 else -1)
            exif = Image.Exif()
            exif[images.ORIENTATION] = orientation
            options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
            pixels, notes = shown(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
            assert pixels.shape == upright.shape and np.abs(pixels.astype(int) - upright).max() < 40, orientation
            assert notes == ([images.TURNED] if orientation > 1 else [])
        assert shown(Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\0\0nonsense")[1] == []

    def test_transparency_is_ignored_as_torchvision_does(self) -> None:
        image = Image.new("RGBA", (8, 8), (10, 20, 30, 255))
        assert shown(image, "PNG")[1] == []
        image.putpixel((0, 0), (1, 2, 3, 0))
        pixels, notes = shown(image, "PNG")
        assert pixels[0, 0].tolist() == [1, 2, 3] and notes == [images.OPAQUE]
        assert shown(image.convert("LA"), "PNG")[1] == [images.OPAQUE]
        assert shown(image.convert("RGB").quantize(4), "PNG", transparency=0)[1] == [images.OPAQUE]

    @pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
    def test_the_first_frame(self, kind: str) -> None:
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        pixels, notes = shown(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(pixels[0, 0].astype(int) - (255, 0, 0)).max() < 4 and notes == [images.FIRST]

    def test_other_modes(self) -> None:
        for mode, kind in (("1", "PNG"), ("1", "PPM"), ("L", "TIFF"), ("P", "GIF"), ("CMYK", "JPEG"), ("CMYK", "TIFF")):
            pixels, notes = shown(Image.new("RGB", (8, 8), "white").convert(mode), kind)
            assert pixels.min() >= 254 and notes == []


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF"])
def test_cut_short(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as many training scripts do
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, kind)
    for size in (len(buffer.getvalue()) - 40, len(buffer.getvalue()) // 2):
        with pytest.raises(ValueError, match="not a readable image"):
            decode(buffer.getvalue()[:size], None, LABELED_FORMATS)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\n<!DOCTYPE html>", "HTML"),
        (b"\0\5\26\7", "unknown content"),
    ],
)
def test_what_is_no_image_is_said_without_addresses(data: bytes, what: str) -> None:
    with pytest.raises(ValueError, match=what) as caught:
        decode(data)
    assert "0x" not in str(caught.value)


@given(data=st.data())
def test_mutated_images_decode_or_are_refused(data: st.DataObject) -> None:
    whole = bytearray(encoded(data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF"]))))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ValueError):  # and nothing else
        assert decode(bytes(whole), None, LABELED_FORMATS).dtype == np.uint8
