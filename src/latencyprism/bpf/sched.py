"""What the threads of some processes waited for: for the CPU (run-queue latency) or for something else
(off-CPU), and who had the CPU meanwhile. For deep probes of seconds, not for always: every context switch
of the machine then pays for a look at it (80-190 ns; 300-450 ns for a thread that is watched)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from latencyprism.bpf import kernel
from latencyprism.bpf.btf import tracepoint_types
from latencyprism.bpf.loader import LoadedObject, read_object
from latencyprism.bpf.ring import RingBuffer
from latencyprism.errors import BadInput, PrismError
from latencyprism.records import Span

_INITIAL_PID_NAMESPACE = 0xEFFFFFFC
_MAX_TARGETS = 250
RING_BYTES = 4 << 20
_UNINTERRUPTIBLE = 2
_STOPPED = 4 | 8  # by a signal, or by a tracer

SWITCH_DTYPE = np.dtype(
    [
        ("on_ns", "<u8"),
        ("out_ns", "<u8"),
        ("wake_ns", "<u8"),
        ("in_ns", "<u8"),
        ("tid", "<i4"),
        ("tgid", "<i4"),
        ("state", "<u4"),
        ("cpu", "<u4"),
        ("after_pid", "<i4"),
        ("by_pid", "<i4"),
        ("waker_pid", "<i4"),
        ("reserved", "<u4"),
        ("comm", "S16"),
        ("after_comm", "S16"),
        ("by_comm", "S16"),
    ]
)
"""One record each time a watched thread gets a CPU back; times CLOCK_MONOTONIC ns.

``on_ns`` when it had got the CPU before (0: not seen), ``out_ns`` when it lost it, ``wake_ns`` when it was
made runnable (0: it had stayed runnable, or the wake-up was not seen), ``in_ns`` when it got it back.
``state`` is the kernel's task state when it left, 0 for a thread whose CPU was taken away. ``after_*`` ran
on this CPU immediately before, ``by_*`` got the CPU when the thread lost it. ``waker_pid`` was running
where the wake-up came from: the waker, or, when an interrupt (a timer, a disk) did it, the one interrupted.
"""

Switches = npt.NDArray[np.void]


class SchedProbe:
    """``start`` attaches, ``read`` hands over what there is, ``stop`` detaches; also a context manager.

    Raises PrismError with a remedy when the kernel or the rights do not suffice, or when the self-test
    finds that the kernel has not put the right structure offsets into the program.
    """

    def __init__(self, pids: Iterable[int], ring_bytes: int = RING_BYTES) -> None:
        self.pids = tuple(dict.fromkeys(pids))
        if not 0 < len(self.pids) <= _MAX_TARGETS or min(self.pids) <= 0:
            raise BadInput(
                "cannot trace the scheduler", f"1 to {_MAX_TARGETS} processes, not {len(self.pids)}"
            )
        self._ring_bytes = ring_bytes
        self._object: LoadedObject | None = None
        self._ring: RingBuffer | None = None
        self._links: list[int] = []
        self._programs: dict[str, int] = {}

    def __enter__(self) -> SchedProbe:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Attach and check; a few milliseconds once prepared."""
        self.prepare()
        if self._links or self._object is None or self._ring is None:
            return
        try:
            self._object.maps["targets"][os.getpid()] = bytes(4)
            for name, program in self._programs.items():
                self._links.append(kernel.link_tracing(program, name))
            self._check_relocation(self._ring)
            if os.getpid() not in self.pids:
                del self._object.maps["targets"][os.getpid()]
            for pid in self.pids:
                self._object.maps["targets"][pid] = bytes(4)
            self._ring.array(SWITCH_DTYPE)
        except BaseException:
            self.stop()
            raise

    def prepare(self) -> None:
        """Load, so that ``start`` has only to attach; about 0.1 s, most of it reading the kernel's type
        information. Nothing is traced yet."""
        if self._ring is not None:
            return
        if os.stat("/proc/self/ns/pid").st_ino != _INITIAL_PID_NAMESPACE:
            raise PrismError(
                "cannot trace the scheduler",
                "this process is in a pid namespace of its own",
                "Run on the host, or in a container with the host's pid namespace (--pid=host).",
            )
        self._object = LoadedObject(read_object("sched"), entries={"ring": self._ring_bytes})
        try:
            self._ring = RingBuffer(self._object.maps["ring"].descriptor, self._ring_bytes)
            for name, number in tracepoint_types(["sched_switch", "sched_wakeup"]).items():
                self._programs[name] = self._object.load(
                    f"tp_btf/{name}", kernel.PROG_TRACING, kernel.ATTACH_RAW_TP, attach_btf_id=number
                )
        except BaseException:
            self.stop()
            raise

    def _check_relocation(self, ring: RingBuffer) -> None:
        """Our own sleep must come out under our own pid: wrong offsets would show some other number."""
        for _ in range(5):
            time.sleep(0.001)
            seen = ring.array(SWITCH_DTYPE)
            if np.any((seen["tgid"] == os.getpid()) & (seen["in_ns"] > seen["out_ns"])):
                return
        raise PrismError(
            "cannot trace the scheduler",
            "the program does not see its own process: its structure offsets are wrong",
            kernel.KERNEL,
        )

    @property
    def lost(self) -> int:
        """Records that found the ring full; stays readable after ``stop``."""
        return self._object.counter("lost") if self._object else 0

    def read(self) -> Switches:
        """Records since the last call, as an array of SWITCH_DTYPE in the order of ``in_ns`` per CPU."""
        if self._ring is None:
            return np.empty(0, SWITCH_DTYPE)
        records = self._ring.array(SWITCH_DTYPE)
        # A record of our own may have slipped in between the self-test and its end.
        return records[np.isin(records["tgid"], self.pids)]

    def pause(self) -> Switches:
        """Detach and hand over the rest, but stay loaded for another ``start``."""
        while self._links:
            with suppress(OSError):
                os.close(self._links.pop())
        return self.read()

    def stop(self) -> Switches:
        """Detach, hand over the rest and give everything back; safe to repeat."""
        rest = self.pause()
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        if self._object is not None:
            self._object.close()
        return rest


def waits_within(events: Switches, start_ns: int, end_ns: int) -> dict[int, tuple[int, int]]:
    """{tid: (run-queue ns, off-CPU ns)} of what falls between two times; the tool for a step's own share."""
    runnable = np.where(events["state"] == 0, events["out_ns"], events["wake_ns"])
    # A sleeper whose wake-up was not seen counts as off-CPU until it ran.
    runnable = np.where(runnable == 0, events["in_ns"], runnable)
    queue = _clip(runnable, events["in_ns"], start_ns, end_ns)
    off = _clip(events["out_ns"], runnable, start_ns, end_ns)
    return {
        int(tid): (int(queue[events["tid"] == tid].sum()), int(off[events["tid"] == tid].sum()))
        for tid in np.unique(events["tid"])
    }


def _clip(
    start: npt.NDArray[np.uint64], end: npt.NDArray[np.uint64], low: int, high: int
) -> npt.NDArray[np.int64]:
    first = np.clip(start.astype(np.int64), low, high)
    length: npt.NDArray[np.int64] = np.maximum(np.clip(end.astype(np.int64), low, high) - first, 0)
    return length


def to_spans(events: Switches, on_cpu: bool = False) -> list[Span]:
    """Spans on tracks ``("COMM TID", "sched")``: ``run-queue (after PID COMM)``, ``off-CPU (waiting)``,
    ``off-CPU (uninterruptible)`` or ``off-CPU (stopped)``, and with ``on_cpu`` also ``on-CPU``; in order of
    time within a thread."""
    spans: list[Span] = []
    for event in events[np.lexsort((events["in_ns"], events["tid"]))]:
        track = (f"{_text(event['comm'])} {event['tid']}", "sched")
        out_ns, wake_ns, in_ns = int(event["out_ns"]), int(event["wake_ns"]), int(event["in_ns"])
        if on_cpu and event["on_ns"]:
            spans.append(Span(track, "on-CPU", int(event["on_ns"]), out_ns))
        runnable_ns = out_ns
        if event["state"]:
            runnable_ns = wake_ns or in_ns
            spans.append(Span(track, f"off-CPU ({_reason(int(event['state']))})", out_ns, runnable_ns))
        if in_ns > runnable_ns:
            spans.append(
                Span(track, f"run-queue (after {_who(event)})", runnable_ns, in_ns, None, _taken_by(event))
            )
    return spans


def _reason(state: int) -> str:
    if state & _STOPPED:
        return "stopped"
    return "uninterruptible" if state & _UNINTERRUPTIBLE else "waiting"


def _text(raw: bytes) -> str:
    return "".join(c if c.isprintable() else "?" for c in bytes(raw).decode("utf-8", "replace"))


def _who(event: np.void) -> str:
    return f"{event['after_pid']} {_text(event['after_comm'])}" if event["after_pid"] else "idle"


def _taken_by(event: np.void) -> tuple[tuple[str, str | int | float], ...]:
    if event["state"] or not event["by_pid"]:
        return ()
    return (("preempted_by", int(event["by_pid"])), ("preempted_by_comm", _text(event["by_comm"])))
