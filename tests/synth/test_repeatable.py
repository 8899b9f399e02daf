"""What makes the guided step repeatable on a GPU, as far as a CPU can tell: its way back holds none of the operations
that PyTorch computes in any order there, and what takes their place gives the same numbers."""

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from stages.memory import Repeatable
from stages.models.inputs import InputSpec, interpolated
from stages.settings import LOSS_SCALE, GuidanceSettings, InputSettings, SynthSettings
from stages.synth.guidance import Guidance, cropped, shifted
from stages.synth.inputs import SynthInputs, semantics
from stages.synth.priors.schedule import State
from tests.synth.tiny import TinyTeacher

ANTIALIASED = {"antialias": True, "align_corners": False}
RULES = {
    "bilinear": {"mode": "bilinear", **ANTIALIASED},
    "bicubic": {"mode": "bicubic", **ANTIALIASED},
    "area": {"mode": "area"},
    "nearest": {"mode": "nearest-exact"},
    "not antialiased": {"mode": "bilinear", "align_corners": False},
}
UNORDERED = ("Upsample", "ReplicationPad", "ReflectionPad", "AdaptiveAvgPool2D", "GridSampler", "IndexPut")


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def with_gradient(change, x):
    """``change(x)`` and the gradient of a fixed weighted sum of it."""
    x = x.clone().requires_grad_()
    out = change(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return out.detach(), torch.autograd.grad((out * weights).sum(), x)[0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 8), (21, 34, 13), (8, 6, 17), (9, 9, 9)])
def test_two_matrix_products_are_the_interpolation(rule, height, width, size):
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    plain = with_gradient(lambda x: F.interpolate(x, size=(size, size), **RULES[rule]), x)
    assert torch.equal(interpolated(x, size, **RULES[rule]), plain[0])  # off: the same bits as ever
    with deterministic():
        products = with_gradient(lambda x: interpolated(x, size, **RULES[rule]), x)
    for ours, expected in zip(products, plain, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_views_are_the_same_pixels_either_way(seed):
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    views = [
        lambda x: shifted(x, 0.2, torch.Generator().manual_seed(seed)),
        lambda x: cropped(x, torch.Generator().manual_seed(seed)),
    ]
    for view in views:
        plain = with_gradient(view, x)
        with deterministic():
            products = with_gradient(view, x)
        for ours, expected in zip(products, plain, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def operations(out):
    """Names of all nodes on the way back from ``out``."""
    found, names = [out.grad_fn], set()
    while found:
        node = found.pop()
        if node is not None and node not in names:
            names.add(node)
            found += [after for after, _ in node.next_functions]
    return {node.name() for node in names}


class Resizing(TinyTeacher):
    """Sees images at ``size`` pixels by ``rule``, as every teacher of another size than the prior's does."""

    def __init__(self, size, rule):
        super().__init__()
        self.input = InputSpec(InputSettings(size=size, mean=(0.5,) * 3, std=(0.5,) * 3, resize=rule))

    def with_batchnorm_inputs(self, x):
        return super().with_batchnorm_inputs(self.input(x))


@pytest.mark.parametrize("rule", ["bilinear", "bicubic", "area"])
@pytest.mark.parametrize("gradient_at", ["x0", "xt"])
def test_the_way_back_of_a_guided_step_adds_in_a_fixed_order(prior, rule, gradient_at):
    settings = GuidanceSettings(jitter=0.2, consistency=1.0, gradient_at=gradient_at)
    guide = Guidance(prior, Resizing(11, rule), torch.tensor([0, 1]), settings)
    noise = torch.randn(2, *prior.latent_shape, generator=torch.Generator().manual_seed(0))

    def names():
        with torch.enable_grad():
            x = prior.predict(State(noise.clone().requires_grad_(), 2), prior.encode(["a", "b"]))
            losses = guide.terms(guide.decode(x.z0), torch.Generator().manual_seed(3))
            return operations(losses.total(settings))

    def unordered():
        return {name for name in names() if name.startswith(UNORDERED)}

    assert unordered() > {"ReplicationPad2DBackward0", "UpsampleBilinear2DBackward0"}  # and the resize
    with deterministic():
        left = unordered()
    assert left <= {"UpsampleNearest2DBackward0"}  # the VAE's own; it gathers, each pixel by itself


def test_a_gpu_works_with_deterministic_kernels_without_tf32_and_a_cpu_as_ever(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def switches():
        cudnn = torch.backends.cudnn
        chosen = (cudnn.enabled, cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32)
        return torch.get_deterministic_debug_mode(), *chosen

    usual = switches()
    assert Repeatable("cpu")(switches) == usual
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert Repeatable("cuda:1")(switches) == (2, True, True, False, False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and switches() == usual


def test_an_operation_without_a_deterministic_kernel_is_named_once_and_done_all_the_same(caplog):
    repeatable, modes = Repeatable("cuda"), []

    def work():
        modes.append(torch.get_deterministic_debug_mode())
        if modes[-1] == 2:
            raise RuntimeError("odd_backward_cuda does not have a deterministic implementation, but you set …\nmore")
        return len(modes)

    assert repeatable(work) == 2 and repeatable(work) == 3 and modes == [2, 0, 0]
    (line,) = caplog.messages
    assert line.startswith("two runs on this GPU may differ in the last bits: odd_backward_cuda") and "more" not in line
    assert torch.get_deterministic_debug_mode() == 0
    with pytest.raises(RuntimeError, match="no such thing"):
        Repeatable("cuda")(lambda: (_ for _ in ()).throw(RuntimeError("no such thing")))


def half(z0):
    """A decoder through half precision; its images vary with every latent."""
    return F.interpolate(z0[:, :3].half().float(), scale_factor=2).half().float()


def test_a_faint_gradient_survives_half_precision(prior):
    noise = torch.randn(2, *prior.latent_shape, generator=torch.Generator().manual_seed(0))
    x = prior.predict(State(noise, 2), prior.encode(["a", "b"]))
    faint = GuidanceSettings(ce=3e-5, bn=0.0, jitter=0.0)

    def move(dtype, scale, decode):
        settings = prior.settings.model_copy(update={"dtype": dtype})
        as_half = SimpleNamespace(settings=settings, levels=prior.levels, move=prior.move, timesteps=prior.timesteps)
        guide = Guidance(as_half, TinyTeacher(), torch.tensor([0, 1]), faint, decode=decode)
        assert guide.loss_scale == (LOSS_SCALE if dtype == "fp16" else 1.0)
        guide.loss_scale = scale or guide.loss_scale
        return (guide.update(x, torch.Generator()).z0 - x.z0)[:, :3].flatten()

    exact = move("fp32", None, lambda z0: F.interpolate(z0[:, :3], scale_factor=2))
    assert F.cosine_similarity(move("fp16", None, half), exact, dim=0) > 0.999
    assert F.cosine_similarity(move("fp16", 1.0, half), exact, dim=0) < 0.98


@pytest.mark.parametrize(
    ("dtype", "method", "scaled"), [("fp16", "diffdfkd", True), ("fp16", "dmkd", False), ("bf16", "diffdfkd", False)]
)
def test_the_loss_scale_is_part_of_the_fingerprint_where_it_decides_images(dtype, method, scaled):
    teacher = {"config": {}, "sha256": "", "architecture": ""}
    inputs = SynthInputs({"sha256": ""}, teacher, adversary=None, class_names=("a",), image_size=8, sources={})
    settings = SynthSettings.model_validate({"method": method, "prior": {"dtype": dtype}})
    assert semantics(settings, inputs).get("loss_scale") == (LOSS_SCALE if scaled else None)
