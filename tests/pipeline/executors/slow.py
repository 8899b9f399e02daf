"""A rank of stage 2 that takes its time, so that a driver sees the middle of a run however fast the machine is."""

import time
from typing import Any

PAUSE = 0.5


def slow_work(job: dict[str, Any]) -> None:
    """What :func:`pipeline.executors.ray_train.work` does, with a pause before every step."""
    from pipeline.executors.ray_train import work
    from stages.distill.student import Student

    learn = Student.learn

    def slowly(*args: Any) -> None:
        time.sleep(PAUSE)
        learn(*args)

    Student.learn = slowly  # type: ignore[method-assign]  # the process is this training's own
    work(job)
