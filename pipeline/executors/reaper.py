"""Ends what is left of a Ray cluster once its driver has ended, however it ended: ``python reaper.py PID MARK``.

Ray's agents outlive a killed driver for minutes, looking for the rest of their cluster. Every process of a cluster is
known by an entry of its environment, which each inherits from the one that started it: whose child it is now and when
it started do not matter. (Linux; elsewhere nothing is looked for.)
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

GRACE_SECONDS, GIVE_UP_SECONDS, LOOK_SECONDS = 1.0, 60.0, 0.1
VARIABLE = "FACTORY_CLUSTER"


@contextlib.contextmanager
def watched() -> "Iterator[subprocess.Popen[bytes]]":
    """A reaper in a process of its own for what is started in this context; closing its ``stdin``, or the end of this
    process, ends that."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-IS", __file__, str(os.getpid()), mark]
    quiet = subprocess.DEVNULL
    # a session of its own: neither Ctrl-C nor a kill of the driver's whole group reaches it
    reaper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)
    before = {name: os.environ.get(name) for name in (VARIABLE, "SPT_NOENV")}
    # Ray's agents write their title over their environment unless the second is set
    os.environ |= {VARIABLE: mark, "SPT_NOENV": "1"}
    try:
        yield reaper
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def marked(mark: str) -> set[int]:
    """The processes with ``mark`` in the environment that they began with."""
    entry, found = f"{VARIABLE}={mark}".encode(), set()
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdigit():
            # somebody else's, or it ends while it is read
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if entry in file.read().split(b"\0"):
                    found.add(int(name))
    return found


def main(driver: int, mark: str) -> None:
    ends: list[int] = [0]  # a pipe from the driver, which a process that the driver forked may hold open after it
    with contextlib.suppress(AttributeError, OSError):
        ends.append(os.pidfd_open(driver))
    select.select(ends, [], [])
    ended, quiet_looks = time.monotonic(), 0
    # twice: a process may start and its parent end while the others are looked at
    while quiet_looks < 2 and (waited := time.monotonic() - ended) < GIVE_UP_SECONDS:
        left = marked(mark)
        quiet_looks = 0 if left else quiet_looks + 1
        for pid in left if waited > GRACE_SECONDS else ():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
