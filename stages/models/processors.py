"""The input rule of an image processor of transformers, from what it makes of pictures of our own.

Its file says only what differs from its class, and classes read the same fields in their own way (ConvNeXt's
``crop_pct``, LeViT's 256/224, EfficientNet's second normalization). So the class that is installed is run: colors give
mean and std, the fields a few candidates for size and crop, and the one that gives the same pixels is taken.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from manifests.errors import first_line
from stages.models.inputs import InputSpec, to_unit
from stages.settings import InputSettings

FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic", 4: "area"}
MAX_SIDE = 4096
NOT_OURS = ("do_color_quantize", "do_thumbnail", "do_align_long_axis", "do_pan_and_scan")
"""Fields of processors that no input rule has, once they are true."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' own log and progress bars off the terminal: both repeat texts of the files they read."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def processor_input(folder: Path, file: str, fields: Mapping[str, Any], channels: Any) -> InputSettings | str:
    """The input rule of the processor in ``file`` of ``folder``, which holds ``fields``, for images of ``channels``; in
    words what it does that :class:`InputSettings` cannot express. Runs no code of the folder."""
    from transformers import AutoImageProcessor

    if not _bounded(fields):
        return f"{file} has sides above {MAX_SIDE} or a crop_pct below 0.1"
    try:
        with quiet_transformers():
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if "crop_size" not in fields and _pads(processor):
                processor.do_center_crop = False  # the class's own crop, of another size than this file's
            return _input_of(processor, file, 1 if channels == 1 else 3)
    except Exception as error:  # whatever a processor does with values that it was not written for
        reason = first_line(error)
        return f"the processor of {file} cannot be run ({reason[:200]})"


def _pads(processor: Any) -> bool:
    """Whether the crop of ``processor`` is larger than what it resizes to."""
    size, crop = dict(getattr(processor, "size", None) or {}), dict(getattr(processor, "crop_size", None) or {})
    side = size.get("height") or size.get("shortest_edge") or 0
    return bool(getattr(processor, "do_center_crop", False)) and side < (crop.get("height") or 0)


def _bounded(value: Any, key: str = "") -> bool:
    if isinstance(value, Mapping):
        return all(_bounded(entry, name) for name, entry in value.items())
    if isinstance(value, list):
        return all(_bounded(entry) for entry in value)
    return not isinstance(value, int | float) or (abs(value) <= MAX_SIDE and (key != "crop_pct" or value >= 0.1))


def _input_of(processor: Any, file: str, channels: int) -> InputSettings | str:
    """The candidate that agrees with ``processor``; else what it does, as far as its fields say."""
    as_it_does = f"which no input rule reproduces as {type(processor).__name__} does"
    if wrong := next((key for key in NOT_OURS if getattr(processor, key, False)), None):
        return f"{file} says {wrong}, {as_it_does}"
    said, candidates = _candidates(processor, channels)
    nearest = f"; the nearest rule is input: {candidates[0].yaml()}" if candidates else ""
    return next((rule for rule in candidates if _agrees(processor, rule)), f"{file} says {said}, {as_it_does}{nearest}")


def _candidates(processor: Any, channels: int) -> tuple[str, list[InputSettings]]:
    """What the fields say of size and crop, and the rules that they may mean; the likeliest first."""
    size, crop = dict(getattr(processor, "size", None) or {}), dict(getattr(processor, "crop_size", None) or {})
    cropped, short = getattr(processor, "do_center_crop", None), size.get("shortest_edge")
    pct = getattr(processor, "crop_pct", None)
    fields = {"size": {k: v for k, v in size.items() if v}, "crop_pct": pct, "do_center_crop": cropped}
    fields |= {"resample": getattr(processor, "resample", None)}
    fields |= {key: value for key in ("do_resize", "do_pad") if (value := getattr(processor, key, None)) is not None}
    said = ", ".join(f"{key} {value}" for key, value in fields.items() if value is not None)
    side = (crop.get("height") if cropped else None) or size.get("height") or short
    rule = FILTERS.get(int(getattr(processor, "resample", None) or 0), "bicubic")
    if not side:
        return said, []
    colors = {"black": (0, 0, 0), "white": (255, 255, 255), "red": (255, 0, 0)}
    low, high, red = (
        made[:, made.shape[1] // 2, made.shape[2] // 2].double()
        for made in (_prepared(processor, np.full((64, 64, 3), color, np.uint8), channels) for color in colors.values())
    )
    order = "bgr" if channels == 3 and red[2] == high[2] != red[0] else "rgb"
    low, high = (x.flip(0) if order == "bgr" else x for x in (low, high))
    mean, std = (-low / (high - low)).tolist(), (1 / (high - low)).tolist()
    named = [getattr(processor, key, None) for key in ("image_mean", "image_std")]
    if all(
        isinstance(values, list | tuple) and np.allclose(values, seen, atol=1e-4)
        for values, seen in zip(named, (mean, std), strict=True)
    ):
        mean, std = (list(values) for values in named if values is not None)
    mean, std = ([round(float(value), 6) + 0.0 for value in values] for values in (mean, std))
    before = [
        short,
        (size.get("height"), size.get("width")),
        *(int(short / p) for p in (pct, 224 / 256) if short and p),
    ]
    found = []
    for resize_size, rounding in product(dict.fromkeys((*before, side, None)), ("down", "even")):
        if resize_size in (None, (side, side)) and rounding == "down":
            continue  # nothing is cropped
        try:
            squeezed = None if resize_size == (side, side) else resize_size
            values = {"size": side, "channels": channels, "mean": mean, "std": std, "channel_order": order}
            rules = {"resize": rule, "resize_size": squeezed, "crop_rounding": rounding}
            found.append(InputSettings.model_validate(values | rules))
        except ValidationError:
            continue
    return said, found


def _agrees(processor: Any, rule: InputSettings) -> bool:
    """Whether ``rule`` gives the pixels of ``processor`` for pictures of several shapes, but for rounding."""
    spec, side = InputSpec(rule), rule.size
    large = 2 if side <= 512 else 1
    shapes = (
        (large * side + 7, large * side + 40),
        (side + 90, side + 5),
        *((side // 2 + 9, side + i) for i in range(4)),
    )
    rng = np.random.default_rng(0)
    for height, width in shapes:
        picture = rng.integers(64, 192, (height, width, 3), dtype=np.uint8)  # interpolation stays within 0 to 255
        if rule.channels == 1:
            picture[:] = picture[..., :1]
        theirs = _prepared(processor, picture, rule.channels)
        ours = spec(spec.view(to_unit(torch.from_numpy(picture)[None])))[0]
        if ours.shape != theirs.shape:
            return False
        off = (ours - theirs).abs() * torch.tensor(rule.std).view(-1, 1, 1) * 255
        if off.max() > 4 or off.mean() > 0.75:
            return False
    return True


def _prepared(processor: Any, picture: np.ndarray[Any, Any], channels: int) -> Tensor:
    """``[channels, h, w]`` that ``processor`` makes of a picture ``[h, w, 3]``."""
    image = Image.fromarray(picture).convert("L" if channels == 1 else "RGB")
    made: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
    if made.ndim != 3 or len(made) != channels:
        raise ValueError(f"it makes {list(made.shape)} of a picture")
    return made.float()
