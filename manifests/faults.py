"""Dying on purpose: kill tests and benchmarks set ``FACTORY_FAULT`` to stop a process inside the commit protocol.

``FACTORY_FAULT=STEP:SHARD`` kills this process (SIGKILL, nothing is cleaned up) when ``SHARD`` reaches ``STEP``;
``STEP:SHARD:FILE`` does so once, remembered by ``FILE``. Unset, a step costs one look at the environment.
"""

import os
import signal
from pathlib import Path

STEPS = (
    "opened",  # temporary tar exists, no sample yet
    "sample",  # first sample written
    "written",  # temporary tar and table closed
    "checked",  # both reopened, counted and hashed
    "tar",  # tar published
    "table",  # table published
    "done",  # done record written
)


def fault(step: str, shard: int) -> None:
    """Die here if the environment asks for it."""
    wanted = os.environ.get("FACTORY_FAULT")
    if not wanted:
        return
    chosen_step, chosen_shard, once = [*wanted.split(":", 2), "", ""][:3]
    if (chosen_step, chosen_shard) != (step, str(shard)):
        return
    if once:
        if Path(once).exists():
            return
        Path(once).touch()
    os.kill(os.getpid(), signal.SIGKILL)
