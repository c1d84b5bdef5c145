"""What an earlier watch has left of an engine: how much it saw, and what it could tell."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from latencyprism.detect import Detector
from latencyprism.detect.memory import restore
from latencyprism.engines.discovery import Replica
from latencyprism.errors import BadInput
from latencyprism.sentinel.memory_watch import key_of, read_state


def state_folder() -> Path:
    """Where watches of this user keep what they learned, unless told otherwise."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "latencyprism"


def known_of(replica: Replica, folder: Path) -> dict[str, Any] | None:
    """``steps`` and ``detectable`` as in an alert; None where nothing (that can be used) is kept."""
    detector = Detector()
    try:
        data = read_state(folder / key_of(replica))
        if data is None:
            return None
        restore(detector, data)
    except BadInput:
        return None
    return {"steps": detector.steps, "detectable": detector.detectable()}
