"""The driver loop over one worker in this process: order, attempts, quarantine, and when a run must stop."""

import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import DataError, FactoryError, Interrupted
from manifests.storage import Storage
from pipeline.events import failures
from pipeline.executors.driver import Outcome, execute
from pipeline.executors.pool import WorkerSpec, failure
from pipeline.executors.settings import ExecutorSettings
from pipeline.watch import SynthWatch

ROOT = Path(__file__).parents[3]


def test_runs_every_shard_once_and_nothing_when_all_are_done(run):
    outcome = run.execute(5)
    assert outcome == Outcome(frozenset(range(5)), {}, frozenset(), False)
    outcome.check()
    before = run.files()
    assert [event["shard"] for event in run.events("shard_done")] == [0, 1, 2, 3, 4]
    assert run.events("shard_done")[0]["rows"] == 6
    assert run.execute(5).done == outcome.done
    assert len(run.events("shard_started")) == 5
    assert run.files() == before


def test_more_shards_only_add(run, make_run):
    run.execute(2)
    first = run.files()
    run.execute(4)
    assert first.items() <= run.files().items()
    whole = make_run()
    whole.execute(4)
    assert run.files() == whole.files()


def test_a_shard_that_always_fails_is_quarantined_and_healed(run, make_run):
    outcome = run.execute(4, {"1": "raise"})
    assert outcome.done == {0, 2, 3}
    assert outcome.failed == {1: "ValueError: shard 1 is poison"}
    with pytest.raises(FactoryError, match=r"1 of 4 shards failed, e.g. 000001: .*--retry-failed") as caught:
        outcome.check()
    assert caught.value.exit_code == 1
    record = json.loads((run.folder / "failed/000001.json").read_text())
    assert (record["attempts"], record["error"]) == (3, "ValueError: shard 1 is poison")
    assert "misbehave" in record["trace"]
    assert len(run.events("shard_failed")) == 3
    assert len(run.events("shard_quarantined")) == 1

    again = run.execute(4)  # the fault is gone, but only a request takes a shard out of quarantine
    assert again.failed == outcome.failed
    assert len(run.events("shard_started")) == 6
    assert run.execute(4, retry_failed=True).done == {0, 1, 2, 3}
    assert failures(run.storage) == {}
    clean = make_run()
    clean.execute(4)
    assert run.files() == clean.files()


def test_a_transient_failure_costs_one_attempt(run):
    assert run.execute(3, {"1": "raise-once"}).done == {0, 1, 2}
    started = [(event["shard"], event["attempt"]) for event in run.events("shard_started")]
    assert started == [(0, 1), (1, 1), (1, 2), (2, 1)]


def test_time_limit_ends_a_hanging_shard(run):
    outcome = run.execute(3, {"1": "hang"}, time_limit=2, attempts=1)
    assert outcome.failed == {1: "no result after the time limit of 2 s"}
    assert outcome.done == {0, 2}
    assert not list((run.folder / "tmp").iterdir())


def test_a_full_disk_stops_the_run_and_blames_no_shard(run):
    with pytest.raises(FactoryError, match="shard 000001: .*No space left on device; .* it resumes"):
        run.execute(4, {"1": "full"})
    assert failures(run.storage) == {}
    assert run.execute(4).done == {0, 1, 2, 3}


def test_overflow_stops_the_run_at_once_and_warnings_become_events(run):
    with pytest.raises(FactoryError, match="shard 000002: 9 of 10 guided updates"):
        run.execute(4, {"1": "warn", "2": "overflow"})
    assert len(run.events("shard_failed")) == 1 and failures(run.storage) == {}
    (warning,) = run.events("warning")
    assert (warning["shard"], warning["message"]) == (1, "shard 000001: 1 of 10 guided updates was left out")
    assert all("warnings" not in event for event in run.events("shard_done"))


def test_a_group_done_in_micro_batches_is_an_event(run):
    """What a worker says of groups that did not fit its memory reaches the log, apart from the shard's own line."""
    assert run.execute(3, {"1": "split"}).done == {0, 1, 2}
    (event,) = run.events("group_split")
    assert (event["shard"], event["group"], event["micro_batch"]) == (1, 2, 2)
    assert not any("splits" in event for event in run.events("shard_done"))


def test_a_store_that_fails_every_attempt_stops_the_run_and_blames_no_shard(run):
    with pytest.raises(FactoryError, match="shard 000001: s3://far/away: cannot write: .* it resumes"):
        run.execute(4, {"1": "store"})
    assert failures(run.storage) == {}
    assert len(run.events("shard_failed")) == 3  # the attempts of any shard: a worker elsewhere may reach the store
    assert run.execute(4).done == {0, 1, 2, 3}
    run.execute(5, {"4": "store-once"})
    assert len(run.events("shard_done")) == 5


def test_shards_that_all_fail_stop_the_run_instead_of_filling_the_quarantine(run):
    with pytest.raises(FactoryError, match="2 shards in a row failed 3 times each"):
        run.execute(50, {str(shard): "raise" for shard in range(50)}, stop_after=2)
    assert failures(run.storage).keys() == {0, 1}


def test_a_lost_gpu_stops_this_process(run):
    with pytest.raises(FactoryError, match="shard 000000: .*CUDA error.*new process"):
        run.execute(2, {"0": "cuda"})


def test_a_gpu_without_memory_for_cublas_is_not_lost():
    line = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    accelerator_error = type("AcceleratorError", (RuntimeError,), {})
    assert not failure(RuntimeError(line)).poisoned and failure(accelerator_error(line)).poisoned
    assert failure(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED")).poisoned


def test_a_worker_that_cannot_start_keeps_its_error(run):
    with pytest.raises(DataError, match="^teacher.safetensors: no such file$"):
        run.execute(1, {"build": "data"})
    with pytest.raises(FactoryError, match="^workers cannot start: RuntimeError: cannot even start$"):
        run.execute(1, {"build": "bug"})


def test_a_lost_lease_stops_the_run(run):
    class Lost:
        def check(self) -> None:
            raise FactoryError("taken over")

    spec = WorkerSpec("tests.pipeline.executors.faulty:build_faulty", run.spec() | {"storage": run.storage.url})
    with pytest.raises(FactoryError, match="taken over"):
        execute(spec, range(3), ExecutorSettings(), Silent(), run.storage, lease=Lost())
    assert run.files() == {}


def test_progress_counts_groups_inside_a_shard(run):
    seen = []
    spec = WorkerSpec("tests.pipeline.executors.faulty:build_faulty", run.spec() | {"storage": run.storage.url})
    watch = SynthWatch(lambda done, total, note: seen.append((done, total)), images=6)
    execute(spec, range(2), ExecutorSettings(), Silent(), run.storage, watch)
    assert seen == [(0, 2), (0, 2), (0.5, 2), (1, 2), (1, 2), (1.5, 2), (2, 2), (2, 2)]


def test_interrupted_outcome_asks_for_exit_code_130():
    with pytest.raises(Interrupted, match="1 of 3 shards done; the same command resumes") as caught:
        Outcome(frozenset({0}), {}, frozenset({1, 2}), True).check()
    assert caught.value.exit_code == 130


def test_neither_driver_nor_noise_worker_imports_torch_or_ray():
    code = (
        "import sys; from tests.pipeline.executors.faulty import SETTINGS; import pipeline.executors.driver; "
        "from stages.synth.noise import NoiseWorker; NoiseWorker(SETTINGS, 'memory://x', 'f'); "
        "print([name for name in ('torch', 'ray') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


class Silent:
    def write(self, kind: str, **fields: object) -> None:
        pass


class Scripted:
    """Fails shard s for its first ``script[s]`` attempts; writes nothing."""

    def __init__(self, script: list[int]) -> None:
        self.script, self.attempts = script, [0] * len(script)

    def run(self, shard: int, on_progress: object = None) -> dict[str, int]:
        self.attempts[shard] += 1
        if self.attempts[shard] <= self.script[shard]:
            raise ValueError("scripted")
        return {"rows": 1}


last: Scripted | None = None


def build_scripted(script: list[int]) -> Scripted:
    global last
    last = Scripted(script)
    return last


@settings(max_examples=60, deadline=None)
@given(script=st.lists(st.integers(0, 4), max_size=12), attempts=st.integers(1, 4))
def test_a_shard_is_done_exactly_if_it_fails_less_often_than_it_may(script, attempts):
    storage = Storage(f"memory://{uuid.uuid4().hex}")
    place = ExecutorSettings(attempts=attempts, retry_delay=0, stop_after=100)
    outcome = execute(
        WorkerSpec(f"{__name__}:build_scripted", {"script": script}), range(len(script)), place, Silent(), storage
    )
    assert outcome.done == {shard for shard, fails in enumerate(script) if fails < attempts}
    assert outcome.failed.keys() == failures(storage).keys() == set(range(len(script))) - outcome.done
    if script:
        assert last is not None
        assert last.attempts == [min(fails + 1, attempts) for fails in script]
