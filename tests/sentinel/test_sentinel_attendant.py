"""What goes along with a watch is called, heard, and cannot end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from latencyprism.records import Window
from latencyprism.sentinel.attendant import Attendant, Attendants, Raised
from latencyprism.sentinel.replica_watch import ReplicaWatch

WATCH = cast(ReplicaWatch, object())


class Asks(Attendant):
    name = "asks"

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def attached(self, watch: ReplicaWatch) -> None:
        self.called.append("attached")
        self.emit("hello", text="here")

    def window(self, watch: ReplicaWatch, window: Window, alerts: Sequence[Any]) -> None:
        self.called.append("window")

    def tick(self, now_ns: int) -> list[Raised]:
        return [Raised(WATCH, capture="the test asks for it")]

    def close(self) -> None:
        self.called.append("close")


class Fails(Attendant):
    name = "fails"

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def tick(self, now_ns: int) -> list[Raised]:
        raise ZeroDivisionError("never mind")

    def close(self) -> None:
        self.closed = True


def test_one_that_fails_is_left_out_said_and_closed() -> None:
    told: list[str] = []
    events: list[tuple[str, dict[str, Any]]] = []
    asks, fails = Asks(), Fails()
    group = Attendants([fails, asks], lambda kind, **values: events.append((kind, values)), told.append)
    group.attached(WATCH)
    assert [raised.capture for raised in group.tick(0)] == ["the test asks for it"]
    assert len(group.tick(1)) == 1
    assert told == ["fails failed and is left out: ZeroDivisionError: never mind"]
    assert [kind for kind, _ in events] == ["hello", "notice"]
    group.close()
    assert fails.closed and asks.called == ["attached", "close"]


def test_empty_windows_are_not_handed_on() -> None:
    asks = Asks()
    group = Attendants([asks], lambda kind, **values: None, lambda text: None)
    group.window(WATCH, Window(), [])
    assert asks.called == []


def test_a_reader_that_went_away_ends_the_watch_as_ever() -> None:
    class Writes(Attendant):
        def tick(self, now_ns: int) -> list[Raised]:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Attendants([Writes()], lambda kind, **values: None, lambda text: None).tick(0)
