"""What kinds of work that the model hardly knows have shown in calm steps, while those wait in quarantine."""

from __future__ import annotations

HALF, MOST = 4.0, 128
"""Calm steps of a kind after which half of the allowance for its being unfamiliar has given way to the error
that it has shown; kinds that are remembered."""


class Shown:
    """Mean residual by kind of work."""

    __slots__ = ("_kinds",)

    def __init__(self) -> None:
        self._kinds: dict[int, list[float]] = {}

    def narrow(self, kind: int, allowance: float) -> float:
        """An allowance for the unfamiliar, narrowed to the error that this kind has shown."""
        shown = self._kinds.get(kind)
        if shown is None:
            return allowance
        count, error = shown
        error = 0.0 if error < 0.0 else error if error < allowance else allowance
        return (error * count + allowance * HALF) / (count + HALF)

    def take(self, kind: int, residual: float) -> None:
        """One calm step."""
        shown = self._kinds.get(kind)
        if shown is None:
            if len(self._kinds) >= MOST:
                self._kinds.clear()
            shown = self._kinds[kind] = [0.0, 0.0]
        count = shown[0] = shown[0] + 1.0
        shown[1] += (residual - shown[1]) / count
