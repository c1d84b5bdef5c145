"""Is a wait found in the right step, under the right reason? Known disturbances in known steps of a loop of
our own; the share of the injected time that is found there."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from latencyprism.bench.disturbed_loop import WAIT_S
from latencyprism.bpf.below import BelowProbe
from latencyprism.bpf.waits import Intervals, Kind
from latencyprism.errors import PrismError
from latencyprism.host.cgroup import find_cpu_mount, parse_membership
from latencyprism.records import Step
from latencyprism.timeline.attribution import Attribution, Roles, Wait, by_step

TARGET = 0.95
QUOTA_US, PERIOD_US = 20_000, 100_000

# First in first out, on the loop's own CPU: whenever it is asked it takes the CPU for WAIT_S.
_HOG = """
import json, os, sys, time
asked, wait, cpu = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
os.sched_setaffinity(0, {cpu})
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
print(json.dumps({"ready": os.getpid()}), flush=True)
while os.read(asked, 1):
    begun = time.monotonic_ns()
    while time.monotonic_ns() < begun + wait * 1e9:
        pass
    print(json.dumps({"injected_ns": time.monotonic_ns() - begun}), flush=True)
"""
# Answers WAIT_S after it was asked.
_ANSWERER = """
import json, os, sys, time
asked, wait, answer = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
print(json.dumps({"ready": os.getpid()}), flush=True)
while os.read(asked, 1):
    begun = time.monotonic_ns()
    time.sleep(wait)
    waited = time.monotonic_ns() - begun
    os.write(answer, b"x")
    print(json.dumps({"injected_ns": waited}), flush=True)
"""


class Disturbed:
    """The loop, those who disturb it, and a cgroup with a quota where one can be made."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self._folder = Path(tempfile.mkdtemp(prefix="latencyprism-", dir=_on_disk()))
        self.group = self._make_group()
        cpus = sorted(os.sched_getaffinity(0))
        hog_read, hog_write = os.pipe()
        ask_read, ask_write = os.pipe()
        answer_read, answer_write = os.pipe()
        self._children: list[subprocess.Popen[str]] = []
        try:
            self.hog = self._start(["-c", _HOG, str(hog_read), str(WAIT_S), str(cpus[-1])], hog_read)
            self.answerer = self._start(
                ["-c", _ANSWERER, str(ask_read), str(WAIT_S), str(answer_write)], ask_read, answer_write
            )
            spec = {
                "cpu": cpus[-1], "file": str(self._folder / "pages"), "hog": hog_write,
                "asks": ask_write, "answers": answer_read,
                "group": self.group, "home": self._home,
            }  # fmt: skip
            module = ["-m", "latencyprism.bench.disturbed_loop", json.dumps(spec)]
            self.loop = self._start(module, hog_write, ask_write, answer_read)
        except BaseException:
            self.close()
            raise
        finally:
            for end in (hog_read, hog_write, ask_read, ask_write, answer_read, answer_write):
                os.close(end)

    def _start(self, arguments: list[str], *descriptors: int) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=descriptors,
        )  # fmt: skip
        self._children.append(child)
        _hear(child)
        return child

    def _make_group(self) -> str | None:
        """A child of the group that this process is in."""
        mount = find_cpu_mount()
        text = Path("/proc/self/cgroup").read_text()
        path = parse_membership(text, mount.version) if mount else None
        self._home = ""
        if mount is None or path is None:
            self.missing.append("throttled: no CPU controller of control groups is mounted")
            return None
        self._home = os.path.join(mount.directory, path.removeprefix(mount.root).lstrip("/"))
        group = os.path.join(self._home, f"latencyprism-{os.getpid()}")
        try:
            os.mkdir(group)
            if mount.version == 2:
                Path(group, "cpu.max").write_text(f"{QUOTA_US} {PERIOD_US}")
            else:
                Path(group, "cpu.cfs_period_us").write_text(str(PERIOD_US))
                Path(group, "cpu.cfs_quota_us").write_text(str(QUOTA_US))
        except OSError as error:
            self.missing.append(f"throttled: no control group with a quota: {error.strerror}")
            with suppress(OSError):
                os.rmdir(group)
            return None
        return group

    def step(self, what: str) -> dict[str, Any]:
        assert self.loop.stdin
        self.loop.stdin.write(what + "\n")
        self.loop.stdin.flush()
        told = _hear(self.loop)
        if what == "preempted":
            told |= _hear(self.hog)
        if what == "read":
            told |= _hear(self.answerer)
        return told

    def close(self) -> None:
        for child in reversed(self._children):
            assert child.stdin and child.stdout
            child.kill()
            child.wait()
            child.stdin.close()
            child.stdout.close()
        if self.group is not None:
            with suppress(OSError):
                os.rmdir(self.group)
        shutil.rmtree(self._folder, ignore_errors=True)


def _hear(child: subprocess.Popen[str]) -> dict[str, Any]:
    assert child.stdout
    line = child.stdout.readline()
    if not line:
        raise PrismError("a process of the benchmark ended", f"exit code {child.wait()}")
    told: dict[str, Any] = json.loads(line)
    return told


def _on_disk() -> str:
    """A folder that is no memory: its pages can be dropped and must be read again."""
    return "/var/tmp" if os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()


def run(rounds: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Each disturbance ``rounds`` times in random order, an undisturbed step after each."""
    disturbed = Disturbed()
    try:
        kinds = ["preempted", "futex", "read", "fsync", "faults", *(["throttled"] if disturbed.group else [])]
        order = kinds * rounds
        random.Random(seed).shuffle(order)
        for what in kinds:
            disturbed.step(what)  # what is done for the first time takes longer
        with BelowProbe([disturbed.loop.pid], ring_bytes=16 << 20) as probe:
            probe.go_deep()
            told, pieces = [], []
            for number, what in enumerate(order):
                told += [disturbed.step(what), disturbed.step("plain")]
                pieces.append(probe.read())
                if (number + 1) % 50 == 0:
                    say(f"{number + 1} of {len(order)} disturbances")
            pieces.append(probe.stop())
            lost = probe.lost
    finally:
        disturbed.close()
    result = score(told, np.concatenate(pieces), disturbed.loop.pid, disturbed.hog.pid)
    return {"rounds": rounds, "lost": lost, **result, "not_available": disturbed.missing}


def score(told: Sequence[dict[str, Any]], intervals: Intervals, loop: int, hog: int) -> dict[str, Any]:
    """``told``: steps as the loop describes them, in order. Found: in the same step, of the right kind and,
    if it is a preemption, by the right process; never more than was injected."""
    steps = [Step("loop", 0, 0, n, t["start_ns"], t["end_ns"]) for n, t in enumerate(told)]
    roles = Roles(frozenset({loop}))
    waits = by_step(steps, intervals, roles)
    result: dict[str, Any] = {}
    for what in dict.fromkeys(t["what"] for t in told if t["what"] != "plain"):
        mine = [n for n, t in enumerate(told) if t["what"] == what]
        if what == "faults":
            found = _faults(steps, intervals, roles)
            injected = [told[n]["major_faults"] for n in mine]
        else:
            found = _found(waits, len(steps), what, hog)
            injected = [told[n]["injected_ns"] for n in mine]
        hit = sum(min(found[n], amount) for n, amount in zip(mine, injected))
        astray = sum(amount for n, amount in enumerate(found) if told[n]["what"] == "plain")
        whole = sum(injected)
        result[what] = {
            "steps": len(mine),
            "injected": whole if what == "faults" else round(whole / 1e6, 3),
            "unit": "faults" if what == "faults" else "ms",
            "found_share": round(hit / whole, 4) if whole else None,
            "in_undisturbed_steps": round(astray / whole, 4) if whole else None,
        }
    shares = [r["found_share"] for r in result.values() if r["found_share"] is not None]
    result["least_found_share"] = min(shares) if shares else None
    result["target"] = TARGET
    return result


def _is(wait: Wait, what: str, hog: int) -> bool:
    if what == "preempted":
        return wait.kind == Kind.PREEMPTED and wait.culprit_pid == hog
    if what == "fsync":
        return wait.kind == Kind.SYSCALL and wait.syscall == "fsync"
    return wait.kind == Kind[what.upper()]


def _found(waits: Sequence[Wait], steps: int, what: str, hog: int) -> list[int]:
    found = [0] * steps
    for wait in waits:
        if _is(wait, what, hog):
            found[wait.step] += wait.ns
    return found


def _faults(steps: Sequence[Step], intervals: Intervals, roles: Roles) -> list[int]:
    joined = Attribution(roles, steps[0].start_ns)
    joined.update(steps[0].start_ns, {}, intervals)
    return [step.major_faults or 0 for step in joined.fill(steps)]
