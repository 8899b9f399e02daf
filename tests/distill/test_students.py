"""Students from elsewhere: named like teachers, saved so that one call brings them back."""

import json

import pytest
import safetensors.torch
import torch

from manifests.errors import UsageError
from pipeline.distill import resolve_distill
from stages.distill.evaluate import evaluate
from stages.distill.export import export_torch
from stages.distill.run import run_distill
from stages.models.loading import load_model
from stages.models.source import ModelConfig
from stages.settings import DistillSettings
from tests.distill.short import settings


def test_a_timm_student_is_fit_to_small_images_and_comes_back(dataset, tmp_path):
    pytest.importorskip("timm")
    events = []
    settings = DistillSettings.model_validate(
        {
            "students": ["timm:mobilenetv3_small_050", "wrn-16-1"],
            "epochs": 1,
            "batch_size": 16,
            "augment": {"crop": 0.1},
        }
    )
    results = run_distill(
        settings, [(dataset, 1.0)], str(tmp_path), on_event=lambda kind, **f: events.append((kind, f.get("message")))
    )
    assert set(results.students) == {"timm-mobilenetv3_small_050", "wrn-16-1"}
    notes = [message for kind, message in events if kind == "note"]
    assert len(notes) == 1 and "timm-mobilenetv3_small_050: stem fit to 8 px images: conv_stem: 3×3" in notes[0]
    net, config = load_model(tmp_path / "timm-mobilenetv3_small_050")
    assert (config.architecture, config.stem) == ("timm:mobilenetv3_small_050", "small")
    assert net(torch.zeros(1, 1, 8, 8)).shape == (1, 3)


def test_a_student_of_own_code_comes_back_where_it_is_named(dataset, tmp_path):
    name, folder = "tests.models.nets:tiny", tmp_path / "tests.models.nets-tiny"
    run_distill(settings(students=[name], epochs=1), [(dataset, 1.0)], str(tmp_path))
    with pytest.raises(UsageError, match="name it yourself, in a FILE.yaml with name: tests.models.nets:tiny, weights"):
        evaluate(str(folder), dataset)
    config = json.loads((folder / "config.json").read_bytes())
    content = {key: config[key] for key in ("num_classes", "class_names", "input", "stem")}
    named = tmp_path / "MODEL.yaml"
    named.write_text(json.dumps({"name": name, "weights": f"{folder}/model.safetensors", **content}))
    assert "factory eval MODEL.yaml DATA" in (folder / "README.md").read_text()
    net, again = load_model(named)
    assert again.model_dump(mode="json") == {key: config[key] for key in ModelConfig.model_fields}
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())
    assert evaluate(str(named), dataset).images == 48
    assert export_torch(str(named), str(tmp_path / "s.pt2")).classes == 3


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
