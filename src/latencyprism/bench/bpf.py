"""Probes themselves: how many events a second reach Python, at what CPU, how fast probes come and go, what a
hit costs, and whether a killed profiler leaves anything behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from latencyprism.bpf.calls import CALL_DTYPE, CallProbe, Function
from latencyprism.bpf.prices import measure_calls
from latencyprism.bpf.stubs import StubFile
from latencyprism.errors import PrismError

POLL_S = 0.001
PAIRS = 100
RING_BYTES = 16 << 20
REMOVED_WITHIN_S = 5.0


class StubTarget:
    """``bench.stub_target`` in a process, and the file it runs."""

    def __init__(self, cpu: int | None = None, clones: int = 0) -> None:
        self.file = StubFile(clones)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "latencyprism.bench.stub_target", str(self.file.descriptor),
             "-" if cpu is None else str(cpu)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=(self.file.descriptor,),
        )  # fmt: skip
        first = self.hear()
        self.kind, self.address = str(first["kind"]), int(first["address"])

    @property
    def pid(self) -> int:
        return self.process.pid

    def order(self, words: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise PrismError("the target of the benchmark ended", f"exit code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def first_instruction(self) -> bytes:
        """The bytes it executes where a probe would be."""
        memory = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(memory, 8, self.address)
        finally:
            os.close(memory)

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.file.close()


def run(seconds: float, rate: float, kills: int, say: Callable[[str], None]) -> dict[str, Any]:
    """``rate``: calls a second that are asked for during ``seconds``; ``kills``: profilers to kill."""
    result: dict[str, Any] = {"asked_per_s": rate, **stream(seconds, rate)}
    say(f"{result['events_per_s']:.0f} events/s, {result['lost']} lost")
    result |= come_and_go()
    say(f"{PAIRS} pairs: attached in {result['attach_s']} s, detached in {result['detach_s']} s")
    prices = measure_calls()
    best = next(iter(prices.values()))
    if best.pair_ns is not None and best.empty_pair_ns:
        result["hit_ns"] = round(best.pair_ns)
        result["empty_pair_ns"] = round(best.empty_pair_ns)
        result["hit_ratio"] = round(best.pair_ns / best.empty_pair_ns, 2)
    result["prices"] = {
        kind: {name: None if ns is None else round(ns) for name, ns in price._asdict().items()}
        for kind, price in prices.items()
    }
    if kills:
        result |= killed(kills, say)
    return result


def stream(seconds: float, rate: float) -> dict[str, Any]:
    """One record for each call of a paced target, read every millisecond; the reader on another CPU."""
    cpus = sorted(os.sched_getaffinity(0))
    target = StubTarget(cpus[-1])
    os.sched_setaffinity(0, cpus[:1])
    probe = None
    try:
        stub = target.file.stubs[target.kind]
        function = Function(target.kind, offset=stub.offset, returns=False)
        probe = CallProbe(target.pid, [target.file.descriptor], [function], ring_bytes=RING_BYTES)
        target.order(f"rate {rate} {seconds}")
        count, first_ns, last_ns, spent_s, begun = 0, 0, 0, time.thread_time(), time.monotonic()
        while time.monotonic() < begun + seconds + 0.2:
            time.sleep(POLL_S)
            records = probe.read()
            if len(records):
                first_ns = first_ns or int(records["start_ns"][0])
                last_ns = int(records["end_ns"][-1])
                count += len(records)
        wall_s, spent_s = time.monotonic() - begun, time.thread_time() - spent_s
        calls = int(target.hear()["calls"])
        count += len(probe.read())
        lost = probe.lost
    finally:
        if probe is not None:
            probe.close()
        os.sched_setaffinity(0, cpus)
        target.close()
    if count + lost != calls:
        raise PrismError("events went astray", f"{calls} calls, {count} records, {lost} counted as lost")
    return {
        "events_per_s": round(count / max((last_ns - first_ns) / 1e9, 1e-9)),
        "events": count,
        "lost": lost,
        "reader_cpu": round(spent_s / wall_s, 4),
        "record_bytes": CALL_DTYPE.itemsize,
        "poll_ms": POLL_S * 1e3,
    }


def come_and_go(rounds: int = 5) -> dict[str, Any]:
    """Load and attach ``PAIRS`` entry-and-return pairs to a process, and take them away; medians."""
    target = StubTarget(clones=PAIRS)
    attached, detached, way = [], [], ""
    try:
        functions = [Function(f"clone {n}", offset=at) for n, at in enumerate(target.file.clones)]
        for _ in range(rounds):
            begun = time.monotonic()
            probe = CallProbe(target.pid, [target.file.descriptor], functions)
            attached.append(time.monotonic() - begun)
            way = probe.way
            begun = time.monotonic()
            probe.close()
            detached.append(time.monotonic() - begun)
    finally:
        target.close()
    return {
        "pairs": PAIRS,
        "way": way,
        "attach_s": round(sorted(attached)[rounds // 2], 4),
        "detach_s": round(sorted(detached)[rounds // 2], 4),
    }


# A profiler to be killed: says that it is attached, then reads at full load.
_VICTIM = """
import sys, time
from latencyprism.bpf.calls import CallProbe, Function
pid, file, offset = (int(word) for word in sys.argv[1:4])
probe = CallProbe(pid, [file], [Function("stub", offset=offset)])
while len(probe.read()) < 100:
    time.sleep(0.001)
print("attached", flush=True)
while True:
    probe.read()
    time.sleep(0.001)
"""


def killed(rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """SIGKILL for a profiler hit without pause: when are its probes gone, and does the target go on?"""
    target = StubTarget()
    times, unharmed = [], 0
    try:
        clean = target.first_instruction()
        target.order("spin")
        beat = os.open(f"/proc/{target.pid}/fd/{target.hear()['beat']}", os.O_RDONLY | os.O_CLOEXEC)
        for number in range(rounds):
            times.append(_kill_one(target, clean))
            before = os.pread(beat, 20, 0)
            time.sleep(0.05)
            unharmed += target.process.poll() is None and os.pread(beat, 20, 0) != before
            if (number + 1) % 10 == 0:
                say(f"{number + 1} of {rounds} profilers killed, the slowest gone after {max(times):.3f} s")
        os.close(beat)
    finally:
        target.close()
    return {
        "kills": rounds,
        "unharmed": unharmed,
        "gone_within_1s": sum(t <= 1.0 for t in times),
        "gone_s_max": round(max(times), 4),
    }


def _kill_one(target: StubTarget, clean: bytes) -> float:
    """Seconds from the kill until the target's own instruction is back."""
    stub = target.file.stubs[target.kind]
    victim = subprocess.Popen(
        [sys.executable, "-c", _VICTIM, str(target.pid), str(target.file.descriptor), str(stub.offset)],
        stdout=subprocess.PIPE, text=True, pass_fds=(target.file.descriptor,),
    )  # fmt: skip
    assert victim.stdout
    try:
        if victim.stdout.readline() != "attached\n":
            raise PrismError("the profiler of the benchmark ended", f"exit code {victim.wait()}")
        if target.first_instruction() == clean:
            raise PrismError("the probe is not where it was expected")
    finally:
        begun = time.monotonic()
        victim.kill()
        victim.stdout.close()
    while target.first_instruction() != clean and time.monotonic() < begun + REMOVED_WITHIN_S:
        time.sleep(0.002)
    took = time.monotonic() - begun
    victim.wait()
    return took
