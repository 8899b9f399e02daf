"""Gradients that are not finite: sample (or, where a term ties them, group) is not moved, counted, and limited."""

import pyarrow.parquet as pq
import pytest
import torch

from manifests.errors import NumericsError
from manifests.shard import done_records
from manifests.storage import Storage
from stages.settings import GuidanceSettings, SynthSettings
from stages.synth.group import Group
from stages.synth.guidance import Guidance
from stages.synth.priors.schedule import State
from stages.synth.sampler import Counters, denoise
from stages.synth.worker import ShardWorker, check_skipped
from tests.synth.tiny import TinyTeacher

GROUP = Group(0, (0, 1, 2, 3), (0, 1, 0, 1), ("a", "b", "a", "b"))
LABELS = torch.tensor(GROUP.labels)


def overflowing(prior, samples, value=torch.inf, images=False):
    """``prior.decode``, through which these samples' gradients (or images) leave the range."""
    plain = prior.decode

    def spoilt(x):
        return x.index_fill(0, torch.tensor(samples), value)

    def decode(z0):
        out = plain(z0)
        if torch.is_grad_enabled():
            if images:
                return out * spoilt(torch.ones(len(z0))).view(-1, 1, 1, 1)
            out.register_hook(spoilt)
        return out

    return decode


@pytest.mark.parametrize("through", ["x0", "xt"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_sample_that_overflows_stays_where_it_was_and_the_others_move_as_ever(prior, monkeypatch, through, value):
    updates = 2 if through == "x0" else 1
    condition = prior.encode(GROUP.prompts)

    def moved():
        start = GROUP.noise(0, prior.latent_shape).requires_grad_(through == "xt")
        with torch.set_grad_enabled(through == "xt"):
            state = prior.predict(State(start, 2), condition)
        settings = GuidanceSettings(gradient_at=through, updates_per_step=updates)
        guide = Guidance(prior, TinyTeacher(), LABELS, settings)
        return state.z0.detach(), guide(state), guide.skipped

    before, fine, none = moved()
    with monkeypatch.context() as patch:
        patch.setattr(prior, "decode", overflowing(prior, [1], value))
        _, after, skipped = moved()
    assert none.tolist() == [0] * 4 and skipped.tolist() == [0, updates, 0, 0]
    assert torch.equal(after.z0[1], before[1]) and not torch.equal(fine.z0[1], before[1])
    if updates == 1:  # a second update sees the others' statistics with sample 1 unmoved
        assert torch.equal(after.z0[[0, 2, 3]], fine.z0[[0, 2, 3]])
    assert after.z.isfinite().all()


def test_where_the_statistics_overflow_the_whole_group_is_left_out(prior, monkeypatch):
    monkeypatch.setattr(prior, "decode", overflowing(prior, [1], images=True))
    condition = prior.encode(GROUP.prompts)
    for bn, expected in ((0.0, [0, 1, 0, 0]), (0.1, [1] * 4)):
        guide = Guidance(prior, TinyTeacher(), LABELS, GuidanceSettings(bn=bn))
        guide(prior.predict(State(GROUP.noise(0, prior.latent_shape), 2), condition))
        assert guide.skipped.tolist() == expected


def test_frames_count_what_was_left_out_so_far(prior, monkeypatch):
    monkeypatch.setattr(prior, "decode", overflowing(prior, [3]))
    counters, guide = Counters(), Guidance(prior, TinyTeacher(), LABELS, GuidanceSettings(interval=(0.0, 0.5)))
    frames = list(denoise(prior, GROUP, 0, guide=guide, intermediates=2, counters=counters))
    assert [frame.skipped for frame in frames] == [[0, 0, 0, 2], [0, 0, 0, 3], [0, 0, 0, 3]]  # before steps 2, 4, 6
    assert (counters.updates, counters.skipped_updates) == (3, 3)


def test_more_than_five_percent_of_a_shard_is_refused_as_soon_as_it_is_certain():
    settings = SynthSettings(group_size=10, groups_per_shard=2)
    check_skipped(Counters(updates=20, skipped_updates=10), settings, 1.0)  # 10 of 200
    with pytest.raises(NumericsError, match=r"11 of 200 guided .* \(prior.dtype=fp32\), more than 5% .* check"):
        check_skipped(Counters(updates=20, skipped_updates=11), settings, 1.0)
    check_skipped(Counters(updates=10, skipped_updates=10), settings, 0.5)  # the other half may be sound
    with pytest.raises(NumericsError):
        check_skipped(Counters(updates=10, skipped_updates=11), settings, 0.5)


def given(prior_folder, **kw):
    prior = {"path": str(prior_folder), "steps": 5, "cfg_scale": 1.0} | kw.pop("prior", {})
    sizes = {"groups_per_shard": 1, "group_size": 20, "device": "cpu"}
    return SynthSettings.model_validate({"prior": prior, "guidance": {"bn": 0.0, "decoder": "full"}} | sizes | kw)


def test_the_manifest_counts_and_the_report_warns(prior_folder, tmp_path):
    worker = ShardWorker(given(prior_folder), str(tmp_path), "f" * 64)
    worker.models.prior.decode = overflowing(worker.models.prior, [7])
    report = worker.run(0)
    rows = pq.read_table(tmp_path / done_records(Storage(str(tmp_path)))[0].table).to_pylist()
    assert [row["skipped_updates"] for row in rows] == [None] * 7 + [5] + [None] * 12
    assert report["skipped_updates"] == 5
    (warning,) = report["warnings"]
    assert warning.startswith("5 of 100 guided updates were left out")
    worker.models.prior.decode = overflowing(worker.models.prior, [7, 8])
    with pytest.raises(NumericsError, match="10 of 100"):
        worker.run(1)
    assert list(done_records(Storage(str(tmp_path)))) == [0]


def test_half_precision_that_overflows_stops_with_the_remedy(prior_folder, tmp_path):
    """A class prior of 10⁸ leaves half precision on its way back through the VAE, not single precision."""
    heavy = {"guidance": {"bn": 0.0, "ce": 1e8, "decoder": "full"}}
    half = ShardWorker(given(prior_folder, prior={"dtype": "fp16"}, **heavy), str(tmp_path / "half"), "f" * 64)
    with pytest.raises(NumericsError, match=r"100 of 100 .*\(prior.dtype=fp16\).*; set prior.dtype=bf16 or fp32"):
        half.run(0)
    single = ShardWorker(given(prior_folder, **heavy), str(tmp_path / "single"), "f" * 64)
    assert single.run(0)["skipped_updates"] == 0
