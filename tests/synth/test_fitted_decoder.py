"""The fitted decoder: what it learns from a prior, that everybody gets the same weights, how its fidelity is told."""

import logging

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from manifests.errors import DataError, FactoryError, NumericsError, UsageError
from manifests.shard import done_records
from manifests.storage import Storage
from stages.cost import Flops, synth_cost
from stages.models.loading import load_teacher
from stages.settings import PriorSettings, SynthSettings
from stages.synth import decoders as fd
from stages.synth.decoders import fidelity, load_decoder
from stages.synth.priors.kinds import load_prior
from stages.synth.worker import ShardWorker
from tests.synth.tiny import save_ddpm

pytestmark = pytest.mark.usefixtures("quick_fit")


def settings(folder, **kw):
    return SynthSettings.model_validate(
        {
            "prior": {"path": str(folder), "steps": 3, "cfg_scale": 1.0},
            "guidance": {"decoder": "fitted"},
            "groups_per_shard": 1,
            "group_size": 4,
            "device": "cpu",
        }
        | kw
    )


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def accept(data, where):
    """Any bytes are sound."""


@pytest.mark.parametrize(("size", "rule"), [(4, "area"), (8, "bilinear"), (12, "bicubic"), (16, "bilinear")])
def test_images_have_the_teachers_size_and_do_not_depend_on_the_batch(size, rule):
    net, z0 = fd.FittedDecoder(4, 8, size, rule), torch.randn(3, 4, 8, 8)
    assert net(z0).shape == (3, 3, size, size)
    torch.testing.assert_close(net(z0)[:1], net(z0[:1]))


def test_pull_back_is_the_jacobian_transposed_whatever_the_chunks(monkeypatch):
    matrix, latents, cotangents = torch.randn(12, 8), torch.randn(5, 2, 2, 2), torch.randn(5, 3, 2, 2)

    def decode(z0):
        return (z0.flatten(1) @ matrix.T).view(-1, 3, 2, 2)

    for cells in (1, 8, 4096):  # one, two, all latents at once
        monkeypatch.setattr(fd, "AT_ONCE", cells)
        images, gradients = fd.decode_with_vjp(decode, latents, cotangents)
        torch.testing.assert_close(images, decode(latents))
        torch.testing.assert_close(gradients.flatten(1), cotangents.flatten(1) @ matrix)


def test_latents_are_the_priors_predictions_at_each_noise_level(prior):
    drawn = fd.draw_latents(prior, ["a", "b"], visits=3, seed=0)
    assert drawn.shape == (3 * 2, *prior.latent_shape)
    assert torch.equal(drawn, fd.draw_latents(prior, ["a", "b"], visits=3, seed=0))
    assert not torch.equal(drawn, fd.draw_latents(prior, ["a", "b"], visits=3, seed=1))
    first = prior.start(torch.randn(2, *prior.latent_shape, generator=fd.torch_rng(0, "decoder", 0)))
    with torch.no_grad():
        torch.testing.assert_close(drawn[:2], prior.predict(first, prior.encode(["a", "b"])).z0)


def test_equal_fits_are_equal_bit_by_bit(prior):
    nets = [fd.fit(prior, ["a", "b"] * 8, 8, "bilinear") for _ in range(2)]
    assert torch.equal(*(weights(net) for net in nets))


def test_a_fit_learns_images_and_gradients(monkeypatch):
    monkeypatch.setattr(fd, "STEPS", 80)
    prior = load_prior(
        PriorSettings(steps=10, cfg_scale=1.0), "cpu"
    )  # the embedded one: a trained decoder is learnable
    wanted = ["two thin connected strokes, a loop", "one thick stroke, an arc"] * 8
    net = fd.fit(prior, wanted, 8, "bilinear")
    latents = fd.draw_latents(prior, wanted, 2, seed=9)
    cotangents = torch.randn(len(latents), 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def full(z0):
        return F.interpolate(prior.decode(z0), size=(8, 8), mode="bilinear", antialias=True)

    images, gradients = fd.decode_with_vjp(full, latents, cotangents)
    made, slopes = fd.decode_with_vjp(net, latents, cotangents)
    assert (made - images).square().mean() < 0.08 * images.var()
    assert (
        F.cosine_similarity(slopes.flatten(1), gradients.flatten(1)).mean() > 0.8
    )  # 0.72 where images alone are matched


def test_the_full_decoder_is_its_own_equal_and_an_untrained_map_draws_a_warning(prior_folder, caplog):
    asked = settings(prior_folder)
    prior, teacher = load_prior(asked.prior, "cpu"), load_teacher(asked.teacher)
    told = fidelity(prior.decode, prior, asked, teacher)
    assert told == {"pixel_error": 0.0, "gradient_cosine": pytest.approx(1.0, abs=1e-3)}
    with caplog.at_level(logging.WARNING):
        fidelity(fd.FittedDecoder(4, 8, 8, "bilinear"), prior, asked, teacher)
        fidelity(lambda z0: prior.decode(z0) * float("nan"), prior, asked, teacher)
    assert caplog.text.count("cosine of") == 2 and "cosine of nan" in caplog.text


def test_the_first_writer_decides_for_everybody(tmp_path):
    run, cache = Storage(str(tmp_path / "run")), Storage(str(tmp_path / "cache"))

    def late():  # another worker finishes while this one still fits
        run.create("d", b"theirs")
        return b"mine"

    (tmp_path / "cache").mkdir(exist_ok=True)
    assert fd.published(run, "d", lambda: fd.cached(cache, "local", late, accept)) == b"theirs"
    assert fd.published(run, "d", lambda: pytest.fail("there is one")) == b"theirs"
    assert cache.read("local") == b"mine"  # what this machine makes, for its next run
    assert fd.cached(cache, "local", lambda: b"again", accept) == b"mine"


def test_a_cache_that_cannot_be_written_costs_a_line_a_run_folder_the_run(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert fd.cached(Storage(str(blocked)), "d", lambda: b"made", accept) == b"made"
    assert "not kept for the next run" in caplog.text
    with pytest.raises(FactoryError):
        fd.published(Storage(str(blocked)), "d", lambda: b"made")


def test_workers_of_a_run_share_weights_even_if_their_machines_would_fit_others(prior_folder, tmp_path, monkeypatch):
    asked, url = settings(prior_folder, shards=2).model_dump(mode="json"), str(tmp_path / "run")
    report = ShardWorker(asked, url, "f" * 64).run(0)
    assert report["decoder"]["kind"] == "fitted" and report["decoder"]["pixel_error"] > 0
    assert (report["updates"], report["decodes"]) == (3, 1)
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path / "another machine"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)  # in the cache's key alone
    monkeypatch.setattr(fd, "fit", lambda *a: pytest.fail("the run's folder has one"))
    worker = ShardWorker(asked, url, "f" * 64)
    second = worker.run(1)
    assert second["decoder"] == report["decoder"]
    assert "decoder" not in worker.run(1)  # told once


def test_damaged_weights_are_one_line(prior_folder, tmp_path):
    asked, run = settings(prior_folder), Storage(str(tmp_path / "run"))
    prior, teacher = load_prior(asked.prior, "cpu"), load_teacher(asked.teacher)
    load_decoder(prior, asked, teacher, run)
    (name,) = run.list("decoder")
    run.write(name, run.read(name)[:-8])
    with pytest.raises(DataError, match=f"{name} is truncated"):
        load_decoder(prior, asked, teacher, run)


@pytest.mark.parametrize("damage", ["cut off", "not finite"])
def test_a_damaged_cache_is_dropped_and_never_reaches_a_run(prior_folder, tmp_path, caplog, damage):
    asked, cache = settings(prior_folder), Storage(fd.cache_folder())
    prior, teacher = load_prior(asked.prior, "cpu"), load_teacher(asked.teacher)
    before = weights(load_decoder(prior, asked, teacher))
    (name,) = cache.list("decoder")
    sound = cache.read(name)
    nan = {key: value * float("nan") for key, value in safetensors.torch.load(sound).items()}
    cache.write(name, sound[:-8] if damage == "cut off" else safetensors.torch.save(nan))
    run = Storage(str(tmp_path / "run"))
    assert torch.equal(weights(load_decoder(prior, asked, teacher, run)), before)
    (shared,) = run.list("decoder")
    assert run.read(shared) == cache.read(name) == sound and shared != name
    assert f"{cache.path(name)} " in caplog.text and "fitted again" in caplog.text


def test_a_fit_that_diverges_is_one_line_and_not_kept(prior_folder, monkeypatch):
    asked = settings(prior_folder)
    prior, teacher = load_prior(asked.prior, "cpu"), load_teacher(asked.teacher)
    monkeypatch.setattr(fd, "sobolev_loss", lambda net, *a: sum(p.sum() for p in net.parameters()) * float("nan"))
    with pytest.raises(NumericsError, match="not finite; set guidance.decoder=full"):
        load_decoder(prior, asked, teacher)
    assert not Storage(fd.cache_folder()).list("decoder")


def small_memory(monkeypatch, most):
    """A machine on which the full decoder takes ``most`` latents at once where gradients are wanted."""
    decode = AutoencoderKL.decode

    def limited(self, latents):
        if torch.is_grad_enabled() and len(latents) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return decode(self, latents)

    monkeypatch.setattr(AutoencoderKL, "decode", limited)


def test_a_fit_that_exceeds_the_memory_takes_fewer_latents_at_once(prior_folder, monkeypatch):
    prior, wanted = load_prior(settings(prior_folder).prior, "cpu"), ["a", "b"] * 2
    whole = weights(fd.fit(prior, wanted, 8, "bilinear"))
    small_memory(monkeypatch, 2)
    torch.testing.assert_close(weights(fd.fit_in_memory(prior, wanted, 8, "bilinear")), whole, rtol=1e-2, atol=1e-3)
    small_memory(monkeypatch, 0)
    with pytest.raises(FactoryError, match=r"\(CUDA out of memory.*GiB\): set guidance.decoder=tiny"):
        fd.fit_in_memory(prior, wanted, 8, "bilinear")


def test_without_memory_for_the_full_decoders_gradients_a_worker_tells_no_fidelity(
    prior_folder, tmp_path, monkeypatch, caplog
):
    asked, storage = settings(prior_folder), Storage(tmp_path)
    told = ShardWorker(asked.model_dump(mode="json"), storage.url, "f" * 64).run(0)["decoder"]
    small_memory(monkeypatch, 0)
    report = ShardWorker(asked.model_dump(mode="json"), storage.url, "f" * 64).run(1)
    assert report["decoder"] == {"kind": "fitted", "sha256": told["sha256"]} and report["updates"] == 3
    assert "no memory to compare" in caplog.text


def test_a_prior_of_pixels_is_guided_on_its_pixels(tmp_path):
    asked = settings(save_ddpm(tmp_path / "ddpm"))
    prior, teacher = load_prior(asked.prior, "cpu"), load_teacher(asked.teacher)
    assert load_decoder(prior, asked, teacher) is None
    report = ShardWorker(asked.model_dump(mode="json"), str(tmp_path / "run"), "f" * 64).run(0)
    assert report["updates"] == 3 and "decoder" not in report
    tiny = settings(prior.folder, guidance={"decoder": "tiny", "tiny_decoder": "anything"})
    with pytest.raises(UsageError, match="works on pixels"):
        load_decoder(prior, tiny, teacher)


def test_the_counted_cost_of_a_fit_is_that_of_fitting(prior_folder):
    asked = settings(prior_folder, prior={"path": str(prior_folder), "steps": 3, "cfg_scale": 2.0})
    prior, names = load_prior(asked.prior, "cpu"), load_teacher(asked.teacher).class_names
    wanted = fd.conditions(prior, asked, names, fd.trajectories(prior.latent_shape[1]))
    prior.encode(wanted)
    with Flops() as text:  # the negative prompt, which is not kept
        prior.encode(wanted)
    with Flops() as real:
        fd.fit(prior, wanted, 8, "bilinear")
    assert synth_cost(asked).fit_decoder_once == real.total - text.total > 0
    assert synth_cost(settings(prior_folder, method="dmkd")).fit_decoder_once == 0


def test_the_decoder_is_part_of_the_plan_and_of_the_bytes(prior_folder, tmp_path):
    tars = []
    for kind in ("full", "fitted"):
        storage = Storage(str(tmp_path / kind))
        asked = settings(prior_folder, guidance={"decoder": kind})
        ShardWorker(asked.model_dump(mode="json"), storage.url, "f" * 64).run(0)
        tars.append(done_records(storage)[0].tar_sha256)
    assert tars[0] != tars[1]
