"""Dying on purpose: kill tests and benchmarks set ``FACTORY_FAULT`` to stop a process inside the commit protocol.

``FACTORY_FAULT=STEP:SHARD`` kills this process (SIGKILL, nothing is cleaned up) when ``SHARD`` reaches ``STEP``;
``STEP:SHARD:FILE`` does so once, remembered by ``FILE`` (which then holds the process id); ``STEP:SHARD:FILE:stop``
freezes it there instead (SIGSTOP), so that others can be killed meanwhile; ``@FILE`` reads any of these from a file.
Unset, a step costs one look at the environment.
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
    if wanted and wanted.startswith("@"):
        wanted = Path(wanted[1:]).read_text()
    if not wanted:
        return
    chosen_step, chosen_shard, once, how = [*wanted.split(":", 3), "", "", ""][:4]
    if (chosen_step, chosen_shard) != (step, str(shard)):
        return
    if once:
        if Path(once).exists():
            return
        Path(once).write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)
