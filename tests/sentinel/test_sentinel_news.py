"""Which firings of one incident are told: the first, the rise to a page, and long stalls of their own."""

from __future__ import annotations

import pytest

from latencyprism.detect import Firing
from latencyprism.records import Step
from latencyprism.sentinel.replica_watch import ReplicaWatch

MS = 1_000_000


def told_before(level: str = "evidence", lost_ms: float = 40.0) -> ReplicaWatch:
    """A watch that told of incident 1 at second 1."""
    watch = object.__new__(ReplicaWatch)
    watch._alerted, watch._alerted_ns, watch._alerted_ms = (1, level), 1000 * MS, lost_ms
    return watch


def is_news(
    watch: ReplicaWatch, end_ms: int, observed_ms: float, level: str = "evidence", incident: int = 1
) -> bool:
    step = Step("vllm", 0, 0, 9, 0, end_ms * MS)
    firing = Firing(
        9, level, "stall", 9, observed_ms, 10.0, observed_ms / 10.0 - 1.0, incident, False, False, {}, 0.0, {}
    )
    return watch._is_news(step, firing)


@pytest.mark.parametrize(
    ("end_ms", "observed_ms", "level", "incident", "news"),
    [
        (1010, 12.0, "evidence", 2, True),
        (1010, 12.0, "evidence", 1, False),
        (1010, 12.0, "page", 1, True),
        (1010, 60.0, "evidence", 1, False),  # so soon, and hardly more than what was told
        (1501, 60.0, "evidence", 1, True),
        (1501, 34.0, "evidence", 1, False),  # too short a stall
        (1010, 95.0, "evidence", 1, True),  # twice as much was lost
    ],
)
def test_what_is_told_of_an_incident(
    end_ms: int, observed_ms: float, level: str, incident: int, news: bool
) -> None:
    assert is_news(told_before(), end_ms, observed_ms, level, incident) is news


def test_a_stall_soon_after_a_small_alert_is_told() -> None:
    assert is_news(told_before(lost_ms=4.0), 1020, 60.0)
    assert not is_news(told_before("page"), 1020, 12.0, "page")
