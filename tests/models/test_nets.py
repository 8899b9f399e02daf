"""Networks, input rules and what a teacher shows of itself."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from manifests.errors import UsageError
from stages.models import nets
from stages.models.hooks import outputs_of, submodule
from stages.models.inputs import InputSpec, to_unit
from stages.models.loading import load_teacher
from stages.settings import InputSettings, ModelSettings

# He et al. 2015, table 6, with the linear layer of 10 classes and option-A shortcuts
PARAMETERS = {"resnet20": 269_722, "resnet32": 464_154, "resnet44": 658_586, "resnet56": 853_018}
PARAMETERS |= {"wrn-16-1": 175_066, "wrn-16-2": 691_674, "wrn-40-1": 563_930, "wrn-40-2": 2_243_546}


@pytest.mark.parametrize("name", nets.ARCHITECTURES)
def test_every_architecture_runs_and_names_its_parts(name):
    side, channels = (8, 1) if name.startswith("digits") else (16, 3)
    net = nets.build(name, 7, channels, "small").eval()
    with outputs_of(net, net.stages) as seen:
        logits = net(torch.zeros(2, channels, side, side))
    assert logits.shape == (2, 7)
    assert submodule(net, net.head).out_features == 7
    assert [seen[s].ndim for s in net.stages] == [4] * len(net.stages)
    assert seen[net.stages[-1]].shape[1] == submodule(net, net.head).in_features
    if name in PARAMETERS:
        assert sum(p.numel() for p in nets.build(name, 10).parameters()) == PARAMETERS[name]


def test_pixels_to_unit_range():
    pixels = torch.tensor([0, 127, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    assert to_unit(pixels).shape == (1, 3, 1, 1)
    assert to_unit(pixels).flatten().tolist() == pytest.approx([-1, -1 / 255, 1])


def test_input_spec_luminance_and_normalization():
    spec = InputSpec(InputSettings(size=2, channels=1, mean=(0.5,), std=(0.25,)))
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert spec(red).flatten().tolist() == pytest.approx([(0.299 - 0.5) / 0.25] * 4)


def test_resize_is_antialiased():
    stripes = torch.ones(1, 3, 32, 32)
    stripes[..., ::2] = -1  # without antialiasing a 4x reduction would see one color only
    for rule in ("bilinear", "bicubic", "area"):
        spec = InputSpec(InputSettings(size=8, mean=(0.0,) * 3, std=(1.0,) * 3, resize=rule))
        assert spec(stripes)[..., 1:-1].sub(0.5).abs().max() < 0.02


def test_input_spec_passes_gradients():
    spec = InputSpec(InputSettings(size=4, channels=1, mean=(0.1,), std=(0.5,)))
    x = torch.rand(1, 3, 8, 8, dtype=torch.float32, requires_grad=True)
    spec(x).sum().backward()
    assert (x.grad > 0).all()


def test_input_settings_are_checked():
    with pytest.raises(ValueError, match="3 values"):
        InputSettings(size=8, mean=(0.5,), std=(0.5,))


def test_teacher_batchnorm_inputs_are_what_the_layers_see():
    teacher = load_teacher(ModelSettings())
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    logits, inputs = teacher.with_batchnorm_inputs(x)
    assert torch.equal(logits, teacher.logits(x))
    assert len(inputs) == len(teacher.batchnorms) == 5
    first = F.conv2d(teacher.input(x), teacher.net.stage1[0][0].weight, padding=1)
    assert torch.allclose(inputs[0], first)
    assert [len(mean) for mean, _ in teacher.batchnorms] == [i.shape[1] for i in inputs]


def test_teacher_features_times_class_weights_are_logits():
    teacher = load_teacher(ModelSettings())
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    again = teacher.with_features(x)[1] @ teacher.class_weights.T + teacher.net.classifier.bias
    assert torch.allclose(again, teacher.logits(x), atol=1e-5)


def test_one_look_shows_what_separate_ones_do_and_nothing_unasked():
    teacher = load_teacher(ModelSettings())
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    logits, features, inputs = teacher.forward(x)
    assert torch.equal(logits, teacher.logits(x))
    assert torch.equal(features, teacher.with_features(x)[1])
    assert all(torch.equal(a, b) for a, b in zip(inputs, teacher.with_batchnorm_inputs(x)[1], strict=True))
    assert teacher.forward(x, features=False, batchnorm=False)[1:] == (None, [])
    assert len(teacher.batchnorms) == len(inputs) == 5


def test_teacher_stays_frozen():
    teacher = load_teacher(ModelSettings())
    before = [mean.clone() for mean, _ in teacher.batchnorms]
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    teacher.logits(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.net.parameters())
    assert all(torch.equal(a, b) for a, (b, _) in zip(before, teacher.batchnorms, strict=True))


def test_taps_name_the_modules_that_exist():
    with pytest.raises(UsageError, match="no module 'layer9' in ResNetCifar: it has conv1, bn1, layer1"):
        submodule(nets.build("resnet8", 10), "layer9")


def test_settings_and_identity_import_no_torch():
    code = "import sys, stages.models.source; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
