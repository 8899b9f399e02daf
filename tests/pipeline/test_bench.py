"""``factory bench``, and the hours and prices that dry runs take from it."""

import json

import pytest

from manifests.errors import DataError, UsageError
from pipeline import distill
from pipeline.bench import run_bench
from pipeline.executors.settings import ExecutorSettings
from pipeline.rates import Bench, Pace, Time, read_bench, save_bench
from pipeline.synth import dry_run
from stages.settings import ModelSettings
from tests.pipeline.conftest import small_recipe

PACE = Pace(recipe="demo", images_per_second=5, flop_per_image=200, workers=2, images=10, seconds=1, group_size=10)
STUDENT = PACE.model_copy(update={"workers": 1, "group_size": None, "steps_per_second": 2.5, "data_wait": 0.01})


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Bench:
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FACTORY_BENCH", raising=False)
    found = Bench(machine="here", date="2026-01-02", synth=PACE, distill=STUDENT)
    save_bench(found)
    return found


def test_hours_follow_images_work_and_workers():
    assert PACE.hours(3600 * 5, None, 2) == 1  # the rate is that of both workers
    assert PACE.hours(3600 * 5, None, 1) == 2
    assert PACE.hours(3600 * 5, 3600 * 5 * 100, 2) == 0.5  # half the work an image


def test_a_dry_run_says_hours_and_price(kept, tmp_path):
    recipe = small_recipe("shards=90")  # 1,800 images of noise: no counted work
    found = dry_run(recipe, str(tmp_path / "run"), workers=4, price=2.5)
    assert found.time == Time(1800 / 5 * 2 / 4 / 3600, pytest.approx(0.5), 4, "here", True)
    lines = "\n".join(found.lines())
    assert "about 3 min 00 s on here (as benchmarked)" in lines and "0.50, 4 × 0.05 h" in lines
    assert "a rough figure" in "\n".join(dry_run(small_recipe("group_size=20"), str(tmp_path / "run")).lines())


def test_a_dry_run_of_stage_2_says_hours(kept, run_folder):
    recipe = small_recipe().changed("distill.epochs=100", "distill.val_fraction=0")
    teacher = ModelSettings(name="embedded:digits")
    found = distill.dry_run(recipe, [(str(run_folder / "m.parquet"), 1.0)], str(run_folder / "d"), teacher, 1, 10)
    assert found.time.hours == pytest.approx(found.cost.flop / 200 / 5 / 3600)
    assert found.time.price == pytest.approx(10 * found.time.hours)


def test_without_a_benchmark_no_time_is_said_and_a_price_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FACTORY_CACHE", str(tmp_path))
    assert dry_run(small_recipe(), str(tmp_path / "run")).time is None
    with pytest.raises(UsageError, match="run `factory bench`"):
        dry_run(small_recipe(), str(tmp_path / "run"), price=1.0)
    monkeypatch.setenv("FACTORY_BENCH", str(tmp_path / "absent.json"))
    with pytest.raises(DataError, match="absent.json: no such file"):
        read_bench()


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_a_price_that_is_none_is_refused(kept, tmp_path, price):
    with pytest.raises(UsageError, match="--price"):
        dry_run(small_recipe(), str(tmp_path / "run"), price=price)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"machine": 1}', "\x00", '{"machine": "m", "date": "d", "synth": {"recipe": "x"}}']
)
def test_a_file_that_is_no_benchmark_is_named(tmp_path, text):
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(DataError, match="bench.json: not what `factory bench` wrote"):
        read_bench(str(tmp_path / "bench.json"))


@pytest.mark.parametrize(("field", "value"), [("images_per_second", 0), ("images_per_second", float("nan"))])
def test_a_rate_that_cannot_be_is_refused(tmp_path, kept, field, value):
    values = kept.to_dict()
    values["synth"][field] = value
    (tmp_path / "bench.json").write_text(json.dumps(values))
    with pytest.raises(DataError):
        read_bench(str(tmp_path / "bench.json"))


def test_both_stages_are_measured_and_nothing_is_left(tmp_path):
    recipe = small_recipe().changed("distill.students=[digits-cnn-small]", "distill.batch_size=16")
    (tmp_path / "work").mkdir()
    found = run_bench(recipe, ExecutorSettings(), 2, folder=str(tmp_path / "work"))
    assert found.synth.images_per_second > 10 and found.synth.images >= 10 and found.synth.group_size == 10
    assert found.distill.images == pytest.approx(16 * found.distill.steps_per_second * found.distill.seconds, rel=0.2)
    assert 0 <= found.distill.data_wait < 1 and found.distill.flop_per_image > 0
    assert Bench.model_validate(json.loads(json.dumps(found.to_dict()))) == found
    assert len([*found.lines()]) == 3 and not [*(tmp_path / "work").iterdir()]


def test_workers_elsewhere_need_a_folder_that_all_reach():
    with pytest.raises(UsageError, match="--folder"):
        run_bench(small_recipe(), ExecutorSettings(workers=2, address="auto"))
