"""An engine that ends no step while requests wait is told of; a watch that was held up itself is not."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import pytest
from sentinel_stepping import Stepping, watch_of_this_process

from latencyprism.records import Window
from latencyprism.sentinel import replica_watch
from latencyprism.sentinel.replica_watch import ReplicaWatch
from latencyprism.sentinel.sinks import JsonLines
from latencyprism.sentinel.watcher import Watcher, WatchOptions


def told(watch: ReplicaWatch, seconds: float) -> list[dict[str, Any]]:
    """What a watch for so long says of it."""
    out = io.StringIO()
    watcher = Watcher(WatchOptions(duration_s=seconds, realtime=False), JsonLines(out))
    watcher.watches.append(watch)
    watcher.run()
    return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_watch, "SILENCE_MIN_S", 0.4)


def test_a_watch_that_was_held_up_tells_of_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watch_of_this_process()
    real, begun, held = watch.hand_on, time.monotonic(), []

    def hold_up(now_ns: int | None = None) -> Any:
        if not held and time.monotonic() - begun > 0.5:
            held.append(True)
            time.sleep(1.0)
        return real(now_ns)

    monkeypatch.setattr(watch, "hand_on", hold_up)
    lines = told(watch, 2.5)
    assert held and watch.counts.steps > 150
    assert [line for line in lines if line.get("kind") == "silence"] == []


def test_an_engine_that_falls_silent_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watch_of_this_process()
    source, begun = watch.attachment.source, time.monotonic()
    assert isinstance(source, Stepping)
    real = source.poll
    monkeypatch.setattr(source, "poll", lambda: real() if time.monotonic() - begun < 0.6 else Window())
    silences = [line for line in told(watch, 2.5) if line.get("kind") == "silence"]
    assert len(silences) == 1 and silences[0]["level"] == "page" and silences[0]["observed_ms"] >= 400.0
