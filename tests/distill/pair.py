"""Two processes in one gloo group that run the same function together, as two workers of stage 2 do."""

import datetime
import hashlib
import os
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from manifests.errors import FactoryError
from manifests.storage import Storage
from stages.distill import run, student
from stages.distill.runtime import ALONE, Callbacks, Ranks


class Pair:
    """``pair(function, *args)`` calls ``function(ranks, *args)`` in both; what they return or raise, by rank."""

    def __init__(self, folder):
        context = mp.get_context("spawn")
        self._ends, self._processes = [], []
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(folder / "meeting"), there), daemon=True)
            process.start()
            self._ends.append(here)
            self._processes.append(process)

    def __call__(self, function, *args):
        for end in self._ends:
            end.send((function, args))
        answers = [end.recv() if end.poll(120) else ("no answer", None) for end in self._ends]
        failed = [answer for kind, answer in answers if kind != "done"]
        assert not failed, failed
        return [answer for _, answer in answers]

    def close(self):
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank, meeting, end):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", datetime.timedelta(seconds=60), world_size=2, rank=rank)
    ranks = Ranks.joined(torch.device("cpu"))
    while True:
        function, args = end.recv()
        try:
            end.send(("done", function(ranks, *args)))
        except BaseException:
            end.send(("raised", traceback.format_exc()))
            os._exit(1)


def distill(ranks, settings, manifest, out, test_data=None, stop=0, spoil=None):
    """A run of one process among ``ranks``: digests of its students' weights, the rows it learned from at each step,
    and what else became of it. ``stop``: the step at which the first process is asked to stop; ``spoil(student, step)``
    is called in the last process before each step of a student."""
    found: dict = {"rows": [], "events": []}
    learn = student.Student.learn

    def watched(self, x, batch, targets, step, total):
        if self is prepared.students[0]:
            found["rows"].append((step, batch.rows.tolist()))
        if spoil and ranks.rank == ranks.size - 1:
            spoil(self, step)
        learn(self, x, batch, targets, step, total)

    prepared = run.prepare(settings, [(manifest, 1.0)], None, ranks)
    asked = iter(range(1, 10_000))
    student.Student.learn = watched
    try:
        if ranks.first:
            run.begin(prepared, Storage(out), lambda kind, **fields: None, ranks.size)
        callbacks = Callbacks(
            on_event=lambda kind, **fields: found["events"].append(kind),
            should_stop=lambda: ranks.first and next(asked) == stop,
        )
        found["results"] = run.train_students(prepared, Storage(out), test_data, callbacks)
    except FactoryError as error:
        found["error"], found["message"] = type(error).__name__, str(error)
    finally:
        student.Student.learn = learn
    found["weights"] = {each.name: _digest(each.result) for each in prepared.students}
    found["parked"] = {each.name: each.parked for each in prepared.students if each.parked}
    return found


def alone(*args, **kwargs):
    """The same in this process alone."""
    return distill(ALONE, *args, **kwargs)


def _digest(net) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in net.state_dict().values())).hexdigest()
