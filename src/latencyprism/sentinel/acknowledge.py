"""How ``ack`` reaches a running watch: a file beside its lock, which only this user can write.

The watch looks for it twice a second or more, takes the present level as normal, and writes its answer over
it.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from latencyprism.attach.process import Identity
from latencyprism.sentinel.claim import claims_folder

LONGEST = 4096


def _path(identity: Identity, what: str) -> Path:
    return claims_folder() / f"{identity.pid}-{identity.start_ticks}.{what}"


def ask(identity: Identity) -> None:
    """Leave the request; an answer to an earlier one is dropped."""
    _path(identity, "acked").unlink(missing_ok=True)
    _path(identity, "ack").touch(mode=0o600)


def withdraw(identity: Identity) -> None:
    _path(identity, "ack").unlink(missing_ok=True)


def asked(identity: Identity) -> bool:
    """True once for each request. Asked for twice a second, so its folder is looked up but once."""
    try:
        os.unlink(_place(identity, os.environ.get("XDG_RUNTIME_DIR")))
    except FileNotFoundError:
        return False
    return True


@lru_cache(maxsize=256)
def _place(identity: Identity, base: str | None) -> str:
    """``base``: what the folder goes by."""
    return str(_path(identity, "ack"))


def answer(identity: Identity, shift: float) -> None:
    """``shift``: share by which expectations moved."""
    path = _path(identity, "acked")
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as out:
        json.dump({"shift": shift}, out)


def answered(identity: Identity) -> float | None:
    """The answer, once; None while there is none."""
    path = _path(identity, "acked")
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(LONGEST)
    except FileNotFoundError:
        return None
    try:
        shift = json.loads(text)["shift"]
        found = float(shift) if isinstance(shift, (int, float)) else None
    except (ValueError, TypeError, KeyError):
        return None  # half written: it comes
    with suppress(FileNotFoundError):
        path.unlink()
    return found
