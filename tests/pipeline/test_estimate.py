"""What ``--dry-run`` of both stages tells: images, calls, counted compute and memory, and what it cannot know."""

import pytest
import torch

from manifests.errors import DataError, UsageError
from manifests.reader import Manifest
from pipeline import distill
from pipeline.recipe import resolve
from pipeline.synth import dry_run
from pipeline.terminal import flop
from stages.cost import synth_cost
from stages.models import nets
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
    (tmp_path / "boxed.py").write_text("def build():\n    return lambda x: x.mean((2, 3))[:, :2]\n")
    monkeypatch.chdir(tmp_path)
    values = "{size: 8, mean: [0.5, 0.5, 0.5], std: [1, 1, 1]}"
    sets = ["teacher.name=boxed:build", "teacher.num_classes=2", f"teacher.input={values}"]
    recipe = resolve("demo", section="synth", sets=sets, environ={})
    with pytest.raises(UsageError, match="cannot guide: use --method dmkd"):
        dry_run(recipe, str(tmp_path / "run"))
    free = dry_run(resolve("demo", section="synth", sets=[*sets, "method=dmkd"], environ={}), "run")
    assert free.cost.scores == 0 < free.cost.denoiser


def test_stage_two_counts_the_teacher_once_where_its_answers_are_cached(run_folder):
    manifest = Manifest.open(run_folder)
    cached = ["augment.num_views=2", "augment.cutmix=0", "augment.mixup=0", "teacher_cache.enabled=true"]
    plain, stored, short = (
        distill.dry_run(
            distill.resolve_distill(manifest, None, sets, {}), [(manifest.url, 1.0)], "out", "embedded:digits"
        )
        for sets in (["epochs=10"], ["epochs=10", *cached], ["epochs=1", *cached])
    )
    rows = plain.sources[0].selected
    assert plain.images_per_epoch == 30 < rows
    assert plain.cost.teacher * rows * 2 == stored.cost.teacher * 30 * 10 > 0
    assert short.cost.teacher == stored.cost.teacher  # every view of every row, held-out ones included
    assert plain.cost.students == stored.cost.students
    assert any(line.startswith("compute") and "counted" in line for line in plain.lines())


def test_a_dry_run_refuses_what_the_run_refuses(tmp_path, run_folder):
    """Device, weights that do not fit, another plan in the folder, fewer shards, test data that is not there."""
    demo = resolve("demo", environ={}).changed("synth.groups_per_shard=1", "synth.group_size=2")
    with pytest.raises(UsageError, match="device 'cuda:77' cannot be used"):
        dry_run(demo.changed("synth.device=cuda:77"), str(tmp_path / "new"))
    torch.save(nets.build("resnet20", 10).state_dict(), tmp_path / "x.pt")
    spec = "{size: 32, mean: [0.5, 0.5, 0.5], std: [1, 1, 1]}"
    teacher = ("name=resnet32", f"weights={tmp_path / 'x.pt'}", "num_classes=10", f"input={spec}")
    with pytest.raises(DataError, match="does not fit"):
        dry_run(demo.changed(*(f"synth.teacher.{each}" for each in teacher)), str(tmp_path / "new"))
    with pytest.raises(DataError, match="holds another plan"):
        dry_run(small_recipe("seed=9"), str(run_folder))
    with pytest.raises(UsageError, match="shards can only grow"):
        dry_run(small_recipe("shards=1"), str(run_folder))
    manifest = [(str(run_folder / "m.parquet"), 1.0)]
    with pytest.raises(UsageError, match="a run of stage 1 is there"):
        distill.dry_run(demo, manifest, str(run_folder), None)
    with pytest.raises(DataError, match="nowhere"):
        distill.dry_run(demo, manifest, str(tmp_path / "d"), "embedded:digits", test_data=str(tmp_path / "nowhere"))
    assert not (tmp_path / "new").exists() and not (tmp_path / "d").exists()


def test_a_dry_run_says_what_differs_from_the_defaults(tmp_path):
    lines = [*dry_run(small_recipe("guidance.step_size=0.3"), str(tmp_path / "run")).lines()]
    at = next(i for i, line in enumerate(lines) if line.startswith("settings"))
    assert any("synth.guidance.step_size = 0.3 (default 0.1)" in line for line in lines[at:])
    assert any("fingerprint" in line for line in lines[:at]) and not any("synth.guidance.ce " in line for line in lines)
    assert len(lines) < 40
