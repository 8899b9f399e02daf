"""From flags to where stage 1 runs."""

import pytest

from manifests.errors import UsageError
from pipeline.executors.settings import executor
from stages.settings import SynthSettings


def place(device="auto", **flags):
    return executor(**flags).for_synth(SynthSettings(device=device, threads=3))


def test_workers_on_the_cpu_reserve_no_gpu_unless_told_to():
    assert (place(workers=8).gpus_per_worker, place(workers=8).threads) == (None, 3)
    assert place("cpu", workers=8).gpus_per_worker == 0
    assert place("cpu", workers=8, gpus_per_worker=0.5).gpus_per_worker == 0.5


@pytest.mark.parametrize("amount", [1.5, 2.25, 0.00001])
def test_gpus_that_ray_cannot_give_are_refused(amount):
    with pytest.raises(UsageError, match=f"^--gpus-per-worker: .*whole number, got {amount:g}$"):
        place(workers=2, gpus_per_worker=amount)
    assert [place(workers=2, gpus_per_worker=fine).gpus_per_worker for fine in (0, 0.0001, 1, 3)] == [0, 0.0001, 1, 3]


@pytest.mark.parametrize("name", ["gpus_per_worker", "memory_per_worker"])
def test_a_reservation_needs_workers_of_ray(name):
    with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')}: .* add --workers or --address$"):
        place(**{name: 1.0})
    assert getattr(place(**{name: 1.0}, workers=2), name) == getattr(place(**{name: 1.0}, address="auto"), name) == 1
