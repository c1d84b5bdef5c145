"""One attachment to one Python process: files, injection, acknowledgement, lease, detach.

The files (probe text, ring, wake pipe) live in the target's own shared-memory folder, readable by it and us
alone, for as long as it takes to be acknowledged; after that only mappings and descriptors remain, and the
kernel frees them with the processes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latencyprism.agent.assemble import assemble, bootstrap, pack
from latencyprism.attach.inject import Injector, InjectReport
from latencyprism.attach.shared_folder import owner_of, shared_folder, sweep
from latencyprism.errors import TargetRefused
from latencyprism.records import ring
from latencyprism.records.step import NULL

LEASE_S = 3.0
FIRST_LEASE_S = 15.0
"""Until the watch has begun: beside engines that spin, attaching to the other processes can take seconds."""
RING_SLOTS = 2048  # 768 kB for each thread that writes: 20 s of 100 steps/s
RINGS = 8
NOTICES_LIMIT = 100
BUDGET_PPM = 3_000
"""What a probe may cost, of the step time: 0.3 %. Below 40 us a step it is never too much."""


@dataclass(frozen=True)
class ProbePlan:
    """What to install: ``reader`` names a file of ``agent.probe``; ``hooks`` map its hook names to
    (module, class, method); ``deep`` are the (module, class, method) that become spans in a deep dive."""

    reader: str
    role: str
    rank: int
    hooks: dict[str, tuple[str, str, str]]
    deep: tuple[tuple[str, str, str], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    """What else this reader is told, plain literals: see the reader."""


class ProbeSession:
    """Attached from construction to ``close``. ``ring`` is where its records come from."""

    def __init__(
        self,
        pid: int,
        plan: ProbePlan,
        *,
        slots: int = RING_SLOTS,
        timeout_s: float = 3.0,
        budget_ppm: int = BUDGET_PPM,
    ) -> None:
        self.pid = pid
        self.plan = plan
        self.budget_ppm = budget_ppm
        self.nonce = secrets.randbits(62)
        self._injector = Injector(pid)
        self._files: list[Path] = []
        self._wake_fd = -1
        self._told: set[str] = set()
        self.last_message = ""
        """What the probe had said by the time it was detached."""
        folder, inside = shared_folder(pid)
        sweep(folder)
        name = f"lprism-{self.nonce:016x}"
        try:
            with _room_in(inside):
                self._prepare(folder / name, f"{inside}/{name}", slots)
            self.report = self._inject(folder / name, f"{inside}/{name}", timeout_s)
        except BaseException:
            self._abandon()
            raise
        finally:
            self._unlink()

    def _prepare(self, base: Path, inside: str, slots: int) -> None:
        ring_path, fifo = base.with_suffix(".ring"), base.with_suffix(".wake")
        uid, gid = owner_of(self.pid)
        self._files.append(ring_path)
        checked = platform.machine() != "x86_64"
        ring.create_ring(str(ring_path), slots, self.nonce, rings=RINGS, checked=checked)
        self._files.append(fifo)
        os.mkfifo(fifo, 0o600)
        text = assemble(
            self.plan.reader,
            {
                "ring": inside + ".ring",
                "fifo": inside + ".wake",
                "nonce": self.nonce,
                "role": self.plan.role,
                "rank": self.plan.rank,
                "hooks": dict(self.plan.hooks),
                "deep": list(self.plan.deep),
                **self.plan.options,
            },
        )
        source = base.with_suffix(".py")
        self._files.append(source)
        fd = os.open(source, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(pack(text))
        if os.geteuid() == 0:
            for path in self._files:
                os.chown(path, uid, gid, follow_symlinks=False)
        self._wake_fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        self.ring = ring.RingReader(str(ring_path))
        self.ring.set_header(ring.H_BUDGET_PPM, self.budget_ppm)
        self.ring.set_header(ring.H_SHARE_PPM, NULL)
        self.renew(FIRST_LEASE_S)

    def _inject(self, base: Path, inside: str, timeout_s: float) -> InjectReport:
        report = self._injector.run(
            bootstrap(inside + ".py"),
            lambda: self.ring.header(ring.H_STATE) != ring.STATE_EMPTY,
            timeout_s=timeout_s,
        )
        state = self.ring.header(ring.H_STATE)
        if state != ring.STATE_LIVE:
            why = self.ring.message() or "the probe did not start"
            remedy = "stop the other watcher first" if "already" in why else "see `latencyprism check -p PID`"
            raise TargetRefused(f"cannot watch process {self.pid}", why, remedy)
        return report

    def renew(self, seconds: float = LEASE_S) -> None:
        """Keep the probe alive for another ``seconds``."""
        self.ring.set_header(ring.H_LEASE_NS, time.monotonic_ns() + int(seconds * 1e9))

    def fileno(self) -> int:
        return self._wake_fd

    def drain_wakes(self) -> None:
        try:
            while len(os.read(self._wake_fd, 4096)) == 4096:
                pass
        except BlockingIOError:
            return

    def ask_to_be_woken(self, only_if_long: bool = False) -> bool:
        """True if there is nothing to read and the probe will wake us at its next record; ``only_if_long``:
        at its next step beyond what ``call_long`` said last."""
        self.ring.set_header(ring.H_WAITING, ring.WAKE_LONG if only_if_long else ring.WAKE_EACH)
        return self.ring.pending() == 0

    def call_long(self, base_ns: int, decode_ns: int, prefill_ns: int, gap_ns: int) -> None:
        """From which duration on a step is long: so much, and so much more for each decode and each prefill
        token; or that began so long after the one before."""
        header = self.ring.set_header
        header(ring.H_WAKE_BASE_NS, base_ns)
        header(ring.H_WAKE_DECODE_NS, decode_ns)
        header(ring.H_WAKE_PREFILL_NS, prefill_ns)
        header(ring.H_WAKE_GAP_NS, gap_ns)

    def call_late(self, typical_1024: int, spare_ns: int) -> None:
        """From now on steps that are late by ``spare_ns`` together are a reason to be woken; 0: are not."""
        header = self.ring.set_header
        header(ring.H_WAKE_TYPICAL, typical_1024)
        header(ring.H_WAKE_SPARE_NS, spare_ns)
        header(ring.H_WAKE_LATE_NS, 0)

    def read(self) -> Iterator[ring.RingRecord]:
        return self.ring.read()

    @property
    def live(self) -> bool:
        return self.ring.header(ring.H_STATE) == ring.STATE_LIVE

    @property
    def expired(self) -> bool:
        return self.ring.header(ring.H_STATE) == ring.STATE_EXPIRED

    @property
    def over_budget(self) -> bool:
        return self.ring.header(ring.H_STATE) == ring.STATE_OVER_BUDGET

    def arm_deep(self, seconds: float) -> None:
        """Ask for spans of the plan's deep functions; they disarm themselves."""
        self.ring.set_header(ring.H_DEEP_UNTIL_NS, time.monotonic_ns() + int(seconds * 1e9))

    def health(self) -> dict[str, Any]:
        """Counters the probe keeps about itself; times in ns."""
        header = self.ring.header
        steps, share = header(ring.H_COST_STEPS), header(ring.H_SHARE_PPM)
        return {
            "records": self.ring.records(),
            "lost": self.ring.lost,
            "unringed": header(ring.H_UNRINGED),
            "nested": header(ring.H_NESTED),
            "errors": header(ring.H_ERRORS),
            "dropped": header(ring.H_DROPPED),
            "late": header(ring.H_LATE),
            "cost_ns_per_step": header(ring.H_COST_NS) / steps if steps else None,
            "critical_ns_per_step": header(ring.H_CRITICAL_NS) / steps if steps else None,
            "budget_share": None if share == NULL else share / 1e6,
            "readings_off": self.ring.readings_off(),
            "message": self.ring.message(),
        }

    def notices(self) -> list[str]:
        """What the probe has said since the last call: what it could not hook, read, or no longer reads."""
        if len(self._told) > NOTICES_LIMIT:
            return []  # a target that writes the ring itself
        new = [text for text in self.ring.message().split("; ") if text and text not in self._told]
        self._told.update(new)
        return new

    def close(self, timeout_s: float = 2.0) -> bool:
        """Detach: the probe removes itself at its next call, or, if none comes, by a second injection.

        True if the probe is known to be gone (removed, or its process ended). Harmless twice."""
        if self._wake_fd < 0:
            return True
        gone = not self._alive()
        if not gone and self.live:
            self.ring.set_header(ring.H_COMMAND, ring.COMMAND_DETACH)
            deadline = time.monotonic() + 0.25
            while self.live and time.monotonic() < deadline:
                time.sleep(0.005)
            if self.live:
                self._remove_by_injection(timeout_s)
        gone = not self._alive() or not self.live
        self.ring.set_header(ring.H_LEASE_NS, 0)
        self.last_message = self.ring.message()
        self._abandon()
        return gone

    def _remove_by_injection(self, timeout_s: float) -> None:
        try:
            self._injector.run(removal(self.nonce), lambda: not self.live, timeout_s=timeout_s)
        except TargetRefused:
            return  # busy in native code, or gone: the lease ends it at its next call

    def _alive(self) -> bool:
        return self._injector.identity.alive()

    def _abandon(self) -> None:
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
            self._wake_fd = -1
        if hasattr(self, "ring"):
            self.ring.close()

    def _unlink(self) -> None:
        for path in self._files:
            path.unlink(missing_ok=True)
        self._files = []


@contextlib.contextmanager
def _room_in(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TargetRefused(
            "cannot put out the probe's files",
            f"there is no room in the target's {folder}",
            "free a megabyte there",
        ) from None


def removal(nonce: int | None, acknowledge: str = "") -> str:
    """Text that removes a probe: the one with this nonce, or any (None). ``acknowledge``: a file, as the
    target sees it, into which a byte is written when that is done."""
    guard = "p" if nonce is None else f"p and p.nonce=={nonce}"
    tell = f"\\nopen('{acknowledge}','w').write('1')" if acknowledge else ""
    return (
        "try:\n exec(\"import sys\\np=sys.modules.get('_latencyprism_probe')\\n"
        f'if {guard}:p.remove({ring.STATE_DETACHED}){tell}",{{}})\nexcept BaseException:pass\n'
    )


def remove_probe(pid: int, timeout_s: float = 2.0) -> bool:
    """Remove whatever probe is in a process. False if it did not answer (its lease then ends the probe)."""
    folder, inside = shared_folder(pid)
    name = f"lprism-{secrets.randbits(62):016x}.ack"
    answer = folder / name
    fd = os.open(answer, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if os.geteuid() == 0:
            os.fchown(fd, *owner_of(pid))
        injector = Injector(pid)
        injector.run(removal(None, f"{inside}/{name}"), lambda: os.fstat(fd).st_size > 0, timeout_s=timeout_s)
        return os.fstat(fd).st_size > 0
    except TargetRefused:
        if os.fstat(fd).st_size > 0:
            return True
        raise
    finally:
        os.close(fd)
        answer.unlink(missing_ok=True)
