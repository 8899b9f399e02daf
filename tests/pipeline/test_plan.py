"""Plans: the fingerprint's reach, create or resume, refusal with a diff."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.checked_json import dump_checked
from manifests.errors import DataError, UsageError
from manifests.storage import Storage
from pipeline.events import Failure, quarantine, quarantined
from pipeline.lease import Lease
from pipeline.plan import Plan, differences, fingerprint, make_plan, open_or_create, read_plan, resume_plan
from pipeline.recipe import resolve
from stages.synth.inputs import inspect_inputs
from tests.pipeline.conftest import small_recipe


def plan_of(*sets: str) -> Plan:
    recipe = small_recipe(*sets)
    return make_plan(recipe, inspect_inputs(recipe.synth))


PLAN = plan_of()


def test_fingerprint_is_canonical():
    assert fingerprint({"b": 1, "a": [1.5, "ü"]}) == fingerprint({"a": [1.5, "ü"], "b": 1})
    assert fingerprint({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # sha256 of "{}"
    with pytest.raises(ValueError):
        fingerprint({"a": float("nan")})


def test_shards_and_device_do_not_enter_but_method_and_seed_do():
    base = plan_of().fingerprint
    assert plan_of("shards=9", "device=cpu").fingerprint == base
    for change in ("seed=1", "group_size=11", "guidance.step_size=0.3", "prompts.styles=[x]"):
        assert plan_of(change).fingerprint != base


def test_pen_strokes_for_another_teacher_are_warned_of(tmp_path, caplog):
    plan_of()
    assert not caplog.records
    copy = shutil.copytree(Path(__file__).parents[2] / "stages/assets/digits-teacher", tmp_path / "mine")
    plan_of(f"teacher.name={copy}", "method=dmkd")
    assert "prior embedded:strokes32 draws pen strokes alone" in caplog.text


def test_created_once_then_reopened(tmp_path):
    storage, plan = Storage(tmp_path / "run"), plan_of()
    open_or_create(storage, plan)
    assert read_plan(storage) == plan
    open_or_create(storage, plan)
    assert resume_plan(storage, plan) == plan == read_plan(storage)


def test_another_plan_is_refused_with_what_differs_and_nothing_is_written(tmp_path):
    storage = Storage(tmp_path / "run")
    open_or_create(storage, plan_of())
    storage.write("done/000000.json", b"{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(DataError) as caught:
        open_or_create(storage, plan_of("guidance.step_size=0.3", "seed=4"))
    lines = str(caught.value).splitlines()
    assert lines[1:] == [
        "  settings.guidance.step_size: 1.0 there, 0.3 here",
        "  settings.seed: 0 there, 4 here",
    ]
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_run_made_with_the_defaults_of_an_older_version_is_refused_by_name_and_grows_with_its_own(tmp_path):
    storage = Storage(tmp_path / "run")
    old = ("method=diffdfkd", "prior.steps=50", "guidance.decoder=full")
    open_or_create(storage, plan_of(*old))
    storage.write("done/000000.json", b"{}")
    with pytest.raises(DataError) as caught:
        open_or_create(storage, plan_of("method=diffdfkd", "prior.steps=20", "guidance.decoder=fitted"))
    told = "\n".join(str(caught.value).splitlines()[1:])
    assert "settings.guidance.decoder: full there, fitted here" in told
    assert "settings.prior.steps: 50 there, 20 here" in told
    assert resume_plan(storage, plan_of(*old, "shards=5")).shards == 5


def test_shards_only_grow(tmp_path):
    storage = Storage(tmp_path / "run")
    open_or_create(storage, plan_of())
    assert resume_plan(storage, plan_of("shards=5")).shards == 5
    assert read_plan(storage).shards == 5
    assert resolve(str(tmp_path / "run/resolved.yaml"), environ={}).synth.shards == 5
    with pytest.raises(UsageError, match="planned for 5 shards, 2 asked for"):
        open_or_create(storage, plan_of())


def test_edited_settings_of_stage_2_are_stored_anew_and_named(tmp_path):
    storage, lines = Storage(tmp_path / "run"), []
    base = resolve("demo", section="synth", sets=["method=noise", "shards=2"], environ={})
    inputs = inspect_inputs(base.synth)

    def plan(shards=2, **distill):
        synth = base.synth.model_copy(update={"shards": shards})
        stage_2 = base.distill.model_copy(update=distill)
        return make_plan(base.model_copy(update={"synth": synth, "distill": stage_2}), inputs)

    open_or_create(storage, plan(epochs=3))
    resume_plan(storage, plan(epochs=3), lines.append)
    before = [storage.read(name) for name in ("plan.json", "resolved.yaml")]
    resume_plan(storage, plan(epochs=3), lines.append)
    assert not lines and before == [storage.read(name) for name in ("plan.json", "resolved.yaml")]
    for shards in (2, 4):  # on a planned run, and on one that grows
        edited = plan(shards, epochs=3 + shards, where="kept")
        assert resume_plan(storage, edited, lines.append) == edited == read_plan(storage)
        resolved = resolve(str(tmp_path / "run/resolved.yaml"), environ={})
        assert (resolved.distill.epochs, resolved.distill.where, resolved.synth.shards) == (3 + shards, "kept", shards)
    head = f"stage 2's settings stored in {storage.url} are replaced: "
    assert lines == [
        f"{head}distill.epochs: 3 there, 5 here; distill.where: None there, kept here",
        f"{head}distill.epochs: 5 there, 7 here",
    ]
    with pytest.raises(UsageError, match="shards can only grow"):
        resume_plan(storage, plan(1, epochs=9))
    assert read_plan(storage).recipe["distill"]["epochs"] == 7


def test_a_plan_of_which_nothing_was_made_may_be_replaced_unless_a_driver_is_at_it(tmp_path):
    storage = Storage(tmp_path / "run")
    open_or_create(storage, plan_of())
    quarantine(storage, Failure(0, 3, "the prior was damaged"))
    with Lease(storage), pytest.raises(DataError, match="another plan"):
        open_or_create(storage, plan_of("seed=4"))
    open_or_create(storage, plan_of("seed=4", "shards=1"))
    assert resume_plan(storage, plan_of("seed=4", "shards=1")).shards == 1
    assert not quarantined(storage)
    storage.write("shards/000000-0123456789ab.tar", b"of an attempt that was killed")
    with pytest.raises(DataError, match="another plan.*factory gc"):
        resume_plan(storage, plan_of("seed=5"))
    assert storage.list("shards")
    storage.write("done/000000.json", b"{}")
    with pytest.raises(DataError, match="another plan"):
        resume_plan(storage, plan_of("seed=5"))


def test_a_run_killed_while_it_wrote_its_plan_is_not_in_its_own_way(tmp_path):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / ("write-" + 16 * "01")).write_bytes(b"{")
    open_or_create(Storage(tmp_path), plan_of())
    other = tmp_path / "other"
    (other / "tmp").mkdir(parents=True)
    (other / "tmp/thesis.tex").write_text("x")
    with pytest.raises(DataError, match=r"not empty \(it holds tmp\)"):
        open_or_create(Storage(other), plan_of())


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match=r"not empty \(it holds thesis.tex\)"):
        open_or_create(Storage(tmp_path), plan_of())
    with pytest.raises(UsageError, match="is a file"):
        open_or_create(Storage(tmp_path / "thesis.tex"), plan_of())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_plan_is_named(tmp_path):
    (tmp_path / "plan.json").write_text('{"shards": 2')
    with pytest.raises(DataError, match="plan.json is not a plan"):
        read_plan(Storage(tmp_path))
    (tmp_path / "plan.json").write_text(json.dumps({"shards": 2}))
    with pytest.raises(DataError, match="plan.json is not a plan"):
        read_plan(Storage(tmp_path))


@given(data=st.data())
def test_a_flipped_byte_is_noticed_or_harmless(data):
    whole = PLAN.to_json()
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255))
    try:
        found = Plan.from_json(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :], "x")
    except DataError:
        return
    assert found == PLAN  # white space


@pytest.mark.parametrize(
    "change",
    [
        {"shards": "4"},
        {"shards": 0},
        {"shards": 10**18},
        {"fingerprint": "../x"},
        {"recipe": []},
        {"semantics": None},
        {"evil": 1},
    ],
)
def test_a_plan_that_was_never_ours_is_refused(change):
    with pytest.raises(DataError, match="x is not a plan of this program"):
        Plan.from_json(dump_checked(asdict(PLAN) | change), "x")


def test_differences_are_flat_sorted_and_short():
    there = {"a": {"b": 1, "c": {}}, "gone": "x" * 100, "same": [1]}
    here = {"a": {"b": 2, "c": {"d": 1}}, "same": [1]}
    assert differences(there, here) == [
        "a.b: 1 there, 2 here",
        "a.c: {} there, absent here",
        "a.c.d: absent there, 1 here",
        f"gone: {'x' * 24}…{'x' * 24} there, absent here",
    ]
