"""The shield of a watch: control groups are files, so a thread of its own changes them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latencyprism.errors import PrismError
from latencyprism.slo.shield import Change, Shield, confine, raise_weight


class ShieldThread:
    """``plan`` and ``renew`` return at once; ``news`` tells what was done since the last call, as values of
    an event. Named ``neighbours`` are confined; where none is named, the engine's own group gets more
    weight."""

    def __init__(self, neighbours: Sequence[Path], *, dry_run: bool) -> None:
        self._neighbours = tuple(neighbours)
        self._dry_run = dry_run
        self._orders: queue.Queue[tuple[int, tuple[int, ...]] | str] = queue.Queue()
        self._news: queue.Queue[dict[str, Any]] = queue.Queue()
        self._shield = Shield()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def plan(self, pid: int, pids: Sequence[int]) -> None:
        """For the replica of engine process ``pid``; ``pids``: all of its processes."""
        self._orders.put((pid, tuple(pids)))

    def renew(self) -> None:
        """What holds goes on to hold."""
        if self._orders.empty():
            self._orders.put("renew")

    def news(self) -> list[dict[str, Any]]:
        found = []
        while not self._news.empty():
            found.append(self._news.get())
        return found

    def _work(self) -> None:
        while (order := self._orders.get()) != "end":
            if isinstance(order, str):
                if not self._shield.renew():
                    text = "the shield was put back: the watch was held up for longer than its lease"
                    self._news.put({"pid": None, "state": "taken back", "text": text})
                    return
                continue
            pid, pids = order
            try:
                self._change(pid, pids)
            except (PrismError, OSError, ValueError) as error:
                self._news.put({"pid": pid, "state": "refused", "text": str(error)})

    def _change(self, pid: int, pids: Sequence[int]) -> None:
        for change in self._changes(pid, pids):
            if not self._dry_run:
                self._shield.make(change)
            state, text = ("dry run", f"would set {change.text}") if self._dry_run else ("on", change.text)
            self._news.put({"pid": pid, "state": state, "text": text, "estimate": change.estimate})

    def _changes(self, pid: int, pids: Sequence[int]) -> list[Change]:
        if self._neighbours:
            return [confine(group, pids) for group in self._neighbours]
        return [raise_weight(pid)]

    def close(self) -> bool:
        """Everything is as it was when this returns; True if something had been changed."""
        self._orders.put("end")
        self._thread.join(10)
        held = bool(self._shield.made)
        self._shield.close()
        return held
