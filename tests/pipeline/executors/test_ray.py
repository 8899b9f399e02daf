"""Real Ray actors: the same dataset with any number of them, and whatever becomes of them."""

import os
import re
import time

import pytest

from manifests.errors import DataError, FactoryError, UsageError
from manifests.storage import Storage
from pipeline.events import EventLog, failures, read_events
from pipeline.executors.driver import execute
from pipeline.executors.pool import WorkerSpec
from pipeline.executors.ray import actor_options
from pipeline.executors.settings import ExecutorSettings
from pipeline.lease import Lease
from pipeline.watch import SynthWatch
from tests.manifests.flaky_proxy import every
from tests.pipeline.executors.conftest import FACTORY

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    from tests.pipeline.executors.conftest import Run

    run = Run(tmp_path_factory.mktemp("unbroken") / "run")
    assert run.execute(12).done == set(range(12))
    return run.files()


@pytest.mark.parametrize("workers", [2, 4])
def test_same_bytes_with_actors_as_in_this_process(run, cluster, unbroken, workers):
    assert run.execute(12, workers=workers, meet=workers).done == set(range(12))
    assert run.files() == unbroken
    assert len({event["pid"] for event in run.events("shard_done")}) == workers


def test_same_bytes_across_resumes_with_one_four_and_two_workers(run, cluster, unbroken):
    for shards, workers in ((4, 1), (8, 4), (12, 2)):
        assert run.execute(shards, workers=workers).done == set(range(shards))
    assert run.files() == unbroken
    assert len(run.events("shard_started")) == 12


def test_one_worker_on_a_cluster_is_an_actor(run, cluster, unbroken):
    run.execute(12, workers=1, address=cluster)
    assert run.files() == unbroken
    assert {event["worker"].split("@")[0] for event in run.events("shard_done")} == {"w0"}


def test_actors_report_within_a_shard(run, cluster):
    seen: list[tuple[float, str]] = []
    spec = WorkerSpec(FACTORY, run.spec({"0": "slow", "1": "slow"}) | {"storage": run.storage.url, "meet": 2})
    watch = SynthWatch(lambda done, total, note: seen.append((done, note)), images=6)
    outcome = execute(spec, range(2), ExecutorSettings(workers=2), EventLog(run.storage), run.storage, watch)
    assert outcome.done == {0, 1}
    assert any(done == 1.0 and "step 10/20" in note and "2 running" in note for done, note in seen)  # half of both


def test_relative_paths_mean_to_actors_what_they_mean_here(run, cluster, monkeypatch):
    monkeypatch.chdir(run.folder.parent)  # the cluster was started elsewhere
    monkeypatch.setattr(run, "marks", run.marks.relative_to(run.folder.parent))
    assert run.execute(2, {"0": "raise-once"}, workers=2).done == {0, 1}
    assert run.marks.joinpath("0").exists()


def test_actors_have_the_plans_threads_no_gpu_and_no_torch_before_they_need_it(run, cluster):
    run.execute(2, workers=2, threads=2)
    for event in run.events("shard_done"):
        assert (event["OMP_NUM_THREADS"], event["CUDA_VISIBLE_DEVICES"], event["torch"]) == ("2", "", False)
        assert event["nice"] == os.nice(0)  # Ray's default would starve them on a busy machine


def test_everything_at_once(run, cluster, unbroken):
    """A worker that dies, one that hangs, one frozen in the kernel, one that dies after its commit, a shard that fails
    once and a poison shard, in one run: complete but for the poison shard, which heals."""
    faults = {"1": "die-once", "2": "hang-once", "3": "stop-once", "4": "late-once", "5": "raise-once", "6": "raise"}
    outcome = run.execute(12, faults, workers=3, time_limit=5.0)
    assert outcome.failed == {6: "ValueError: shard 6 is poison"}
    assert outcome.done == set(range(12)) - {6}
    lost = {event["shard"]: event["error"] for event in run.events("worker_lost")}
    assert lost.keys() >= {1, 2, 3, 4}  # a crowded machine may cost more
    assert "its process ended without a word" in lost[1]
    assert "no result after the time limit of 5 s" in lost[2]
    done = [event for event in run.events("shard_done") if event["shard"] == 4]
    assert [event["rows"] for event in done] == [6]  # its commit counted, though its worker never answered
    assert run.execute(12, workers=2, retry_failed=True).done == set(range(12))
    assert failures(run.storage) == {}
    assert run.files() == unbroken


def test_same_bytes_in_an_object_store(run, cluster, unbroken, s3_url):
    """A real S3 server on loopback, two actors one of which dies, then a second driver over the rest."""
    store = Storage(s3_url)
    environment = {
        name: value for name, value in os.environ.items() if name.startswith(("AWS_", "NO_PROXY", "no_proxy"))
    }
    spec = WorkerSpec(FACTORY, run.spec({"3": "die-once"}) | {"storage": s3_url, "environment": environment})
    for shards in (6, 12):
        with EventLog(store) as events, Lease(store, events.write, beat_every=0.2) as lease:
            assert not lease.after_crash
            place = ExecutorSettings(workers=2, retry_delay=0)
            outcome = execute(spec, range(shards), place, events, store, lease=lease)
            assert outcome.done == set(range(shards))
    assert {name: store.read(name) for folder in ("shards", "done") for name in store.list(folder)} == unbroken
    assert [event["shard"] for event in read_events(store) if event["kind"] == "worker_lost"] == [3]


def test_everything_at_once_on_a_store_that_keeps_failing(run, cluster, unbroken, s3_url, flaky_s3):
    """A worker that dies, one that hangs, one that dies after its commit, a poison shard, and every seventh request to
    the store refused, cut off or its answer lost, in one run: complete but for the poison shard, which heals."""
    flaky_s3.plan = every(7, "busy", "cut", "lost", "short", "drop")
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "NO_PROXY"))}
    faults = {"1": "die-once", "2": "hang-once", "4": "late-once", "6": "raise"}
    spec = WorkerSpec(FACTORY, run.spec(faults) | {"storage": s3_url, "environment": environment})
    store = Storage(s3_url)
    place = ExecutorSettings(workers=3, retry_delay=0, time_limit=15.0)
    with EventLog(store) as events, Lease(store, events.write) as lease:
        outcome = execute(spec, range(12), place, events, store, lease=lease)
    assert outcome.done == set(range(12)) - {6}
    assert outcome.failed == {6: "ValueError: shard 6 is poison"}
    lost = {event["shard"] for event in read_events(store) if event["kind"] == "worker_lost"}
    assert lost >= {1, 2, 4}
    assert {fault for fault, _, _ in flaky_s3.happened} == {"busy", "cut", "lost", "short", "drop"}
    spec = WorkerSpec(FACTORY, run.spec() | {"storage": s3_url, "environment": environment})
    with EventLog(store) as events, Lease(store, events.write) as lease:
        again = execute(spec, range(12), place.model_copy(update={"retry_failed": True}), events, store, lease=lease)
    assert again.done == set(range(12))
    assert {name: store.read(name) for folder in ("shards", "done") for name in store.list(folder)} == unbroken


def test_a_shard_that_kills_its_worker_every_time_is_quarantined(run, cluster):
    outcome = run.execute(4, {"1": "die"}, workers=2)
    assert outcome.failed.keys() == {1}
    assert outcome.done == {0, 2, 3}
    assert len({event["worker"] for event in run.events("worker_lost")}) == 3


def test_a_full_disk_stops_every_worker(run, cluster):
    with pytest.raises(FactoryError, match="No space left on device"):
        run.execute(12, {"1": "full"}, workers=2)
    assert failures(run.storage) == {}


def test_a_lost_gpu_replaces_the_worker(run, cluster):
    assert run.execute(3, {"1": "cuda-once"}, workers=2).done == {0, 1, 2}
    assert [event["shard"] for event in run.events("worker_lost")] == [1]


def test_workers_that_cannot_start_keep_their_error(run, cluster):
    with pytest.raises(DataError, match="^teacher.safetensors: no such file$"):
        run.execute(2, {"build": "data"}, workers=2)
    with pytest.raises(FactoryError, match="^workers cannot start: RuntimeError: cannot even start$"):
        run.execute(2, {"build": "bug"}, workers=2)


def test_missing_resources_are_refused_at_once(run, cluster):
    started = time.monotonic()
    with pytest.raises(UsageError, match="2 workers with 1 CPU, 0.5 GPU each .* the cluster holds 0 such"):
        run.execute(2, workers=2, gpus_per_worker=0.5)
    with pytest.raises(UsageError, match="9 workers .* the cluster holds 4 such"):
        run.execute(2, workers=9)
    with pytest.raises(UsageError, match="1e\\+06 GiB each"):
        run.execute(2, workers=2, memory_per_worker=1e6)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1 .*ray start --head"),
        ("cluster", "--address 'cluster': expected auto or HOST:PORT"),
        ("localhost:²", "--address 'localhost:²': expected auto or HOST:PORT"),
        ("localhost:99999", "--address 'localhost:99999': expected auto or HOST:PORT"),
    ],
)
def test_missing_cluster_is_refused_at_once(run, spawned, address, message):
    code, errors = spawned(run.spawn(1, workers=2, address=address)).end()
    assert code == 2
    assert re.search(message, errors)
    assert len(errors.splitlines()) == 1


def test_a_wait_for_a_busy_cluster_is_said_and_ends(run, cluster, monkeypatch, capsys):
    import ray

    monkeypatch.setattr("pipeline.executors.ray.SAY_SECONDS", 1.0)
    busy = ray.remote(Busy).options(num_cpus=4).remote()
    ray.get(busy.ready.remote())
    try:
        with pytest.raises(FactoryError, match="^no worker is ready after 3 s; free in the cluster: .*memory"):
            run.execute(2, workers=2, start_limit=2.5)
    finally:
        ray.kill(busy)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("waiting: ")]
    assert len(lines) == 2
    assert re.match(
        r"waiting: no worker is ready after 1 s; free in the cluster: .*; this goes on for [12] s more", lines[0]
    )


class Busy:
    def ready(self) -> None:
        pass


def test_fractions_of_gpus_are_shared_out(run, spawned):
    """Ray believes in two GPUs: four workers with half of one each see one each."""
    code, errors = spawned(
        run.spawn(4, meet=4, ray={"num_gpus": 2, "num_cpus": 4}, workers=4, gpus_per_worker=0.5)
    ).end()
    assert code == 0, errors
    seen = {event["worker"]: event["CUDA_VISIBLE_DEVICES"] for event in run.events("shard_done")}
    assert sorted(seen.values()) == ["0", "0", "1", "1"]


NODES = [{"CPU": 8, "GPU": 2, "memory": 16 * 2**30}, {"CPU": 2, "GPU": 4, "memory": 64 * 2**30}, {"CPU": 0}]


@pytest.mark.parametrize(
    ("asked", "fits"),
    [
        ({}, 4),  # a GPU each by default: two on the first node, two CPUs on the second
        ({"gpus_per_worker": 0}, 10),
        ({"gpus_per_worker": 0.5}, 6),
        ({"gpus_per_worker": 0.1}, 10),
        ({"gpus_per_worker": 2}, 3),
        ({"gpus_per_worker": 0, "threads": 4}, 2),
        ({"gpus_per_worker": 0, "memory_per_worker": 8}, 4),
        ({"gpus_per_worker": 8}, 0),
    ],
)
def test_workers_must_fit_the_nodes_not_just_their_sum(asked, fits):
    if fits:
        options = actor_options(ExecutorSettings(workers=fits, **asked), NODES)
        assert options["num_gpus"] == asked.get("gpus_per_worker", 1)
        assert (options["max_restarts"], options["max_task_retries"]) == (0, 0)
    with pytest.raises(UsageError, match=f"the cluster holds {fits} such .* lower --workers or each one's") as caught:
        actor_options(ExecutorSettings(workers=fits + 1, **asked), NODES)
    gpus = asked.get("gpus_per_worker") != 0  # named by what every command has
    assert ("--device cpu" in str(caught.value), "per-worker" in str(caught.value)) == (gpus, False)


def test_no_gpu_is_reserved_where_there_is_none():
    options = actor_options(ExecutorSettings(workers=2, memory_per_worker=1.5), [{"CPU": 2, "memory": 4 * 2**30}])
    assert (options["num_gpus"], options["memory"]) == (0, 1.5 * 2**30)
