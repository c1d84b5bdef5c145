"""Framework operators of a live PyTorch process, without its profiler: nothing to stop, nothing to export.

A native callback writes fixed records into a ring in shared memory; names are read from outside. The library
is recognised before anything is armed. The probe takes itself away past its lease, its end or its limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from latencyprism.agent import operator_code as code
from latencyprism.agent.assemble import bootstrap, pack
from latencyprism.agent.operator_build import Build
from latencyprism.agent.operator_ring import RING_BYTES, OperatorRecords, OperatorRing, TscClock, name_of
from latencyprism.agent.record_spool import RecordSpool
from latencyprism.attach.inject import Injector
from latencyprism.attach.memory import read_memory
from latencyprism.attach.shared_folder import owner_of, shared_folder
from latencyprism.errors import TargetRefused

LEASE_S = 3.0
LIMIT_RECORDS = 4_000_000
"""128 MiB of them; two a call: 9 s of 200 steps/s with 1,088 operators each."""
_TID_OFFSET = 0x2D0
"""Of the thread's number behind its thread pointer, in the C library of every x86-64 GNU system."""
_REFUSED = {
    code.STATE_REFUSED: "the target does not let code be mapped",
    code.STATE_BUSY: "another watcher observes its operators",
}


class Addresses:
    """Which of many addresses, a few tens of which come again and again, were not there before: one look at a
    table each, as a watch that must be on time takes ten thousands at once."""

    def __init__(self) -> None:
        self._table = np.zeros(1 << 16, dtype=np.int64)

    def new(self, found: npt.NDArray[np.int64]) -> set[int]:
        """Two that share a place in the table may be given again."""
        places = (found >> 4) & 0xFFFF
        unknown = self._table[places] != found
        if not unknown.any():
            return set()
        self._table[places[unknown]] = found[unknown]
        return set(np.unique(found[unknown]).tolist())

    def forget(self, addresses: set[int]) -> None:
        for address in addresses:
            self._table[address >> 4 & 0xFFFF] = 0


class OperatorProbe:
    """Armed from construction until ``seconds`` have passed, ``close`` or the limit of records; ``drain``
    must be called again within ``lease_s``, or the probe goes. ``spool``: where records are kept, else in
    memory. Not for several threads at once."""

    def __init__(
        self, injector: Injector, build: Build, seconds: float, *, clock: TscClock | None = None,
        limit: int = LIMIT_RECORDS, lease_s: float = LEASE_S, spool: RecordSpool | None = None,
    ) -> None:  # fmt: skip
        self.pid = injector.pid
        self.clock = clock or TscClock()
        self.clock.forget()
        self.records = OperatorRecords(self.pid)
        if spool is not None:
            self.records.chunks = spool
        self._schemas, self._pointers = Addresses(), Addresses()
        self._until_ns = time.monotonic_ns() + int(seconds * 1e9)
        self._lease_ns = int(lease_s * 1e9)
        folder, inside = shared_folder(self.pid)
        name = f"lprism-{secrets.randbits(62):016x}"
        path, text = folder / f"{name}.ring", folder / f"{name}.py"
        owner = owner_of(self.pid) if os.geteuid() == 0 else None
        self.ring = OperatorRing(path, owner, limit)
        try:
            self._renew()
            _write_text(text, f"{inside}/{name}.ring", build, owner)
            self.report = injector.run(bootstrap(f"{inside}/{name}.py"), lambda: self.state != 0, 1.0)
        except BaseException:
            self.ring.close()
            raise
        finally:
            for left in (path, text):
                left.unlink(missing_ok=True)
        self.armed_ns = time.monotonic_ns()
        state = self.state
        if state not in (code.STATE_ARMED, code.STATE_DISARMED):
            self.ring.close()
            why = _REFUSED.get(state, "it did not answer")
            raise TargetRefused(f"operators of process {self.pid} cannot be observed", why)
        self._threads: dict[int, int] = {}

    @property
    def state(self) -> int:
        return self.ring.word(code.STATE)

    def _renew(self) -> None:
        until_ns = min(self._until_ns, time.monotonic_ns() + self._lease_ns)
        self.ring.set(code.DEADLINE_TSC, self.clock.ticks_at(until_ns))

    def drain(self) -> None:
        """Copy what came in, and renew the lease. Call at least five times a second."""
        if not self.ring.open:
            return
        now_ns = time.monotonic_ns()
        for chunk in self.ring.copy(self.records):
            self._learn(chunk)
        self.clock.read()
        if now_ns < self._until_ns:
            if self.state == code.STATE_DISARMED and not self.records.limited:
                self.records.lapsed = True
            self._renew()

    def _learn(self, rows: npt.NDArray[np.int64]) -> None:
        schemas, pointers = self._schemas.new(rows[:, 1]), self._pointers.new(rows[:, 2] & ~1)
        self._learn_names(schemas)
        self._learn_threads(pointers)
        # What could not be read is asked for again.
        self._schemas.forget(schemas - self.records.names.keys())
        self._pointers.forget(pointers - self.records.threads.keys())

    def _learn_names(self, schemas: set[int]) -> None:
        for schema in schemas - self.records.names.keys() - {0}:
            with contextlib.suppress(TargetRefused):
                self.records.names[schema] = name_of(self.pid, schema)

    def _learn_threads(self, pointers: set[int]) -> None:
        for pointer in pointers - self.records.threads.keys():
            if not self._threads:
                self._threads = _threads_of(self.pid)
            with contextlib.suppress(TargetRefused):
                number = int.from_bytes(read_memory(self.pid, pointer + _TID_OFFSET, 4), "little")
                if number in self._threads:
                    self.records.threads[pointer] = self._threads[number]

    def close(self) -> None:
        """Disarm, copy the rest, and give the ring's memory back, in the target too. Harmless twice."""
        if not self.ring.open:
            return
        self._until_ns = 0
        self.ring.set(code.DEADLINE_TSC, 0)
        self.drain()
        self.ring.close()
        self.records.readings = self.clock.readings
        self.records.error_ns = self.clock.error_ns


def _write_text(path: Path, ring: str, build: Build, owner: tuple[int, int] | None) -> None:
    text, places = code.assemble(build.function_offset, build.kind_offset)
    digest = hashlib.blake2b(text, digest_size=6).hexdigest()
    config = {
        "ring": ring, "bytes": RING_BYTES, "add": build.add, "remove": build.remove, "code": text, **places,
        "ring_mark": code.RING_MARK, "remove_mark": code.REMOVE_MARK, "scopes": build.scopes,
        "key": f"_latencyprism_operators_{digest}",
    }  # fmt: skip
    source = files("latencyprism.agent.probe").joinpath("operators.py").read_text(encoding="utf-8")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(pack(f"{source}\ninstall({config!r})\n"))
    if owner is not None:
        os.chown(path, *owner, follow_symlinks=False)


def _threads_of(pid: int) -> dict[int, int]:
    """Threads of a process: their number here by the number that they have in their own namespace."""
    found = {}
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/task/{task}/status").read_text()
                numbers = re.search(r"^NSpid:.*?(\d+)$", status, re.MULTILINE)
                found[int(numbers[1]) if numbers else int(task)] = int(task)
    return found
