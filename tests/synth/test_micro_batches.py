"""A group that does not fit the memory: the same gradient in parts, the same samples, and the split on record."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image

from manifests.errors import FactoryError
from manifests.shard import done_records
from manifests.storage import Storage
from stages.memory import in_micro_batches, out_of_memory, retry_with_smaller_batches
from stages.models.loading import load_teacher
from stages.settings import GuidanceSettings, SynthSettings
from stages.synth.group import Group
from stages.synth.guidance import Guidance, teacher_losses
from stages.synth.priors.schedule import State
from stages.synth.worker import ShardWorker
from tests.synth.tiny import TinyTeacher

GROUP = Group(0, tuple(range(7)), (0, 1, 0, 1, 0, 1, 0), tuple("abababa"))
LABELS = torch.tensor(GROUP.labels)


def gradient(images, teacher, adversary=None):
    """Losses and the gradient of their weighted sum."""
    source = images.clone().requires_grad_()
    losses = teacher_losses(source, LABELS.to(torch.long), teacher, adversary, bn=True)
    (found,) = torch.autograd.grad(losses.total(GuidanceSettings(bn=2.0, adversarial=0.5)), source)
    return losses.detached(), found


@pytest.mark.parametrize("limit", [1, 2, 3, 6])
def test_the_gradient_in_parts_is_that_of_the_whole_group(limit):
    """Each part's share of the statistics' gradient depends on all others: to double precision, nothing is missing."""
    torch.manual_seed(0)
    images = torch.randn(7, 3, 8, 8, dtype=torch.float64)
    teacher, student = TinyTeacher(dtype=torch.float64), TinyTeacher(dtype=torch.float64)
    student.head.weight.data *= 0.5
    whole, wanted = gradient(images, teacher, student)
    teacher.batch_limit = student.batch_limit = limit
    parts, found = gradient(images, teacher, student)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    for name in ("ce", "bn", "adversarial"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-10, atol=1e-12)


def test_the_gradient_in_parts_of_a_deep_teacher():
    """The embedded ResNet-like teacher with all its BatchNorm layers, in float32."""
    teacher, images = load_teacher(SynthSettings().teacher, "cpu"), torch.randn(7, 3, 32, 32).clamp(-1, 1)
    whole, wanted = gradient(images, teacher)
    teacher.batch_limit = 3
    parts, found = gradient(images, teacher)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()
    assert parts.bn.item() == pytest.approx(whole.bn.item(), rel=1e-5)


@pytest.mark.parametrize("through", ["x0", "xt"])
def test_a_guided_step_in_parts(prior, through):
    """Decoder, teacher and (zt) denoiser on three trajectories at a time move ẑ0 as all seven at once do."""
    guide = Guidance(prior, TinyTeacher(), LABELS, GuidanceSettings(gradient_at=through, bn=1.0))
    condition, noise = prior.encode(GROUP.prompts), GROUP.noise(0, prior.latent_shape)

    def moved(limit):
        prior.batch_limit = guide.teacher.batch_limit = limit
        try:
            with torch.set_grad_enabled(through == "xt"):
                state = prior.predict(State(noise.clone().requires_grad_(through == "xt"), 2), condition)
            return guide(state).z0
        finally:
            prior.batch_limit = None

    torch.testing.assert_close(moved(3), moved(None), rtol=1e-4, atol=1e-4)


def test_a_network_never_holds_more_than_a_part(prior):
    """With CFG, a part has both halves of its trajectories; the way back sees each part once more."""
    seen = []

    def network(x):
        seen.append(len(x))
        return x.tanh()

    x = torch.randn(7, 2, requires_grad=True)
    in_micro_batches(network, 3, x).sum().backward()
    assert seen == [3, 3, 1, 1, 3, 3] and torch.allclose(x.grad, 1 - x.tanh() ** 2)


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)  # how the CPU's allocator really says it
    assert out_of_memory(caught.value) and out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    for status in ("CUDNN_STATUS_ALLOC_FAILED", "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"):
        assert out_of_memory(RuntimeError(f"cuDNN error: {status}"))
    assert not out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


def settings(prior_folder, **kw):
    given = {
        "prior": {"path": str(prior_folder), "steps": 5, "cfg_scale": 2.0},
        "guidance": {"decoder": "full"} | kw.pop("guidance", {}),
        "lca": {"every": 2, "interval": [0, 1]},
        "images": {"intermediates": 1},
        "groups_per_shard": 2,
        "group_size": 20,
        "device": "cpu",
    }
    return SynthSettings.model_validate(given | kw).model_dump(mode="json")


def small_memory(monkeypatch, worker, most):
    """A machine on which the decoder takes no more than ``most`` latents."""
    decode, asked = worker.models.prior.vae.decode, []

    def limited(latents):
        asked.append(len(latents))
        if len(latents) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return decode(latents)

    monkeypatch.setattr(worker.models.prior.vae, "decode", limited)
    return asked


def result(storage):
    record = done_records(storage)[0]
    rows = pq.read_table(storage.path(record.table)).to_pylist()
    tar = webdataset.WebDataset(storage.path(record.tar), shardshuffle=False)
    pixels = {s["__key__"]: np.asarray(Image.open(io.BytesIO(s["png"]))).astype(int) for s in tar}
    return rows, np.stack([pixels[row["key"]] for row in rows])


EXACT = ("key", "label", "prompt", "group", "trajectory", "step", "timestep", "lca", "teacher_label", "kept")


def test_a_group_that_does_not_fit_is_made_in_micro_batches(prior_folder, tmp_path, monkeypatch):
    whole, split = Storage(tmp_path / "whole"), Storage(tmp_path / "split")
    report = ShardWorker(settings(prior_folder), whole.url, "f" * 64).run(0)
    assert "splits" not in report
    worker = ShardWorker(settings(prior_folder), split.url, "f" * 64)
    asked = small_memory(monkeypatch, worker, 6)
    assert worker.run(0)["splits"] == {0: 5, 1: 5}  # 20, 10, 5; the second group starts where the first ended
    assert asked.count(20) == 1 and asked.count(10) == 1 and set(asked) == {20, 10, 5}
    (rows, pixels), (there, wanted) = result(split), result(whole)
    assert [{name: row[name] for name in EXACT} for row in rows] == [{n: row[n] for n in EXACT} for row in there]
    assert np.abs(pixels - wanted).max() <= 2
    for name in ("loss_ce", "loss_bn", "confidence", "cosine"):
        ours, theirs = ([row[name] or 0.0 for row in side] for side in (rows, there))
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-3)
    asked.clear()
    assert worker.run(1)["splits"] and asked[0] == 20  # another shard starts whole: the memory may be free again


def test_one_trajectory_that_does_not_fit_fails_clearly(prior_folder, tmp_path, monkeypatch):
    worker = ShardWorker(settings(prior_folder), str(tmp_path), "f" * 64)
    small_memory(monkeypatch, worker, 0)
    with pytest.raises(FactoryError, match=r"^group 0 does not fit the memory, not even one .*\(CUDA out of memory"):
        worker.run(0)
    assert not done_records(Storage(tmp_path)) and not list((tmp_path / "tmp").iterdir())


def test_other_errors_are_not_tried_again(prior_folder, tmp_path, monkeypatch):
    worker = ShardWorker(settings(prior_folder), str(tmp_path), "f" * 64)
    calls = []

    def broken(latents):
        calls.append(1)
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(worker.models.prior.vae, "decode", broken)
    with pytest.raises(RuntimeError, match="assert"):
        worker.run(0)
    assert len(calls) == 1


def test_one_row_too_many_is_one_line_whatever_the_error_says():
    asked = []

    def call():
        raise MemoryError  # as Python raises it: without a message

    with pytest.raises(FactoryError, match=r"^it does not fit \(MemoryError\): take less$"):
        retry_with_smaller_batches(call, 5, asked.append, "it does not fit", "take less")
    assert asked == [3, 2, 1]
