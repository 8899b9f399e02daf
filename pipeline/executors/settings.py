"""Where and how the stages run: nothing that enters a fingerprint, or that a resumed run must share."""

from typing import Any

from pydantic import Field, field_validator

from manifests.errors import UsageError
from pipeline.layers import flag_layer, validate
from stages.settings import MAX_THREADS, Settings, SynthSettings

MAX_WORKERS, MAX_GPUS, MAX_MEMORY, MAX_SECONDS = 100_000, 1024, 2**20, 10**8

MIN_GPU = 0.0001
"""The smallest share of a GPU that Ray can reserve."""


class ExecutorSettings(Settings):
    """Flags of ``factory run`` that choose workers. One worker without an address runs in this process."""

    workers: int = Field(1, gt=0, le=MAX_WORKERS, description="1 runs in this process, more run as Ray actors")
    address: str | None = Field(None, description="Ray cluster to join: auto or HOST:PORT; default: start one here")
    gpus_per_worker: float | None = Field(
        None,
        ge=0,
        le=MAX_GPUS,
        description="GPUs each worker reserves, fractions allowed; default: 1 where the cluster has any",
    )
    memory_per_worker: float | None = Field(
        None, gt=0, le=MAX_MEMORY, description="memory each worker reserves, in GiB"
    )
    threads: int = Field(
        1, gt=0, le=MAX_THREADS, description="CPU threads of a worker; belongs to the plan, passed on from there"
    )
    attempts: int = Field(3, gt=0, le=1000, description="attempts before a shard is put into quarantine")
    time_limit: float | None = Field(
        None, gt=0, le=MAX_SECONDS, description="seconds a shard may take before its worker is killed"
    )
    start_limit: float = Field(
        600.0, gt=0, le=MAX_SECONDS, description="seconds until at least one worker must be ready"
    )
    retry_delay: float = Field(1.0, ge=0, le=MAX_SECONDS, description="seconds before a failed shard's next attempt")
    retry_failed: bool = Field(False, description="take shards out of quarantine and try them again")
    stop_after: int = Field(20, gt=0, le=2**24, description="stop when this many shards in a row ended in quarantine")

    @field_validator("gpus_per_worker")
    @classmethod
    def _an_amount_that_ray_can_give(cls, value: float | None) -> float | None:
        if value and (value < MIN_GPU or (value > 1 and value != int(value))):
            raise ValueError(f"expected 0, a fraction from {MIN_GPU:g} on or a whole number, got {value:g}")
        return value

    @property
    def inline(self) -> bool:
        """True if no Ray is needed."""
        return self.workers == 1 and self.address is None

    def for_synth(self, synth: SynthSettings) -> "ExecutorSettings":
        """With what the plan decides: threads of a worker, and no GPU for one that computes on the CPU."""
        gpus = 0.0 if synth.device == "cpu" and self.gpus_per_worker is None else self.gpus_per_worker
        return self.model_copy(update={"threads": synth.threads, "gpus_per_worker": gpus})


def executor(**given: Any) -> ExecutorSettings:
    """Settings by their names, those that are None left at their defaults.

    Raises UsageError that names the flag for a value that cannot be, and for a reservation where nothing is reserved.
    """
    flags = {name: f"--{name.replace('_', '-')}" for name in given}
    chosen = validate(ExecutorSettings, flag_layer({name: (flags[name], value) for name, value in given.items()}))
    for name in ("gpus_per_worker", "memory_per_worker"):
        if chosen.inline and getattr(chosen, name) is not None:
            raise UsageError(f"{flags[name]}: one worker in this process reserves nothing; add --workers or --address")
    return chosen
