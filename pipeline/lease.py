"""One driver per run folder: a lease with a heartbeat, held by ``factory run`` and ``factory gc``.

It needs no more of the store than create-if-absent and replace. ``lease/000007.json`` is the seventh lease of the
folder; the highest number counts. Taking over creates the next number, which only one of several rivals can, and a
holder that was frozen meanwhile overwrites nothing but its own old file. The lease saves work, not data: two drivers
would still commit each shard once.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from manifests.checked_json import load_as, load_tree
from manifests.errors import DataError, FactoryError, GoneError
from manifests.storage import Storage

FOLDER = "lease"
_RECORD = re.compile(r"lease/[0-9]{6}\.json", re.ASCII)
LAST_SECOND = 2**37
"""Seconds since 1970 that every platform can write as a date."""
_held: set[str] = set()  # tokens of this process, to tell its own pid from a reused one


@dataclass(frozen=True)
class Holder:
    """What a lease file says. ``beat`` counts heartbeats; times are seconds since 1970 by the holder's clock."""

    host: str
    pid: Annotated[int, Field(gt=0, lt=2**31)]  # 0 and less are groups of processes
    machine: str
    started: str
    token: str
    since: Annotated[float, Field(ge=0, le=LAST_SECOND)]
    beat_at: Annotated[float, Field(ge=0, le=LAST_SECOND)]
    beat: Annotated[int, Field(ge=0, lt=2**63)] = 0
    released: bool = False

    def dump(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()

    def __str__(self) -> str:
        return f"{self.host}, pid {self.pid}, since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.since))}"


class Lease:
    """Context manager around a driver's work. Entering raises :class:`FactoryError` while another driver lives.

    ``on_event(kind, **fields)`` hears of a take-over (``EventLog.write`` fits). A holder on this machine is dead when
    its process is gone. One on another machine is dead when its record stays the same while two beats would be due, by
    this machine's monotonic clock: what the other one's clock says neither keeps a lease nor ends it.
    """

    def __init__(
        self,
        storage: Storage,
        on_event: Callable[..., None] = lambda kind, **fields: None,
        beat_every: float = 10.0,
        stale_after: float = 60.0,
        on_line: Callable[[str], None] = lambda line: None,
    ):
        self._storage, self._beat_every, self._stale_after = storage, beat_every, stale_after
        self._on_event, self._on_line = on_event, on_line
        self._stop = threading.Event()
        self._lost: str | None = None
        self.on_lost: Callable[[], object] = lambda: None
        """Called from another thread once :meth:`check` would raise."""
        self.after_crash = False
        """True if the previous holder did not release: workers of its may still be ending."""

    def __enter__(self) -> "Lease":
        before, holder = current(self._storage) or (0, None)
        if holder is not None and not holder.released:
            self._wait_until_dead(before, holder)
            self.after_crash = True
        self._number, now, pid = before + 1, time.time(), os.getpid()
        self._me = Holder(socket.gethostname(), pid, _machine(), _started(pid), secrets.token_hex(8), now, now)
        _held.add(self._me.token)  # before another thread of this process can read the file
        with contextlib.ExitStack() as undo:
            undo.callback(_held.discard, self._me.token)
            if not self._storage.create(_name(self._number), self._me.dump()):
                raise self._refusal((current(self._storage) or (0, self._me))[1])
            self._storage.hold()
            undo.pop_all()
        if self.after_crash:
            line = f"taking over {self._storage.url}: its driver ({holder}) stopped without releasing it"
            self._on_event("warning", message=line)
            self._on_line(line)
        for name in _records(self._storage):
            if name < _name(self._number):
                self._storage.delete(name)
        self._thread = threading.Thread(target=self._watch, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        _held.discard(self._me.token)
        if self._lost is None:
            # a store that fails now must not hide why the run ended: the lease just goes stale
            with contextlib.suppress(FactoryError):
                self._storage.write(_name(self._number), replace(self._me, released=True).dump())

    def check(self) -> None:
        """Raises :class:`FactoryError` once another driver has taken over or beats failed for too long."""
        if self._lost is not None:
            raise FactoryError(self._lost)

    def _watch(self) -> None:
        self._beat()
        if self._lost is not None:
            self.on_lost()

    def _beat(self) -> None:
        """Until the lease ends or is lost."""
        written = time.monotonic()
        while not self._stop.wait(self._beat_every):
            try:
                newest = current(self._storage)
                if newest is None or newest[0] != self._number:
                    self._lost = (
                        f"{self._storage.url} was taken over by another driver ({newest[1]})"
                        if newest
                        else f"{self._storage.url} was emptied while this command worked in it"
                    )
                    return
                self._me = replace(self._me, beat=self._me.beat + 1, beat_at=time.time())
                self._storage.write(_name(self._number), self._me.dump())
                written = time.monotonic()
            except GoneError as error:
                self._lost = str(error)
                return
            except Exception as error:  # the store may recover; until then the run goes on
                if time.monotonic() - written > self._stale_after:
                    self._lost = f"no heartbeat reached {self._storage.url} for {self._stale_after:g} s: {error}"
                    return

    def _wait_until_dead(self, number: int, holder: Holder) -> None:
        if holder.machine == _machine():
            if _alive(holder):
                raise self._refusal(holder)
            return
        self._on_line(f"{self._storage.url}: waiting {2 * self._beat_every:g} s for a sign of life of {holder}")
        until = time.monotonic() + 2 * self._beat_every
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, self._beat_every / 4))
            if current(self._storage) != (number, holder):
                raise self._refusal(holder)

    def _refusal(self, holder: Holder) -> FactoryError:
        return FactoryError(f"{self._storage.url} is in use by another driver ({holder}): wait for it or stop it")


def current(storage: Storage) -> tuple[int, Holder] | None:
    """The newest lease of a run folder and its number; ``None`` if there never was one."""
    for attempt in range(3):
        names = _records(storage)
        if not names:
            break
        try:
            data = storage.read(names[-1])
        except DataError:
            if attempt < 2:
                continue  # taken over and dropped since the listing
            raise
        try:
            return int(names[-1].removeprefix(f"{FOLDER}/").removesuffix(".json")), load_as(Holder, load_tree(data))
        except ValueError as error:
            where = storage.path(names[-1])
            raise DataError(f"{where}: no lease record ({error}); delete it if no driver runs") from None
    return None


def live(storage: Storage, stale_after: float = 60.0) -> Holder | None:
    """The driver at work in a run folder as far as one look can tell (``factory status``)."""
    _, holder = current(storage) or (0, None)
    return holder if holder and not holder.released and _seems_alive(holder, stale_after) else None


def _records(storage: Storage) -> list[str]:
    """Names of lease files, in order; nothing else in their folder is read or deleted."""
    return [name for name in storage.list(FOLDER) if _RECORD.fullmatch(name)]


def _name(number: int) -> str:
    return f"{FOLDER}/{number:06d}.json"


def _machine() -> str:
    """Identifies the space in which a pid means something: host, boot and, in containers, process namespace."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        pass  # no Linux: the host's name has to do
    return " ".join(parts)


def _seems_alive(holder: Holder, stale_after: float) -> bool:
    """As far as one look can tell: on this machine by its process, on another one by its last beat, whose clock may be
    ahead as far as behind."""
    return _alive(holder) if holder.machine == _machine() else abs(time.time() - holder.beat_at) <= stale_after


def _alive(holder: Holder) -> bool:
    """Whether the process of a holder on this machine runs. Our own pid without our token is a reused one."""
    if holder.pid == os.getpid():
        return holder.token in _held
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _started(holder.pid) == holder.started


def _started(pid: int) -> str:
    """When process ``pid`` began, in ticks since boot (Linux): differs if the pid was reused. Zombies have ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if fields[0] in "ZX" else fields[19]
