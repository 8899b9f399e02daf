"""Input rules: what a network sees of pictures, as the reference transforms make it."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from stages.models.inputs import InputSpec, to_unit
from stages.settings import InputSettings

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PICTURES = [
    np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for i, (height, width) in enumerate([(50, 83), (83, 51), (40, 40), (32, 32), (20, 31), (9, 200)])
]
FILTERS = {
    "bilinear": T.InterpolationMode.BILINEAR,
    "bicubic": T.InterpolationMode.BICUBIC,
    "area": T.InterpolationMode.BOX,
    "nearest": T.InterpolationMode.NEAREST,
}


def settings(**more):
    return InputSettings.model_validate({"size": 32, "mean": MEAN, "std": STD} | more)


@pytest.mark.parametrize("resize", FILTERS)
@pytest.mark.parametrize("resize_size", [None, 32, 37, (40, 35)])
def test_a_view_is_that_of_torchvision(resize, resize_size):
    rule = settings(resize=resize, resize_size=resize_size)
    spec, sides = InputSpec(rule), [32, 32] if resize_size is None else resize_size
    steps = [T.Resize(sides, FILTERS[resize]), T.CenterCrop(32), T.ToTensor(), T.Normalize(MEAN, STD)]
    for picture in PICTURES:
        ours = spec(spec.view(to_unit(torch.from_numpy(picture)[None])))[0]
        torch.testing.assert_close(ours, T.Compose(steps)(Image.fromarray(picture)), atol=1e-5, rtol=0)


def test_half_a_pixel_of_margin_is_rounded_as_the_rule_says():
    columns = torch.arange(7.0).expand(1, 3, 4, 7) / 127.5 - 1  # margins of 1.5 columns on each side
    even, down = (InputSpec(settings(size=4, resize_size=4, crop_rounding=r)).view(columns) for r in ("even", "down"))
    assert [round(v) for v in ((even[0, 0, 0] + 1) * 127.5).tolist()] == [2, 3, 4, 5]
    assert [round(v) for v in ((down[0, 0, 0] + 1) * 127.5).tolist()] == [1, 2, 3, 4]


def test_a_dataset_image_is_a_view_already():
    x = torch.linspace(-1, 1, 3 * 64).view(1, 3, 8, 8).requires_grad_()
    spec, plain = (InputSpec(settings(size=8, resize_size=size)) for size in (11, None))
    assert torch.equal(spec(x), plain(x)) and torch.equal(plain.view(x), x)
    assert not torch.equal(spec.view(x), x)


def test_channels_are_reversed_after_they_are_normalized():
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    rgb, bgr = (InputSpec(settings(size=8, channel_order=order))(x) for order in ("rgb", "bgr"))
    assert torch.equal(bgr, rgb[:, [2, 1, 0]])


def test_a_long_picture_takes_bounded_memory():
    spec = InputSpec(settings(size=256, resize_size=4096))
    assert spec.view(torch.zeros(1, 3, 1, 1000)).shape == (1, 3, 256, 256)  # 4096 × 4 million pixels otherwise


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"resize_size": 31}, "is less than size 32"),
        ({"resize_size": (40, 31)}, "is less"),
        ({"size": (32, 16)}, "size"),
    ],
)
def test_rules_that_would_pad_or_are_not_square_are_refused(wrong, line):
    with pytest.raises(ValueError, match=line):
        settings(**wrong)


def test_new_fields_leave_files_as_they_were():
    assert list(settings().model_dump(mode="json")) == ["size", "channels", "mean", "std", "resize"]
    full = settings(resize_size=(40, 36), crop_rounding="down", channel_order="bgr")
    assert InputSettings.model_validate_json(full.model_dump_json()) == full
