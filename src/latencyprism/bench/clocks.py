"""Is an event ever further from where it was placed than the stated bound? Random trials with simulated
clocks, and an exchange between two network namespaces."""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latencyprism.bench.simulated_clocks import LIMITS, Path, SimulatedClock
from latencyprism.errors import PrismError
from latencyprism.timeline.clock_exchange import Answering, Asking
from latencyprism.timeline.clocks import ClockTrack, Order, Timeline

CHECKS = 40
AFTER_S = 5.0
OWN, OTHER = "own", "other"


@dataclass
class Trial:
    """What one came to; times in ns."""

    bounds: list[int] = field(default_factory=list)
    errors: list[int] = field(default_factory=list)
    beyond: int = 0
    orders: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("right", "wrong", "unknown"), 0))
    without_collectives: list[int] = field(default_factory=list)
    epochs: int = 1
    sets: int = 0
    drift_error_ppm: float | None = None


def run(trials: int, seed: int, exchange_s: float, say: Callable[[str], None]) -> dict[str, Any]:
    """``violations``: events further from their place than the bound, of ``checks``; ``orders`` of pairs of
    events; bounds and errors are those of clocks that were not set; ``namespaces``: a real exchange, or why
    there is none."""
    begun = time.monotonic()
    done = []
    for number in range(trials):
        done.append(trial(random.Random(seed * 1_000_003 + number)))
        if (number + 1) % 250 == 0:
            say(f"{number + 1} trials, {sum(one.beyond for one in done)} beyond their bound")
    bounds, errors = (
        np.array([value for one in done if not one.sets for value in getattr(one, name)])
        for name in ("bounds", "errors")
    )
    bare = np.array([bound for one in done if not one.sets for bound in one.without_collectives])
    tightened = np.array(
        [bound for one in done if one.without_collectives and not one.sets for bound in one.bounds]
    )
    drifts = np.abs([one.drift_error_ppm for one in done if one.drift_error_ppm is not None])
    return {
        "trials": trials,
        "checks": sum(len(one.bounds) for one in done),
        "violations": sum(one.beyond for one in done),
        "trials_violated": sum(one.beyond > 0 for one in done),
        "orders": {name: sum(one.orders[name] for one in done) for name in ("right", "wrong", "unknown")},
        "bound_us": _spread(bounds / 1e3),
        "error_us": _spread(errors / 1e3),
        "error_to_bound_max": round(float((errors / np.maximum(bounds, 1)).max(initial=0)), 4),
        "with_collectives_bound_us": _spread(tightened / 1e3),
        "same_without_collectives_bound_us": _spread(bare / 1e3),
        "drift_error_ppm": _spread(drifts),
        "clocks_set": sum(one.sets for one in done),
        "sets_noticed": sum(one.epochs - 1 for one in done),
        "namespaces": _namespaces(exchange_s),
        "seconds": round(time.monotonic() - begun, 1),
    }


def trial(dice: random.Random) -> Trial:
    """One pair of clocks and one network, both drawn."""
    exchanges, period_s = dice.randrange(5, 120), dice.choice((0.1, 0.25, 0.5, 1.0, 2.0))
    seconds = exchanges * period_s + AFTER_S + 3
    own, other = SimulatedClock.drawn(dice, seconds), SimulatedClock.drawn(dice, seconds)
    paths = Path.drawn(dice), Path.drawn(dice)
    out = Trial()
    if exchanges > 20 and dice.random() < 0.25:
        when = int(dice.uniform(0.3, 0.7) * exchanges * period_s * 1e9)
        by = dice.choice((-1, 1)) * int(10 ** dice.uniform(8.7, 11))
        other.sets.append((when, by))
        out.sets = 1
    timeline, bare = Timeline(OWN), ClockTrack(LIMITS)
    track = timeline.track(OTHER, LIMITS)
    collectives = dice.random() < 0.5
    at = 1_000_000_000
    for _ in range(exchanges):
        if dice.random() > 0.1:
            stamps = _exchange(at, own, other, paths, dice)
            track.exchange(*stamps)
            bare.exchange(*stamps)
        if collectives:
            for _ in range(4):
                track.collective(*_collective(at + dice.randrange(int(period_s * 1e9)), own, other, dice))
        at += int(period_s * 1e9 * dice.uniform(0.8, 1.2))
    out.epochs = track.epochs
    _check(out, timeline, bare if collectives else None, own, other, at, dice)
    if not out.sets and track.drift_ppm is not None and exchanges > 20:
        true = _drift_ppm(own, other, 1_000_000_000, at - int(period_s * 1e9))
        out.drift_error_ppm = track.drift_ppm - true
    return out


def _exchange(
    at: int, own: SimulatedClock, other: SimulatedClock, paths: tuple[Path, Path], dice: random.Random
) -> tuple[int, int, int, int]:
    arrived = at + paths[0].delay(dice)
    answered = arrived + dice.randrange(1000, 200_000)
    received = answered + paths[1].delay(dice)
    return own.read(at), other.read(arrived), other.read(answered), own.read(received)


def _collective(
    at: int, own: SimulatedClock, other: SimulatedClock, dice: random.Random
) -> tuple[int, int, int, int]:
    """Each rank comes to it in its own time; it ends on both soon after the last has begun."""
    begins = at, at + int(dice.gauss(0, 300_000))
    last = max(begins) + dice.randrange(2_000, 60_000)
    ends = [last + int(dice.expovariate(1 / 8_000)) for _ in begins]
    return own.read(begins[0]), own.read(ends[0]), other.read(begins[1]), other.read(ends[1])


def _check(
    out: Trial, timeline: Timeline, bare: ClockTrack | None,
    own: SimulatedClock, other: SimulatedClock, end: int, dice: random.Random,
) -> None:  # fmt: skip
    """Random moments from before the first exchange to some seconds after the last. Those around a time at
    which the clock was set are like any other."""
    track = timeline.tracks[OTHER]
    for _ in range(CHECKS):
        true = dice.randrange(500_000_000, end + int(AFTER_S * 1e9))
        shown, ours = other.read(true), own.read(true)
        place = track.place(shown)
        if place is None:
            continue
        out.bounds.append(place.error_ns)
        out.errors.append(abs(place.ns - ours))
        out.beyond += not place.earliest_ns <= ours <= place.latest_ns
        offset = track.offset(ours)
        out.beyond += offset is not None and not offset[0] <= shown - ours <= offset[1]
        if bare is not None and (without := bare.place(shown)) is not None:
            out.without_collectives.append(without.error_ns)
        near = max(true + dice.choice((-1, 1)) * int(10 ** dice.uniform(3, 8)), 0)
        told = timeline.order((OWN, own.read(near)), (OTHER, shown))
        right = Order.BEFORE if near < true else Order.AFTER
        out.orders["unknown" if told is Order.UNKNOWN else "right" if told is right else "wrong"] += 1


def _drift_ppm(own: SimulatedClock, other: SimulatedClock, first: int, last: int) -> float:
    ours, others = own.read(last) - own.read(first), other.read(last) - other.read(first)
    return (others - ours) / ours * 1e6


def _spread(values: Any) -> dict[str, float] | None:
    if not len(values):
        return None
    return {
        "p50": round(float(np.median(values)), 3),
        "p95": round(float(np.quantile(values, 0.95)), 3),
        "max": round(float(np.max(values)), 3),
    }


# -- between network namespaces ---------------------------------------------------------------------

ADDRESS = "10.213.7.1"
ASKER_ADDRESS = "10.213.7.2"


class _Skewed:
    """A clock made of the true one, which both sides have: so how far it is off is known."""

    def __init__(self, ahead_ns: int, ppm: float) -> None:
        self.ahead_ns, self.ppm, self.begun = ahead_ns, ppm, 0

    def at(self, true_ns: int) -> int:
        return true_ns + self.ahead_ns + int((true_ns - self.begun) * self.ppm * 1e-6)

    def __call__(self) -> int:
        return self.at(time.monotonic_ns())


def _namespaces(seconds: float) -> dict[str, Any] | str:
    """A child in a network namespace of its own asks over a pair of virtual interfaces; its clock is skewed.
    In words why there is none."""
    if seconds <= 0:
        return "not asked for"
    name = f"lpc{os.getpid()}"
    try:
        with _pair(name):
            return _asked(name, seconds)
    except (PrismError, OSError, subprocess.SubprocessError) as error:
        return f"no exchange between namespaces: {error}"


@contextmanager
def _pair(name: str) -> Any:
    """A namespace and a link into it; both gone afterwards."""
    if os.geteuid() != 0:
        raise PrismError("needs root")
    commands = [
        ["netns", "add", name],
        ["link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b", "netns", name],
        ["addr", "add", f"{ADDRESS}/30", "dev", f"{name}a"],
        ["link", "set", f"{name}a", "up"],
        ["-n", name, "addr", "add", f"{ASKER_ADDRESS}/30", "dev", f"{name}b"],
        ["-n", name, "link", "set", f"{name}b", "up"],
    ]
    try:
        for command in commands:
            _ip(command)
        yield
    finally:
        for command in (["link", "del", f"{name}a"], ["netns", "del", name]):
            with suppress(PrismError, OSError):
                _ip(command)


def _ip(arguments: list[str]) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=10)
    if done.returncode:
        raise PrismError("cannot make a network namespace", done.stderr.strip()[:200])


def _asked(name: str, seconds: float) -> dict[str, Any]:
    dice = random.Random(os.getpid())
    clock = _Skewed(dice.randrange(-(10**12), 10**12), dice.uniform(-200, 200))
    clock.begun = time.monotonic_ns()
    answering = Answering(ADDRESS, 0, clock)
    spec = [ADDRESS, answering.address[1], seconds, clock.ahead_ns, clock.ppm, clock.begun]
    child = subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, "-m", "latencyprism.bench.clocks", json.dumps(spec)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + seconds + 20
        while child.poll() is None and time.monotonic() < until:
            if select.select([answering], [], [], 0.1)[0]:
                answering.serve()
        if child.poll() is None:
            raise PrismError("the asking process did not end")
        assert child.stdout is not None
        told: dict[str, Any] = json.loads(child.stdout.read() or "{}")
        return told
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
        answering.close()


def _ask(spec: list[Any]) -> dict[str, Any]:
    """In the namespace: exchange for a while, then compare with what only a simulation knows."""
    host, port, seconds, ahead_ns, ppm, begun = spec
    clock = _Skewed(ahead_ns, ppm)
    clock.begun = begun
    track = ClockTrack(LIMITS)
    asking = Asking(host, port, track)
    until = time.monotonic() + seconds
    first = time.monotonic_ns()
    while time.monotonic() < until:
        asking.ask(0.5)
        time.sleep(0.05)
    beyond, bounds, errors = 0, [], []
    dice = random.Random(port)
    for _ in range(500):
        true = dice.randrange(first, time.monotonic_ns())
        place = track.place(clock.at(true))
        if place is not None:
            beyond += not place.earliest_ns <= true <= place.latest_ns
            bounds.append(place.error_ns / 1e3)
            errors.append(abs(place.ns - true) / 1e3)
    asking.close()
    return {
        "asked": asking.asked, "answered": asking.answered, "left_out": track.slow, "checks": len(bounds),
        "violations": beyond, "bound_us": _spread(bounds), "error_us": _spread(errors),
        "ahead_ms": ahead_ns / 1e6, "drift_ppm": round(ppm, 3),
        "drift_found_ppm": None if track.drift_ppm is None else round(track.drift_ppm, 3),
    }  # fmt: skip


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_ask(json.loads(sys.argv[1]))) + "\n")
