"""Stage 1 end to end with a worker that needs no model: complete, resumed, grown, failed, refused."""

import json

import pytest

from manifests.errors import DataError, FactoryError, UsageError
from manifests.reader import Manifest
from manifests.storage import Storage
from pipeline.distill import resolve_distill
from pipeline.events import quarantined, read_events
from pipeline.executors.pool import WorkerSpec
from pipeline.lease import Lease
from pipeline.plan import make_plan, open_or_create, withdraw
from pipeline.recipe import resolve
from pipeline.synth import WORKER, run_synth
from stages.models import folders, nets
from stages.models.loading import load_model, save_model
from stages.models.source import resolve as resolve_model
from stages.settings import ModelSettings
from stages.synth.inputs import inspect_inputs
from stages.synth.worker import ShardWorker
from tests.pipeline.conftest import INLINE, small_recipe
from tests.pipeline.fake_worker import FACTORY, POISON, row


def run(folder, *sets, worker=FACTORY, place=INLINE):
    return run_synth(small_recipe(*sets), str(folder), place, worker=worker, quiet=True)


def shard_names(folder):
    return sorted(path.name for path in (folder / "shards").iterdir())


def test_a_run_gives_a_manifest_that_says_what_it_is(run_folder):
    manifest = Manifest.open(run_folder / "m.parquet")
    assert manifest.num_rows == 40
    assert len(manifest) == 32
    assert manifest.info.recipe["name"] == "demo"
    assert manifest.info.recipe["synth"]["shards"] == 2
    assert manifest.info.teacher["architecture"]
    assert manifest.info.image_size == 8
    plan = json.loads((run_folder / "plan.json").read_text())
    assert manifest.info.fingerprint == plan["fingerprint"]
    assert {"torch", "numpy"} <= set(plan["versions"])
    kinds = [event["kind"] for event in read_events(Storage(run_folder))]
    assert kinds[0] == "run_started" and kinds[-1] == "run_finished" and kinds.count("shard_done") == 2


def test_an_inline_run_reads_and_builds_its_teacher_once(tmp_path, monkeypatch):
    reads, builds = [], []
    read, build = folders.read_regular, nets.ARCHITECTURES["digits-cnn"]

    def built(*arguments):
        builds.append(build(*arguments))
        return builds[-1]

    monkeypatch.setattr(folders, "read_regular", lambda path, *more: reads.append(path.name) or read(path, *more))
    monkeypatch.setitem(nets.ARCHITECTURES, "digits-cnn", built)
    small = ("shards=1", "groups_per_shard=1", "group_size=4", "cmi.steps=1", "cmi.width=8", "cmi.latent=8")
    run(tmp_path / "run", "method=cmi", "images.size=null", *small, worker=None)
    assert reads.count("model.safetensors") == 1
    assert [next(net.parameters()).is_meta for net in builds] == [True, False]  # compared with its weights, then loaded


def test_the_report_counts(tmp_path):
    report = run(tmp_path / "run")
    assert (report.shards, report.rows, report.kept) == (2, 40, 32)
    assert report.manifest == str(tmp_path / "run/m.parquet")


def test_a_dataset_without_a_kept_image_is_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.pipeline.fake_worker.row", lambda *at: row(*at) | {"kept": False, "reject_reason": "x"})
    for _ in range(2):
        report = run(tmp_path / "run")
        assert (report.rows, report.kept) == (40, 0)
        assert [line for line in report.lines() if "no image was kept" in line]


def test_the_same_command_again_changes_no_byte(run_folder):
    before = {path.name: path.read_bytes() for path in [run_folder / "m.parquet", *(run_folder / "shards").iterdir()]}
    run(run_folder)
    assert before == {p.name: p.read_bytes() for p in [run_folder / "m.parquet", *(run_folder / "shards").iterdir()]}


def test_growing_adds_and_equals_one_large_run(tmp_path, run_folder):
    before = shard_names(run_folder)
    run(run_folder, "shards=4")
    assert set(before) < set(shard_names(run_folder))
    run(tmp_path / "large", "shards=4")
    assert shard_names(run_folder) == shard_names(tmp_path / "large")
    assert (run_folder / "m.parquet").read_bytes() == (tmp_path / "large/m.parquet").read_bytes()


def edited(shards=2, **distill):
    recipe = small_recipe(f"shards={shards}")
    return recipe.model_copy(update={"distill": recipe.distill.model_copy(update=distill)})


@pytest.mark.parametrize("shards", [2, 3])
@pytest.mark.parametrize("where", ["local", "memory"])
def test_edited_settings_of_stage_2_reach_the_manifest_of_a_finished_run(tmp_path, capsys, where, shards):
    out = str(tmp_path / "run") if where == "local" else f"memory://edited-{shards}/run"
    storage = Storage(out)

    def make(recipe):
        run_synth(recipe, out, INLINE, worker=FACTORY, quiet=True)
        return Manifest.open(out)

    first = make(edited(epochs=3))
    unedited, shard = storage.read("m.parquet"), storage.list("shards")
    capsys.readouterr()
    second = make(edited(shards, epochs=5))
    assert resolve_distill(second, None, (), {}).distill.epochs == 5
    assert second.info.fingerprint == first.info.fingerprint and set(shard) <= set(storage.list("shards"))
    assert (second.digest == first.digest) == (shards == 2)  # the same data, for whoever resumes a training on it
    line = f"stage 2's settings stored in {storage.url} are replaced: distill.epochs: 3 there, 5 here"
    assert line in capsys.readouterr().err
    assert [e["message"] for e in read_events(storage) if e["kind"] == "note"] == [line]
    if shards == 2:
        assert make(edited(epochs=3)).info == first.info and storage.read("m.parquet") == unedited


def test_a_lost_manifest_comes_back_from_done_shards(run_folder):
    before = (run_folder / "m.parquet").read_bytes()
    (run_folder / "m.parquet").unlink()
    run(run_folder)
    assert (run_folder / "m.parquet").read_bytes() == before


def test_a_failing_shard_leaves_the_others_done_and_the_run_failed(tmp_path):
    with pytest.raises(FactoryError, match=r"1 of 3 shards failed.*--retry-failed") as caught:
        run(tmp_path / "run", "shards=3", worker=POISON)
    assert caught.value.exit_code == 1
    assert sorted(path.name for path in (tmp_path / "run/done").iterdir()) == ["000000.json", "000002.json"]
    assert not (tmp_path / "run/m.parquet").exists()
    with pytest.raises(FactoryError, match="--retry-failed"):
        run(tmp_path / "run", "shards=3")
    run(tmp_path / "run", "shards=3", place=INLINE.model_copy(update={"retry_failed": True}))
    assert not quarantined(Storage(tmp_path / "run"))
    assert Manifest.open(tmp_path / "run").num_rows == 60


def test_another_plan_is_refused_before_anything_happens(run_folder):
    before = sorted(path for path in run_folder.rglob("*"))
    with pytest.raises(DataError, match="holds another plan"):
        run(run_folder, "seed=5")
    assert before == sorted(path for path in run_folder.rglob("*"))


def test_after_workers_could_not_start_other_settings_may_try(tmp_path):
    with pytest.raises(FactoryError, match="cannot start"):
        run(tmp_path / "run", worker="tests.pipeline.fake_worker:no_such_function")
    run(tmp_path / "run", "seed=5")
    assert Manifest.open(tmp_path / "run").info.recipe["synth"]["seed"] == 5


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_teacher_that_changes_after_the_plan_is_not_used(tmp_path, monkeypatch, elsewhere):
    """A worker in another process, as on a machine with another copy of the folder, stops the run; one in the driver's
    own process works with what was read for the plan."""
    planned = resolve_model(ModelSettings()).identity["sha256"]
    net, config = load_model("embedded:digits")
    save_model(tmp_path / "teacher", net, config)

    def overwrite(*_):
        net.classifier.bias.data += 1
        save_model(tmp_path / "teacher", net, config)

    monkeypatch.setattr("pipeline.synth.publish", overwrite)
    sets = ("method=dmkd", f"teacher.name={tmp_path / 'teacher'}", "shards=1", "groups_per_shard=1", "prior.steps=2")
    if elsewhere:
        monkeypatch.setattr(WorkerSpec, "build", lambda spec: ShardWorker(**spec.kwargs))
        line = r"/teacher on .* is not the one that the run was planned with: its sha256 is"
        with pytest.raises(DataError, match=line):
            run(tmp_path / "run", *sets, worker=WORKER)
        assert not (tmp_path / "run/done").exists()
    else:
        run(tmp_path / "run", *sets, worker=WORKER)
        assert Manifest.open(tmp_path / "run").info.teacher["sha256"] == planned
        assert resolve_model(ModelSettings(name=str(tmp_path / "teacher"))).identity["sha256"] != planned


def test_a_second_driver_is_refused(run_folder):
    with Lease(Storage(run_folder)), pytest.raises(FactoryError, match="in use by another driver"):
        run(run_folder, "shards=3")


TINY = ("method=diffdfkd", "group_size=10", "groups_per_shard=1", "prior.steps=2", "guidance.decoder=full")


@pytest.mark.parametrize("where", ["local", "memory"])
def test_what_only_a_worker_can_refuse_leaves_nothing_behind_either(tmp_path, where):
    out = str(tmp_path / "run") if where == "local" else f"memory://{tmp_path}/run"
    recipe = resolve("demo", section="synth", sets=[*TINY, "device=tpu"], environ={})
    with pytest.raises(UsageError, match="device 'tpu' cannot be used"):
        run_synth(recipe, out, INLINE, quiet=True)
    storage = Storage(out)
    assert not any(storage.list(name) for name in ("", "lease", "teacher", "events", "decoder", "shards"))
    assert not (tmp_path / "run").exists()


def test_a_refused_command_takes_nothing_from_a_run_or_from_the_user(run_folder, tmp_path):
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file() and "lease" not in path.parts}
    with pytest.raises(UsageError, match="shards can only grow"):
        run(run_folder, "shards=1")
    assert before.items() <= {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}.items()
    storage = Storage(tmp_path / "new")
    recipe = small_recipe()
    assert open_or_create(storage, make_plan(recipe, inspect_inputs(recipe.synth)))
    (tmp_path / "new/thesis.tex").write_text("mine")
    withdraw(storage)
    assert [path.name for path in (tmp_path / "new").rglob("*")] == ["thesis.tex"]
    withdraw(Storage(run_folder))
    assert (run_folder / "plan.json").exists()


def test_unusable_teacher_leaves_nothing_behind(tmp_path):
    for settings, part in (
        (["synth.teacher.name=./nowhere"], "nowhere"),
        (["synth.teacher.num_classes=7"], "7"),
        (["synth.teacher.weights=missing.safetensors"], "missing.safetensors"),
    ):
        recipe = resolve("demo", sets=[f"synth.{s}" for s in ("method=noise", "images.size=8")] + settings, environ={})
        with pytest.raises(DataError, match=part):
            run_synth(recipe, str(tmp_path / "run"), INLINE, worker=FACTORY, quiet=True)
        assert not (tmp_path / "run").exists()
