"""A source of steps whose windows a test puts in."""

from __future__ import annotations

from collections.abc import Sequence

from latencyprism.records import Window


class Source:
    """``poll`` gives ``window`` once."""

    engine, lost = "vllm", 0

    def __init__(self, pids: Sequence[int]) -> None:
        self.pids = pids
        self.window = Window()

    def poll(self) -> Window:
        window, self.window = self.window, Window()
        return window

    def fileno(self) -> None:
        return None

    def close(self) -> None: ...
