from __future__ import annotations

from recorder_samples import alert, incident

from latencyprism.recorder import WhenToCapture
from latencyprism.records import Alert

S = 1_000_000_000


def an_alert(identity: str, onset: int = 10, level: str = "page", replica: int = 0) -> Alert:
    made = alert(incident(20).steps[-1], onset)
    made.id, made.level, made.replica = identity, level, replica
    return made


def test_one_capture_per_incident_however_many_alerts_it_raises() -> None:
    when = WhenToCapture(quiet_s=60)
    decisions = [when.on_alert(an_alert(f"a{i}", onset=10 + i), i * 30 * S) for i in range(10)]
    assert [d.capture for d in decisions] == [True] + [False] * 9
    assert {d.incident for d in decisions} == {"a0"}
    assert "captured already" in decisions[1].reason
    assert when.skipped == 9


def test_quiet_ends_an_incident_but_the_same_onset_continues_it() -> None:
    when = WhenToCapture(quiet_s=60)
    assert when.on_alert(an_alert("a", onset=10), 0).capture
    assert not when.on_alert(an_alert("b", onset=10), 500 * S).capture
    fresh = when.on_alert(an_alert("c", onset=99), 1000 * S)
    assert fresh.capture and fresh.incident == "c"


def test_replicas_have_incidents_of_their_own() -> None:
    when = WhenToCapture()
    assert when.on_alert(an_alert("a", replica=0), 0).capture
    assert when.on_alert(an_alert("b", replica=1), 1).capture


def test_the_hourly_allowance_holds_and_comes_back() -> None:
    when = WhenToCapture(quiet_s=1, per_hour=3)
    taken = [when.on_alert(an_alert(f"a{i}", onset=i), i * 10 * S).capture for i in range(5)]
    assert taken == [True, True, True, False, False]
    assert when.on_alert(an_alert("later", onset=77), 3700 * S).capture


def test_captures_of_incidents_that_follow_each_other_closely_lie_apart() -> None:
    when = WhenToCapture(quiet_s=1, apart_s=60)
    decisions = [when.on_alert(an_alert(f"a{i}", onset=i), i * 25 * S) for i in range(6)]
    assert [d.capture for d in decisions] == [True, False, False, True, False, False]
    assert "less than 60 s" in decisions[1].reason


def test_levels_not_asked_for_are_skipped_until_a_page_comes() -> None:
    when = WhenToCapture(levels=("page",), before_s=20, after_s=5)
    assert not when.on_alert(an_alert("a", level="evidence"), 100 * S).capture
    decision = when.on_alert(an_alert("b", level="page"), 101 * S)
    assert decision.capture
    assert (decision.since_ns, decision.until_ns) == (81 * S, 106 * S)
    assert decision.incident == "a"
