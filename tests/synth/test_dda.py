"""Diffusion augmentation: between the source and pure generation; rows name their source, the filter is recorded."""

import json

import pytest
import torch
import torch.nn.functional as F

from manifests.errors import UsageError
from manifests.integrity import verify
from manifests.reader import Manifest
from pipeline.distill import run_distill
from pipeline.executors.settings import ExecutorSettings
from pipeline.recipe import resolve
from pipeline.repair import rebuild_run
from pipeline.rescore import rescore
from pipeline.synth import dry_run, run_synth
from stages.distill.rows import select_rows, split_validation
from stages.models.loading import load_teacher
from stages.settings import DdaSettings, PriorSettings, SynthSettings
from stages.synth.dda import dda
from stages.synth.group import make_group
from stages.synth.inputs import inspect_inputs
from stages.synth.priors.kinds import load_prior
from stages.synth.sampler import Counters, denoise
from stages.synth.scores import filtered, stored_images
from stages.synth.worker import load_models
from tests.synth.tiny import save_ddpm, save_dit, save_ldm, save_stable_diffusion_dc, save_stable_diffusion_xl

PLACE = ExecutorSettings()
FAMILIES = [save_dit, save_ldm, save_ddpm, save_stable_diffusion_dc, save_stable_diffusion_xl]


def recipe(prior_folder, **more):
    tiny = [
        *("method=dda", f"prior.path={prior_folder}", "prior.steps=5", "prior.cfg_scale=0.5", "device=cpu"),
        *("cmi.steps=3", "cmi.width=4", "cmi.latent=8", "dda.variants=2", "dda.min_cosine=0.5", "min_confidence=0.05"),
        *("groups_per_shard=2", "group_size=6", "shards=2"),
    ]
    return resolve("demo", section="synth", sets=[*tiny, *(f"{k.replace('__', '.')}={v}" for k, v in more.items())])


@pytest.fixture(scope="module")
def made(prior_folder, tmp_path_factory):
    """(recipe, report, manifest) of 24 sources with two variants each."""
    asked = recipe(prior_folder)
    report = run_synth(asked, str(tmp_path_factory.mktemp("dda") / "run"), PLACE, quiet=True)
    return asked, report, Manifest.open(report.manifest)


def all_rows(manifest):
    return manifest.where(include_rejected=True).to_table().to_pylist()


def pictures(n=3, side=16):
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    return torch.stack([torch.stack([y, x, y * x]) * (i + 1) / n for i in range(n)])


def test_first_step_by_strength():
    assert [DdaSettings(strength=s).first_step(20, False) for s in (1.0, 0.5, 0.3, 0.01)] == [0, 10, 14, 20]
    assert DdaSettings(strength=0.5).first_step(20, True) == 0


def test_the_filter_by_hand():
    low = "teacher gives its class 0.1 < 0.5"
    assert filtered({"cosine": 0.76, "reject_reason": low}, 0.75) == {}
    assert filtered({"cosine": 0.75, "reject_reason": None}, 0.75) == {
        "kept": False,
        "reject_reason": "cosine with its source 0.750 <= 0.75",
    }
    assert filtered({"cosine": 0.5, "reject_reason": low}, 0.75)["reject_reason"].startswith(low + "; cosine")


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver++", "euler"])
def test_strength_one_is_pure_generation_and_none_the_source(prior_folder, scheduler):
    prior = load_prior(PriorSettings(path=str(prior_folder), scheduler=scheduler, steps=4, cfg_scale=0.5), "cpu")
    group = make_group(SynthSettings(group_size=3), 0, ("a", "b"))
    origin = prior.encode_images(pictures())

    def made(first, **kw):
        counters = Counters()
        start = prior.noised(origin, group.noise(5, prior.latent_shape), first)
        (frame,) = denoise(prior, group, 5, start=start, counters=counters, **kw)
        return frame.images, counters.evaluations

    (pure,) = denoise(prior, group, 5)
    whole, evaluations = made(0)
    assert torch.equal(whole, pure.images) and evaluations == 4
    still, evaluations = made(4)
    assert torch.equal(still, prior.decode(origin)) and evaluations == 0
    noise = group.noise(5, prior.latent_shape)
    alpha, sigma = prior.levels(2)
    assert torch.allclose(prior.noised(origin, noise, 2).z, alpha * origin + sigma * noise)
    assert made(2)[1] == 2 and not torch.equal(made(2)[0], still)


def test_the_embedded_prior_gives_back_what_it_is_given():
    """Encoding inverts decoding up to the VAE's error, and the less strength, the nearer stays the source."""
    prior = load_prior(PriorSettings(steps=10, cfg_scale=1.0), "cpu")
    drawn = SynthSettings(group_size=8, prompts={"template": "two thick connected strokes, a loop and a line"})
    group = make_group(drawn, 0, ("a", "b"))
    *_, source = denoise(prior, group, 0)
    origin = prior.encode_images(source.images)
    errors = []
    for first in (10, 9, 5, 0):
        (frame,) = denoise(prior, group, 1, start=prior.noised(origin, group.noise(1, prior.latent_shape), first))
        errors.append(F.mse_loss(frame.images, source.images).item())
    spread = source.images.var().item()
    assert errors == sorted(errors) and errors[0] < 0.02 * spread and errors[1] < 0.1 * spread < errors[3]


@pytest.mark.parametrize("save", FAMILIES)
def test_every_family_encodes_images(tmp_path, save):
    folder = save(tmp_path / "prior")
    prior = load_prior(PriorSettings(path=str(folder), steps=4, labels={"a": 0}), "cpu")
    latents = prior.encode_images(pictures(2, side=8))  # resized to 16
    assert latents.shape == (2, *prior.latent_shape) and latents.isfinite().all()
    if save is save_ddpm:
        assert torch.equal(prior.encode_images(pictures(2)), pictures(2))
    sliced = load_prior(PriorSettings(path=str(folder), steps=4, vae_slicing=True), "cpu")
    assert torch.allclose(sliced.encode_images(pictures(2, side=8)), latents, atol=1e-5)


def test_guidance_below_one_lies_between_the_two_predictions(prior_folder):
    """eps_u + 0.5·(eps_c − eps_u)."""
    outputs = {}
    for cfg in (0.0, 0.5, 1.0):
        prior = load_prior(PriorSettings(path=str(prior_folder), steps=4, cfg_scale=cfg, negative_prompt="b"), "cpu")
        noise = torch.randn(2, *prior.latent_shape, generator=torch.Generator().manual_seed(0))
        outputs[cfg] = prior.predict(prior.start(noise), prior.encode(["a", "a"])).output
    assert torch.allclose(outputs[0.5], (outputs[0.0] + outputs[1.0]) / 2, atol=1e-5)
    assert not torch.allclose(outputs[0.0], outputs[1.0], atol=1e-5)


def test_rows_name_their_source_and_follow_the_filter(made):
    _, report, manifest = made
    rows = all_rows(manifest)
    assert report.rows == len(rows) == 2 * 2 * 6 * 3
    images = stored_images(manifest.where(include_rejected=True), range(len(rows)))
    teacher = load_teacher(SynthSettings().teacher, "cpu")
    with torch.no_grad():
        logits, features = teacher.with_features(images)
    probability = logits.softmax(1)
    keys = {row["key"]: i for i, row in enumerate(rows)}
    far = 0
    for i, row in enumerate(rows):
        sure = probability[i, row["label"]].item() >= 0.05
        if i % 3 == 0:
            assert row["source_key"] is None and row["cosine_ref"] == f"class:{row['label']}"
            assert row["prompt"] is None and row["step"] == 3 and row["kept"] == sure
            continue
        source = keys[row["source_key"]]
        assert source == i - i % 3 and rows[source]["trajectory"] == row["trajectory"]
        assert (row["step"], row["timestep"], rows[source]["label"]) == (5, 0, row["label"]) and row["prompt"]
        assert (row["cosine_ref"], row["cosine_space"]) == ("source", "teacher")
        assert row["cosine"] == pytest.approx(
            F.cosine_similarity(features[i], features[source], dim=0).item(), abs=1e-4
        )
        assert row["kept"] == (sure and row["cosine"] > 0.5)
        assert ("cosine with its source" in (row["reject_reason"] or "")) == (row["cosine"] <= 0.5)
        far += row["cosine"] <= 0.5
    assert 0 < far < 48
    assert not torch.equal(images[1], images[2]) and not torch.equal(images[0], images[1])


def test_the_dry_run_counts_what_is_made(made, prior_folder, tmp_path):
    asked, report, _ = made
    told = dry_run(asked, str(tmp_path / "other"))
    assert told.images == report.rows == 3 * told.trajectories and told.image_size == 8
    assert told.denoiser_calls == 2 * 2 * 2 * 24  # variants, steps 3 and 4 (round(0.5 · 5) = 2), CFG, trajectories
    without = dry_run(recipe("/nowhere", method="cmi"), str(tmp_path / "x"))
    assert (without.denoiser_calls, without.images, without.prior["name"]) == (0, 24, "none")


def test_equal_plans_give_equal_bytes(made, tmp_path):
    asked, _, manifest = made
    again = run_synth(asked, str(tmp_path / "run"), PLACE, quiet=True)
    assert Manifest.open(again.manifest).info.tars == manifest.info.tars


def test_the_index_is_rebuilt_with_its_sources(made, tmp_path):
    report = run_synth(made[0], str(tmp_path / "run"), PLACE, quiet=True)
    before = all_rows(Manifest.open(report.manifest))
    assert verify(report.manifest) == []
    for name in ("m.parquet", *(f"done/{i:06d}.json" for i in range(2))):
        (tmp_path / "run" / name).unlink()
    rebuild_run(str(tmp_path / "run"))
    assert all_rows(Manifest.open(report.manifest)) == before


def test_rescoring_asks_the_filter_again(made):
    _, _, manifest = made
    stricter = Manifest.open(rescore(manifest.url, threshold=0.3, out="strict.parquet", quiet=True).manifest)
    for old, new in zip(all_rows(manifest), all_rows(stricter), strict=True):
        assert new["source_key"] == old["source_key"] and new["cosine"] == pytest.approx(old["cosine"], abs=1e-4)
        if new["source_key"]:
            sure = "teacher gives" not in (new["reject_reason"] or "")
            assert new["kept"] == (sure and new["cosine"] > 0.5)
    back = rescore(stricter.url, threshold=0.05, out="back.parquet", quiet=True)
    assert [r["kept"] for r in all_rows(Manifest.open(back.manifest))] == [r["kept"] for r in all_rows(manifest)]


def test_stage_two_holds_families_out_together_and_learns_from_derived_images(made, tmp_path):
    _, _, manifest = made
    sets = ["epochs=2", "loss.variants_ce=1", "val_fraction=0.3", "include_rejected=true"]
    given = resolve("demo", section="distill", environ={}, sets=sets)
    rows = select_rows([(manifest, 1.0)], given.distill)
    assert rows.derived.tolist() == [False, True, True] * 24
    train, held = split_validation(rows, 0.3, 0)
    assert len(held) and len(held) % 3 == 0 and not set(train // 3) & set(held // 3)
    done = run_distill(given, [(manifest.url, 1.0)], str(tmp_path / "s"), quiet=True)
    assert done.val_images == len(held)
    (metrics,) = (tmp_path / "s").glob("*/metrics.jsonl")
    assert [json.loads(line)["variants_ce"] > 0 for line in metrics.read_text().splitlines()] == [True, True]


def test_the_contrastive_space_and_steering(prior_folder):
    """Cosines come from the group's own head; a guided variant differs from an unguided one."""
    frames = {}
    for name, more in (
        ("plain", {}),
        ("contrastive", {"dda__space": "contrastive"}),
        ("guided", {"dda__guided": "true"}),
    ):
        parsed = recipe(prior_folder, **more).synth
        models = load_models(parsed)
        group = make_group(parsed, 0, models.teacher.class_names)
        frames[name] = list(dda(models, group, parsed, Counters()))
    assert torch.equal(frames["plain"][1].images, frames["contrastive"][1].images)
    assert torch.equal(frames["plain"][0].images, frames["guided"][0].images)
    assert not torch.equal(frames["plain"][1].images, frames["guided"][1].images)
    assert frames["plain"][1].embed is None
    embed = frames["contrastive"][1].embed
    vectors = embed(frames["contrastive"][0].images)
    assert vectors.shape == (6, 256) and torch.allclose(vectors.norm(dim=1), torch.ones(6), atol=1e-5)


def test_contrastive_cosines_are_recorded_and_survive_another_judge(prior_folder, tmp_path):
    asked = recipe(prior_folder, dda__space="contrastive", shards=1)
    manifest = Manifest.open(run_synth(asked, str(tmp_path / "run"), PLACE, quiet=True).manifest)
    derived = [row for row in all_rows(manifest) if row["source_key"]]
    assert {row["cosine_space"] for row in derived} == {"contrastive"}
    assert all(("cosine with" in (row["reject_reason"] or "")) == (row["cosine"] <= 0.5) for row in derived)
    other = Manifest.open(rescore(manifest.url, threshold=0.9, quiet=True).manifest)
    assert [r["cosine"] for r in all_rows(other) if r["source_key"]] == [r["cosine"] for r in derived]


def test_variants_that_begin_too_late_are_refused(prior_folder):
    for more, line in (
        ({"dda__strength": 0.1}, r"dda\.strength 0\.1 leaves none of 5 steps: set 0\.2 or more"),
        ({"dda__guided": True, "guidance__interval": [0, 0.6]}, "dda.guided steers nothing: .* begin at step 3 of 5"),
    ):
        with pytest.raises(UsageError, match=line):
            inspect_inputs(recipe(prior_folder, **more).synth)
    inspect_inputs(recipe(prior_folder, dda__guided=True, guidance__interval=[0, 0.7]).synth)


def test_a_teacher_without_features_needs_the_contrastive_space(prior_folder, monkeypatch):
    from stages.synth import worker

    def headless(*given):
        teacher = load_teacher(*given)
        teacher._head = None
        return teacher

    monkeypatch.setattr(worker, "load_teacher", headless)
    with pytest.raises(UsageError, match="dda.space=contrastive"):
        load_models(recipe(prior_folder).synth)
