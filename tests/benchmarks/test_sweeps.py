"""A sample of the sweeps over model folders: quick members of each, answered and cropped as by their own libraries."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("test_resnet", {}), ("test_vit2", {"img_size": 96}), ("test_mambaout", {}), ("test_nfnet", {"in_chans": 1})],
)
def test_timm(name, arguments):
    pytest.importorskip("timm")
    from sweep_timm import compare

    line = compare(name, **arguments)
    assert line["equal"] and line["pixels"] < 2.1, line


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [("LevitForImageClassificationWithTeacher", "levit"), ("MobileViTForImageClassification", "mobilevit"),
     ("ConvNextForImageClassification", "convnext"), ("PerceiverForImageClassificationLearned", "perceiver")],
)  # fmt: skip
def test_transformers(kind, model_type):
    from sweep_transformers import compare

    line = compare(kind, model_type)
    assert line["equal"], line
    if model_type == "perceiver":
        assert "needs input in its settings" in line["why"]
    else:
        assert line["pixels"] < 2.1 and line["same"] == 1, line
