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
from PIL import Image

from manifests import images
from manifests.images import decode


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


@given(data=st.data())
def test_mutated_images_decode_or_are_refused(data: st.DataObject) -> None:
    whole = bytearray(encoded(data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"]))))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ValueError):  # and nothing else
        assert decode(bytes(whole)).dtype == np.uint8
