"""Stage 2 through Ray Train, with real workers: lost and replaced, stopped, resumed; and what is refused before."""

import os
import signal

import pytest

from manifests.errors import DataError, FactoryError, Interrupted, UsageError
from manifests.storage import Storage
from pipeline.distill import run_distill
from pipeline.events import read_events
from pipeline.executors.settings import ExecutorSettings
from pipeline.layers import mapping_layer
from pipeline.recipe import resolve
from stages.distill.run import begin, prepare
from tests.distill.drawn import write_dataset
from tests.distill.pair import Pair, distill
from tests.distill.short import settings
from tests.pipeline.executors.slow import slow_work

pytestmark = pytest.mark.timeout(600)
TWO = ExecutorSettings(workers=2, gpus_per_worker=0.0)


def test_a_lost_worker_is_replaced_and_a_stopped_run_resumed_to_the_same_bits(cluster, tmp_path, monkeypatch):
    from pipeline.executors import ray_train

    monkeypatch.setattr(ray_train, "work", slow_work)  # a whole run would take a minute: it cannot end before the stop
    manifest, out = write_dataset(tmp_path / "d"), str(tmp_path / "out")
    asked = settings(epochs=20, checkpoint_seconds=0.2)
    begin(prepare(asked, [(manifest, 1.0)], None), Storage(out), lambda kind, **fields: None, 2)
    job = {"settings": asked.model_dump(mode="json"), "sources": [(manifest, 1.0)], "teacher": None, "out": out}
    workers, events = {}, []

    def on_event(kind, **fields):
        events.append(kind)
        if kind == "worker_started":
            workers[fields["rank"]] = int(fields["worker"].rpartition(":")[2])
        if kind == "epoch_done" and "worker_lost" not in events and "killed" not in events:
            events.append("killed")
            os.kill(workers[1], signal.SIGKILL)

    with pytest.raises(Interrupted, match="interrupted in epoch .* of 20; the same command resumes"):
        ray_train.train_on_ray(
            job | {"test_data": None}, TWO, on_event, lambda *_: None, lambda: "run_resumed" in events
        )  # asked to stop once a lost worker was replaced
    assert events.count("worker_started") == 4
    assert events.count("worker_lost") == 1
    pair = Pair(tmp_path)
    try:
        resumed = pair(distill, asked, manifest, out)
        whole = pair(distill, asked, manifest, str(tmp_path / "whole"))
    finally:
        pair.close()
    assert 0 < len(resumed[0]["rows"]) < len(whole[0]["rows"])
    assert resumed[0]["weights"] == resumed[1]["weights"] == whole[0]["weights"]


@pytest.fixture
def recipe():
    return lambda **changes: resolve(
        None, section="distill", base=mapping_layer({"name": "r", "distill": settings(**changes).model_dump()}, "test")
    )


def test_what_does_not_fit_is_said_before_any_worker_starts(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.executors.ray.connect", lambda place: pytest.fail("Ray was started"))
    manifest, out = write_dataset(tmp_path / "d"), str(tmp_path / "out")
    sources = [(manifest, 1.0)]
    with pytest.raises(UsageError, match=r"batches of \d images .* cannot be shared by 5 workers"):
        run_distill(recipe(), sources, out, place=ExecutorSettings(workers=5), quiet=True)
    with pytest.raises(UsageError, match="device 'cuda:1': workers get a device each; use auto, cpu or cuda"):
        run_distill(recipe(device="cuda:1"), sources, out, place=TWO, quiet=True)
    with pytest.raises(DataError, match="no such teacher|does not exist|no model"):
        run_distill(recipe(), sources, out, teacher=str(tmp_path / "nowhere"), place=TWO, quiet=True)
    assert not os.path.exists(out + "/run.json")
    run_distill(recipe(epochs=1), sources, out, quiet=True)
    with pytest.raises(DataError, match=r"holds another run: settings\.epochs: 1 -> 3"):
        run_distill(recipe(), sources, out, place=TWO, quiet=True)


def test_workers_that_do_not_fit_the_cluster_are_refused(cluster, recipe, tmp_path):
    manifest = write_dataset(tmp_path / "d")
    many = ExecutorSettings(workers=9)
    with pytest.raises(UsageError, match="9 workers with 1 CPU each .* the cluster holds 4 such"):
        run_distill(recipe(batch_size=24), [(manifest, 1.0)], str(tmp_path / "out"), place=many, quiet=True)
    with pytest.raises(UsageError, match="1 CPU, 1 GPU each"):
        run_distill(recipe(device="cuda"), [(manifest, 1.0)], str(tmp_path / "gpu"), place=TWO, quiet=True)


def test_relative_paths_mean_to_workers_what_they_mean_here(cluster, recipe, tmp_path, monkeypatch):
    write_dataset(tmp_path / "d")
    monkeypatch.chdir(tmp_path)  # the cluster was started elsewhere
    found = run_distill(
        recipe(epochs=1), [("d/m.parquet", 1.0)], "out", teacher="d/teacher", test_data="d", place=TWO, quiet=True
    )
    assert found.workers == 2 and found.students["digits-cnn-small"].test.teacher_accuracy > 0
    assert (tmp_path / "out/digits-cnn-small/model.safetensors").exists()


def test_an_image_altered_meanwhile_ends_the_run_with_its_name(cluster, recipe, tmp_path):
    """Only the workers read images: what they raise reaches the driver, and is not tried again."""
    manifest, out = write_dataset(tmp_path / "d", shards=1), str(tmp_path / "out")
    (tar,) = (tmp_path / "d" / "shards").glob("*.tar")
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DataError, match="sample '000000-000000' was altered"):
        run_distill(recipe(device="cpu"), [(manifest, 1.0)], out, place=TWO, quiet=True)
    assert not [event for event in read_events(Storage(out)) if event["kind"] == "worker_lost"]


class Near:
    """A mailbox in this process, called as an actor is."""

    def __init__(self, mailbox):
        self._desk = mailbox

    def __getattr__(self, name):
        method = getattr(self._desk, name)
        return type("Method", (), {"remote": staticmethod(method)})


class Fit:
    """A training that goes on for a few looks, or that ended with an error."""

    def __init__(self, error=""):
        self.error, self.looks = error, 0 if error else 3

    def is_alive(self):
        self.looks -= 1
        return self.looks >= 0

    def join(self, seconds):
        pass


def test_the_driver_gives_up_where_workers_never_start_or_are_lost_too_often(monkeypatch):
    from pipeline.executors import ray_train

    monkeypatch.setattr(ray_train.ray, "get", lambda answer: answer)
    monkeypatch.setattr(ray_train.ray, "available_resources", lambda: {"CPU": 1.0})
    progress = []

    def follow(fit, mailbox, place=TWO, stop=False):
        on_progress = lambda *reached: progress.append(reached)  # noqa: E731
        return ray_train._follow(fit, Near(mailbox), place, lambda kind, **fields: None, on_progress, lambda: stop)

    with pytest.raises(FactoryError, match=r"lost 3 times \(worker 1: killed\); the same command resumes"):
        follow(Fit("worker 1: killed"), ray_train.Mailbox())
    with pytest.raises(FactoryError, match="not all of the 2 workers are ready after 0 s; free in the cluster: CPU 1"):
        follow(Fit(), ray_train.Mailbox(), TWO.model_copy(update={"start_limit": 0.0}))
    with pytest.raises(Interrupted, match="interrupted before the workers started"):
        follow(Fit(), ray_train.Mailbox(), stop=True)
    for limit, stop, message in (
        (0.0, False, "not all of the 2 workers are ready"),
        (600.0, True, "before the workers"),
    ):
        mailbox = ray_train.Mailbox()  # they had started, and one was lost with its node: nothing may come after that
        mailbox.post("worker_started", {})
        mailbox.lost("worker 1: its node is gone")
        with pytest.raises(FactoryError, match=message):
            follow(Fit(), mailbox, TWO.model_copy(update={"start_limit": limit}), stop)
    mailbox = ray_train.Mailbox()
    mailbox.reach((3, 4, "epoch 1/1"))
    mailbox.end({"error": "no student is left: a: loss is nan", "exit_code": 1})
    mailbox.end({"results": {}})  # too late
    mailbox.lost("worker 0: no student is left")  # its own doing
    assert mailbox.messages == []
    with pytest.raises(FactoryError, match="no student is left: a: loss is nan"):
        follow(Fit(), mailbox)
    assert progress == [(3, 4, "epoch 1/1")]

    def gone(answer):
        raise ray_train.ray.exceptions.RayActorError

    monkeypatch.setattr(ray_train.ray, "get", gone)
    with pytest.raises(FactoryError, match="lost touch with the workers: .*; the same command resumes"):
        follow(Fit(), ray_train.Mailbox())


def test_the_failure_that_came_first_is_told():
    from pipeline.executors.ray_train import _first

    cut = RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.1]:4")
    assert _first({0: cut, 1: ValueError("no such file")}) == "worker 1: no such file"
    assert _first({2: cut}).startswith("worker 2 lost its connection to another one (killed")
