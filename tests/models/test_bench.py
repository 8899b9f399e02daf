"""A third party's teacher, loaded as any user's own. Needs real data that this repository does not hold."""

import os
from pathlib import Path

import pytest
import torch

from stages.distill.eval_data import labeled_images
from stages.distill.evaluate import run_models
from stages.models.loading import load_teacher
from stages.settings import InputSettings, ModelSettings

FOLDER = os.environ.get("FACTORY_BENCH_DIR", "")
INPUT = InputSettings(size=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.mark.skipif(
    not FOLDER, reason="set FACTORY_BENCH_DIR to a folder with cifar10-resnet20.safetensors and cifar10-test-a.tar"
)
def test_a_third_party_cifar10_teacher_scores_as_it_should():
    weights = str(Path(FOLDER) / "cifar10-resnet20.safetensors")
    teacher = load_teacher(
        ModelSettings(name="resnet20", weights=weights, input=INPUT, num_classes=10, class_names=CLASSES)
    )
    data = str(Path(FOLDER) / "cifar10-test-a.tar")
    labels, logits = run_models(labeled_images(data, CLASSES), [teacher.logits], torch.device("cpu"))
    assert len(labels) == 5000
    assert (logits.argmax(1) == labels).double().mean().item() == pytest.approx(0.81, abs=0.01)
