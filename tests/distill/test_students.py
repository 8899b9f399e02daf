"""Students from elsewhere: named like teachers, saved so that one call brings them back."""

import pytest
import torch

from manifests.errors import UsageError
from pipeline.distill import resolve_distill
from stages.distill.run import run_distill
from stages.distill.settings import DistillSettings
from stages.models.loading import load_model


def test_a_timm_student_is_fit_to_small_images_and_comes_back(dataset, tmp_path):
    pytest.importorskip("timm")
    events = []
    settings = DistillSettings.model_validate(
        {"students": ["timm:mobilenetv3_small_050", "wrn-16-1"], "epochs": 1, "batch_size": 16, "views": {"crop": 0.1}}
    )
    results = run_distill(
        settings, [(dataset, 1.0)], str(tmp_path), on_event=lambda kind, **f: events.append((kind, f.get("message")))
    )
    assert set(results["students"]) == {"timm-mobilenetv3_small_050", "wrn-16-1"}
    notes = [message for kind, message in events if kind == "note"]
    assert len(notes) == 1 and "timm-mobilenetv3_small_050: stem fit to 8 px images: conv_stem: 3×3" in notes[0]
    net, config = load_model(tmp_path / "timm-mobilenetv3_small_050")
    assert (config.architecture, config.stem) == ("timm:mobilenetv3_small_050", "small")
    assert net(torch.zeros(1, 1, 8, 8)).shape == (1, 3)


class _Manifest:
    url = "m.parquet"

    class info:
        recipe = {"name": "x", "distill": {"students": ["my.nets:tiny"]}}


def test_a_stored_recipe_does_not_run_code():
    with pytest.raises(UsageError, match="name it yourself, with --student my.nets:tiny"):
        resolve_distill(_Manifest, None, (), {"distill.students": ("--student", None)})
    for name in ("my.nets:tiny", "resnet8"):
        recipe = resolve_distill(_Manifest, None, (), {"distill.students": ("--student", [name])})
        assert recipe.distill.students == (name,)
