"""Ends what is left of a Ray cluster once its driver has ended, however it ended: ``python reaper.py PID …``.

Standard input is a pipe from the driver, which closes with it. The arguments are the processes that Ray started for it.
Without this, Ray's agents outlive a killed driver for minutes, looking for the rest of their cluster.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

LOOK_SECONDS, GRACE_SECONDS, GIVE_UP_SECONDS = 1.0, 1.0, 60.0


def processes() -> dict[int, tuple[int, str]]:
    """Each process that has not ended, with its parent and when it began (Linux; empty elsewhere)."""
    found = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError):  # it may end while it is read
                with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                    fields = file.read().rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    found[int(name)] = int(fields[1]), fields[19]
    return found


def children() -> set[int]:
    """The processes that this one has started."""
    return {pid for pid, (parent, _) in processes().items() if parent == os.getpid()}


def start(roots: set[int]) -> "subprocess.Popen[bytes]":
    """Watch over ``roots`` and what they start, from a process of its own; closing its ``stdin`` ends them."""
    command = [sys.executable, "-IS", __file__, *map(str, roots)]
    quiet = subprocess.DEVNULL
    # a session of its own: neither Ctrl-C nor a kill of the driver's whole group reaches it
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)


class _Family:
    """Processes and their descendants, told from later ones with the same pid by when they began."""

    def __init__(self, roots: set[int]) -> None:
        self.began = {pid: began for pid, (_, began) in processes().items() if pid in roots}

    def look(self) -> set[int]:
        """Who of them runs; an orphan stays one of them."""
        now = processes()
        self.began = {pid: began for pid, began in self.began.items() if pid in now and now[pid][1] == began}
        while new := {p: began for p, (parent, began) in now.items() if parent in self.began and p not in self.began}:
            self.began |= new
        return set(self.began)


def main(roots: set[int]) -> None:
    family = _Family(roots)
    while not select.select([0], [], [], LOOK_SECONDS)[0]:
        family.look()
    closed = time.monotonic()
    while (left := family.look()) and (waited := time.monotonic() - closed) < GIVE_UP_SECONDS:
        for pid in left if waited > GRACE_SECONDS else ():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


if __name__ == "__main__":
    main({int(pid) for pid in sys.argv[1:]})
