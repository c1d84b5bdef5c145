"""What eBPF can do here, found out by doing it: versions and capability bits promise more than they hold."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

from latencyprism.attach.maps import open_mapped, read_maps
from latencyprism.attach.permissions import Condition
from latencyprism.bpf import kernel
from latencyprism.bpf.below import BelowProbe
from latencyprism.bpf.btf import tracepoint_types
from latencyprism.bpf.calls import CallProbe, Function
from latencyprism.bpf.native import NativeProbe, Point
from latencyprism.bpf.prices import measure_calls
from latencyprism.bpf.stubs import StubFile
from latencyprism.errors import PrismError

# Cheap, without effect, and starting with a push in common builds of glibc, as most functions of libraries
# do: the kernel emulates a push, but has to single-step most other instructions at ten times the cost.
_PROBED = "wctob"
_CALLS, _ROUNDS = 2000, 5


def conditions() -> list[Condition]:
    """Each thing the eBPF probes need, tried; a second or two, nothing is left behind."""
    return [
        _try("architecture", kernel.supported_machine),
        _try("kernel type information", lambda: f"{_tracepoints()} tracepoints resolved"),
        _try("bpf(2) allowed", _create_ring),
        _try("uprobes on a process", _probe_self),
        _try("timed calls", _time_self),
        _try("price of a probed call", _price_self),
        _try("scheduler tracing, structure offsets right", _trace_self),
        _pid_namespace(),
        _jit(),
        _lockdown(),
    ]


def _try(name: str, action: Callable[[], str]) -> Condition:
    try:
        return Condition(name, True, action(), "")
    except PrismError as error:
        return Condition(name, False, f"{error.what}: {error.why}" if error.why else error.what, error.remedy)


def _tracepoints() -> int:
    return len(tracepoint_types(["sched_switch", "sched_wakeup"]))


def _create_ring() -> str:
    os.close(kernel.map_create(kernel.MAP_RINGBUF, 0, 0, 4096, 0, "try"))
    return "a ring buffer was created"


def _trace_self() -> str:
    with BelowProbe([os.getpid()]) as probe:
        attached, missing = ", ".join(probe.attached), "; ".join(probe.missing)
    return f"own sleep seen; {attached}" + (f"; not here: {missing}" if missing else "")


def _time_self() -> str:
    """Which way of attaching this kernel knows: one probe for entry and return, two in one link, or two
    events for each function."""
    file = StubFile()
    kind, stub = next(iter(file.stubs.items()))
    try:
        probe = CallProbe(os.getpid(), [file.descriptor], [Function(kind, offset=stub.offset)])
        try:
            file.run(kind, _CALLS)
            seen = probe.totals()[0].calls
        finally:
            probe.close()
    finally:
        file.close()
    if seen != _CALLS:
        raise PrismError("return probes do not work", f"{seen} of {_CALLS} calls were seen")
    return {
        "session": "one probe for entry and return (Linux 6.13)",
        "multi": "entry and return, many functions in one link (Linux 6.6)",
        "perf": "one event for each entry and return: slow to take away",
    }[probe.way]


def _price_self() -> str:
    """By the first instruction of the function: what the kernel cannot emulate it executes apart."""
    prices = measure_calls(hits=200, rounds=2, pairs_only=True)
    told = (f"{kind} {price.pair_ns:.0f} ns" for kind, price in prices.items() if price.pair_ns is not None)
    return "entry and return: " + ", ".join(told)


def _probe_self() -> str:
    cost_ns, hits = measure_probe()
    return f"{hits} of {_CALLS * _ROUNDS} calls seen, {cost_ns:.0f} ns each"


def measure_probe() -> tuple[float, int]:
    """(added ns per hit of a function-entry probe with its record, hits seen), on a C function in this
    very process. The best of several rounds; PrismError when probes are not possible or hits are missing."""
    call = getattr(ctypes.CDLL(None), _PROBED)
    pid = os.getpid()
    address = ctypes.cast(call, ctypes.c_void_p).value or 0
    mapping = next((m for m in read_maps(pid) if m.start <= address < m.end and m.inode), None)
    if mapping is None:
        raise PrismError("cannot try a uprobe", "the C library is not mapped from a file")
    bare_ns = min(_round(call) for _ in range(_ROUNDS))
    file = open_mapped(pid, mapping)
    try:
        probe = NativeProbe(pid, [file], [Point(_PROBED)])
    finally:
        os.close(file)
    try:
        probed_ns = min(_round(call) for _ in range(_ROUNDS))
        hits = sum(1 for _ in probe.read())
        if hits != _CALLS * _ROUNDS or probe.lost:
            raise PrismError("uprobes do not work", f"{hits} of {_CALLS * _ROUNDS} calls were seen")
    finally:
        probe.close()
    return probed_ns - bare_ns, hits


def _round(call: Callable[[int], int]) -> float:
    """ns per call."""
    start = time.perf_counter_ns()
    for _ in range(_CALLS):
        call(65)
    return (time.perf_counter_ns() - start) / _CALLS


def _pid_namespace() -> Condition:
    initial = os.stat("/proc/self/ns/pid").st_ino == 0xEFFFFFFC
    detail = "the host's" if initial else "a namespace of its own"
    return Condition(
        "pid namespace", initial, detail, "" if initial else "Start the container with --pid=host."
    )


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _jit() -> Condition:
    value = _read("/proc/sys/net/core/bpf_jit_enable")
    detail = {"0": "off", "1": "on", "2": "on, debugging"}.get(value or "", "cannot be read")
    return Condition(
        "eBPF compiler", value != "0", detail, "" if value != "0" else "sysctl net.core.bpf_jit_enable=1"
    )


def _lockdown() -> Condition:
    value = _read("/sys/kernel/security/lockdown")
    blocked = value is not None and "[confidentiality]" in value
    remedy = "Boot without lockdown=confidentiality: it forbids reading memory." if blocked else ""
    return Condition("kernel lockdown", not blocked, value or "not in use", remedy)
