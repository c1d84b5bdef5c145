"""What was learned survives a watch; ``ack`` reaches it; the end of an incident is said."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from latencyprism.attach.process import read_process
from latencyprism.cli import ack
from latencyprism.detect import Detector
from latencyprism.detect.memory import remember
from latencyprism.engines.discovery import Member, Replica
from latencyprism.errors import TargetRefused
from latencyprism.records import Alert, Step, Window
from latencyprism.sentinel import acknowledge
from latencyprism.sentinel.claim import Claim
from latencyprism.sentinel.incident_watch import IncidentWatch
from latencyprism.sentinel.known import known_of
from latencyprism.sentinel.memory_watch import MemoryWatch, key_of
from latencyprism.sentinel.replica_watch import ReplicaWatch


@pytest.fixture(autouse=True)
def _locks_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def myself(version: str = "0.32.0") -> Replica:
    return Replica("vllm", 0, (Member(read_process(os.getpid()), "engine"),), version)


def watch_of(detector: Detector, version: str = "0.32.0") -> ReplicaWatch:
    class Watch(SimpleNamespace):
        __hash__ = object.__hash__  # type: ignore[assignment]

    return cast(ReplicaWatch, Watch(detector=detector, replica=myself(version), last_step=None, onset_ns=0))


def steps(count: int, ms: float, first: int = 0) -> Iterator[Step]:
    for number in range(first, first + count):
        start = 10**9 + int(number * 30e6)
        took = ms * (1.0 + 0.002 * (number % 7))
        batch = 4 + number // 30 % 3
        yield Step("vllm", 0, 0, number, start, start + int(took * 1e6), None, batch, 0, batch, 0, batch)


class Heard:
    def __init__(self, attendant: Any) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        attendant.emit = lambda kind, **values: self.events.append((kind, values))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [values for name, values in self.events if name == kind]


def taught(ms: float = 20.0) -> Detector:
    detector = Detector()
    for step in steps(900, ms):
        detector.observe(step)
    return detector


def test_a_second_watch_takes_up_what_the_first_one_learned(tmp_path: Path) -> None:
    memory = MemoryWatch(tmp_path / "kept" / "deep")
    first = watch_of(taught())
    memory.attached(first)
    memory.detached(first)
    second = watch_of(Detector())
    heard = Heard(memory)
    memory.attached(second)
    assert heard.of("restored")[0]["steps"] == 900
    assert second.detector.model.steps == first.detector.model.steps


def test_another_version_begins_from_nothing(tmp_path: Path) -> None:
    memory = MemoryWatch(tmp_path)
    first = watch_of(taught())
    memory.attached(first)
    memory.detached(first)
    second = watch_of(Detector(), version="0.33.0")
    memory.attached(second)
    assert second.detector.steps == 0
    assert key_of(myself()) != key_of(myself("0.33.0"))
    assert "/" not in key_of(Replica("../x", 0, myself().members, "../../etc"))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"{}", b"null", b"x" * 2_100_000])
def test_a_broken_state_is_said_and_left_alone(tmp_path: Path, content: bytes) -> None:
    memory, watch = MemoryWatch(tmp_path), watch_of(Detector())
    heard = Heard(memory)
    (tmp_path / key_of(watch.replica)).write_bytes(content)
    memory.attached(watch)
    assert watch.detector.steps == 0
    assert "state cannot be" in heard.of("notice")[0]["text"]


def test_a_link_in_the_place_of_the_state_is_not_followed(tmp_path: Path) -> None:
    memory, watch = MemoryWatch(tmp_path / "kept"), watch_of(taught())
    memory.attached(watch)
    memory.detached(watch)
    path = tmp_path / "kept" / key_of(watch.replica)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    other = watch_of(Detector())
    memory.attached(other)
    assert other.detector.steps == 0


def test_state_is_saved_every_minute_without_waiting_for_the_disk(tmp_path: Path) -> None:
    memory, watch = MemoryWatch(tmp_path), watch_of(taught())
    memory.attached(watch)
    memory.tick(1)
    memory.tick(61_000_000_000)
    path = tmp_path / key_of(watch.replica)
    until = time.monotonic() + 10.0
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert json.loads(path.read_text())["steps"] == 900


def test_ack_reaches_the_watch_that_holds_the_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory, watch = MemoryWatch(None), watch_of(taught())
    heard = Heard(memory)
    memory.attached(watch)
    for step in steps(80, 26.0, first=900):
        watch.detector.observe(step)
    assert watch.detector.incident_open
    monkeypatch.setattr(ack, "discover_any", lambda pid: [watch.replica])
    claim = Claim(watch.replica.members[0].process.identity)
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.02):
            memory.tick(1)

    ticking = threading.Thread(target=tick)
    ticking.start()
    try:
        assert ack.run(SimpleNamespace(pid=os.getpid(), json=True)) == 0  # type: ignore[arg-type]
    finally:
        done.set()
        ticking.join()
        claim.close()
    found = json.loads(capsys.readouterr().out)["acknowledged"][0]
    assert found["shift"] == pytest.approx(0.3, abs=0.03)
    assert heard.of("acknowledged")[0]["shift"] == pytest.approx(found["shift"], abs=1e-4)
    assert not watch.detector.incident_open
    assert not [f for step in steps(300, 26.0, first=980) if (f := watch.detector.observe(step))]


def test_ack_without_a_watch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ack, "discover_any", lambda pid: [myself()])
    with pytest.raises(TargetRefused, match="no watch"):
        ack.run(SimpleNamespace(pid=os.getpid(), json=False))  # type: ignore[arg-type]
    assert not acknowledge.asked(myself().members[0].process.identity)


def test_an_answer_that_is_none_is_not_taken(tmp_path: Path) -> None:
    identity = myself().members[0].process.identity
    acknowledge.answer(identity, 0.5)
    path = next(tmp_path.rglob("*.acked"))
    for text in ("", "{", "[]", '{"shift": null}', "x" * 10_000):
        path.write_text(text)
        assert acknowledge.answered(identity) is None


def alert_of(firing: Any, number: int) -> Alert:
    return Alert(
        f"a{number}", firing.kind, firing.level, "vllm", 0, 0, firing.step, firing.onset_step, "t",
        firing.observed_ms, firing.expected_ms, firing.excess,
    )  # fmt: skip


def test_the_end_of_an_incident_is_told_once() -> None:
    incidents, watch = IncidentWatch(), watch_of(taught())
    heard = Heard(incidents)
    incidents.attached(watch)
    stream = [*steps(60, 30.0, first=900), *steps(200, 20.0, first=960)]
    for step in stream:
        firing = watch.detector.observe(step)
        alerts = []
        if firing is not None and (firing.opened or firing.escalated):
            if firing.opened:
                watch.onset_ns = step.start_ns
            alerts = [alert_of(firing, firing.step)]
        incidents.window(watch, Window([step]), alerts)
    recovered = heard.of("recovered")
    assert len(recovered) == 1
    assert recovered[0]["alert"] == "a900" and recovered[0]["level"] == "page"
    assert 960 < recovered[0]["step"] < 1010
    assert recovered[0]["seconds"] == pytest.approx((recovered[0]["step"] - 900) * 0.03, abs=0.1)
    assert recovered[0]["worst_excess"] == pytest.approx(0.5, abs=0.1)


def test_a_lasting_speed_up_is_told_as_the_new_norm() -> None:
    incidents, watch = IncidentWatch(), watch_of(taught())
    heard = Heard(incidents)
    incidents.attached(watch)
    for step in steps(600, 12.0, first=900):
        watch.detector.observe(step)
        incidents.window(watch, Window([step]), [])
    moved = 1.0
    for values in heard.of("rebased"):
        moved *= 1.0 + values["shift"]
    assert moved == pytest.approx(0.6, abs=0.05)


def test_check_is_told_what_an_earlier_watch_could_tell(tmp_path: Path) -> None:
    assert known_of(myself(), tmp_path) is None
    memory = MemoryWatch(tmp_path)
    watch = watch_of(taught())
    memory.attached(watch)
    memory.detached(watch)
    known = known_of(myself(), tmp_path)
    assert known is not None and known["steps"] == 900
    told = known["detectable"]
    assert 0.0 < told["evidence"] <= told["page"] < 0.5
    noisy = watch_of(Detector())
    for number, step in enumerate(steps(900, 20.0)):
        late_ns = number * 7919 % 11 * 1_500_000
        noisy.detector.observe(step._replace(end_ns=step.end_ns + late_ns))
    restored = tmp_path / key_of(myself())
    state = remember(noisy.detector)
    assert state is not None
    restored.write_text(json.dumps(state))
    again = known_of(myself(), tmp_path)
    assert again is not None and again["detectable"]["page"] > told["page"]
    restored.write_text("{")
    assert known_of(myself(), tmp_path) is None
