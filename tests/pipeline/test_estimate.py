"""What ``--dry-run`` of both stages tells: images, calls, counted compute and memory, and what it cannot know."""

import pytest

from manifests.errors import UsageError
from manifests.reader import Manifest
from pipeline import distill
from pipeline.recipe import resolve
from pipeline.synth import dry_run
from pipeline.terminal import flop
from stages.cost import synth_cost
from tests.pipeline.conftest import small_recipe
from tests.synth.tiny import save_ddpm


def test_dry_run_counts_and_writes_nothing(tmp_path):
    found = dry_run(small_recipe("shards=3"), str(tmp_path / "run"))
    assert (found.images, found.trajectories, found.denoiser_calls) == (60, 60, 0)
    assert found.disk_bytes_at_most > 60 * 8 * 8 * 3 * 0.8
    assert any("fingerprint" in line for line in found.lines())
    assert found.published_bn is None  # ``small_recipe`` runs no model
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sets", "calls"),
    [
        (["prior.cfg_scale=1.0"], 20),
        (["prior.cfg_scale=3.0"], 40),
        (["prior.cfg_scale=3.0", "prior.cfg_interval=[0.25,0.5]"], 25),
        (["method=noise"], 0),
    ],
)
def test_the_dry_run_counts_denoiser_calls(tmp_path, sets, calls):
    recipe = resolve("demo", section="synth", sets=["shards=1", "groups_per_shard=1", "group_size=2", *sets])
    found = dry_run(recipe, str(tmp_path / "run"))
    assert found.denoiser_calls == 2 * calls


def test_the_dry_run_counts_no_cfg_for_an_unconditional_prior(tmp_path):
    sets = [
        "shards=1",
        "groups_per_shard=1",
        "group_size=2",
        "prior.cfg_scale=3.0",
        f"prior.path={save_ddpm(tmp_path / 'p')}",
    ]
    assert dry_run(resolve("demo", section="synth", sets=sets), str(tmp_path / "run")).denoiser_calls == 2 * 20


def test_compute_and_memory_are_totals_of_the_counted_cost(tmp_path):
    recipe = resolve("demo", section="synth", sets=["shards=3", "images.intermediates=1"], environ={})
    found, counted = dry_run(recipe, str(tmp_path / "run")), synth_cost(recipe.synth)
    assert found.trajectories == 300 and found.images == 600
    assert found.cost.flop == 300 * counted.flop_per_trajectory
    assert found.cost.saved_bytes_per_group == 50 * counted.saved_bytes_per_trajectory > 0
    lines = "\n".join(found.lines())
    assert [round(unit, 1) for unit in found.published_bn] == [15.7, 8.2]  # of the digits teacher
    assert "a published weight of 1 (Σ of norms) is 15.7 here for means, 8.23 for variances" in lines
    assert found.cost.fit_decoder_once == counted.fit_decoder_once > 0 and "a decoder is fitted" in lines
    assert (
        f"{flop(300 * counted.flop_per_trajectory)} in all, {flop(counted.flop_per_trajectory / 2)} an image" in lines
    )
    assert not (tmp_path / "run").exists()


def test_a_prior_that_cannot_be_fetched_leaves_what_the_recipe_tells(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr("huggingface_hub.model_info", offline)
    recipe = resolve("demo", section="synth", sets=["prior.path=org/name", "images.size=32"], environ={})
    found = dry_run(recipe, str(tmp_path / "run"))
    assert (found.images, found.image_size, found.fingerprint, found.cost) == (400, 32, None, None)
    assert found.denoiser_calls == 400 * 20
    (line,) = [line for line in found.lines() if line.startswith("unknown")]
    assert "org/name" in line and "no network here" in line


def test_a_black_box_cannot_guide_and_the_dry_run_says_so(tmp_path, monkeypatch):
    (tmp_path / "boxed.py").write_text("def build():\n    return lambda x: x\n")
    monkeypatch.chdir(tmp_path)
    values = "{size: 8, mean: [0.5, 0.5, 0.5], std: [1, 1, 1]}"
    sets = ["teacher.name=boxed:build", "teacher.num_classes=2", f"teacher.input={values}"]
    recipe = resolve("demo", section="synth", sets=sets, environ={})
    with pytest.raises(UsageError, match="black box and cannot guide"):
        dry_run(recipe, str(tmp_path / "run"))
    free = dry_run(resolve("demo", section="synth", sets=[*sets, "method=dmkd"], environ={}), "run")
    assert free.cost.scores == 0 < free.cost.denoiser


def test_stage_two_counts_the_teacher_once_where_its_answers_are_cached(run_folder):
    manifest = Manifest.open(run_folder)
    cached = ["augment.num_views=2", "augment.cutmix=0", "augment.mixup=0", "teacher_cache.enabled=true"]
    plain, stored, short = (
        distill.dry_run(distill.resolve_distill(manifest, None, sets, {}), [(manifest.url, 1.0)], "out", None)
        for sets in (["epochs=10"], ["epochs=10", *cached], ["epochs=1", *cached])
    )
    rows = plain.sources[0].selected
    assert plain.images_per_epoch == 30 < rows
    assert plain.cost.teacher * rows * 2 == stored.cost.teacher * 30 * 10 > 0
    assert short.cost.teacher == stored.cost.teacher  # every view of every row, held-out ones included
    assert plain.cost.students == stored.cost.students
    assert any(line.startswith("compute") and "counted" in line for line in plain.lines())
