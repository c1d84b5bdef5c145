"""How much memory a detector takes."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence

from latencyprism.detect import Detector
from latencyprism.records.step import Step


def model_bytes(steps: Sequence[Step]) -> int:
    """Of a detector that has seen these steps, with all that it holds (by ``sys.getsizeof``)."""
    detector = Detector()
    for step in steps:
        detector.observe(step)
    return _size(detector, set())


def _size(thing: object, seen: set[int]) -> int:
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    size = sys.getsizeof(thing)
    parts: list[object] = []
    if isinstance(thing, dict):
        parts = [*thing.keys(), *thing.values()]
    elif isinstance(thing, (list, tuple, set, deque)):
        parts = list(thing)
    elif not isinstance(thing, (str, bytes, int, float)):
        slots = {name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())}
        parts = [getattr(thing, name) for name in slots if hasattr(thing, name)]
        parts += list(getattr(thing, "__dict__", {}).values())
    return size + sum(_size(part, seen) for part in parts)
