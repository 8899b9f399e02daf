"""Who hears of a run of stage 2 while it goes on, and may ask it to stop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class OnEvent(Protocol):
    """Receives events as the pipeline's log does."""

    def __call__(self, kind: str, **fields: Any) -> object: ...


OnProgress = Callable[[float, float, str], object]  # (done, total, short note)


@dataclass(frozen=True)
class Watcher:
    """What a run calls; one that nobody watches calls nothing and runs to its end."""

    on_event: OnEvent = lambda kind, **fields: None
    on_progress: OnProgress = lambda done, total, note: None
    should_stop: Callable[[], bool] = lambda: False
