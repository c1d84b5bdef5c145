"""A disturbance inside the target: getting the tenant in, and the lease on which it stays there."""

from __future__ import annotations

import os
import re
import secrets
import struct
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from latencyprism.agent.assemble import bootstrap, pack
from latencyprism.attach.inject import Injector
from latencyprism.attach.shared_folder import owner_of, shared_folder, sweep
from latencyprism.errors import TargetRefused

FILE_BYTES = 4096
FIRST_LEASE_S = 10.0
"""Until the process that renews it has started."""
_NONCE, _STATE, _LEASE_NS = 0, 1, 2
_SAY_AT, _SAY_BYTES = 256, 512
_LIVE = 1
_IN_S = 5.0
_CUT = re.compile(r"^# \[cut\n.*?^# cut\]\n", re.MULTILINE | re.DOTALL)


def text_of(part: str, config: Mapping[str, Any]) -> str:
    """Base, the cause's file ``part`` and the call that begins it, as Python 3.9 source; ``config``: plain
    literals."""
    folder = files("latencyprism.inject.tenant")
    parts = [_CUT.sub("", folder.joinpath(f"{name}.py").read_text("utf-8")) for name in ("base", part)]
    return "\n".join([*parts, f"begin({dict(config)!r}, harm)", ""])


class Tenancy:
    """One tenant in one process, from construction until its lease ends. ``descriptor``: the shared file, for
    the process that renews the lease. Raises TargetRefused where it cannot get in or has nothing to do."""

    def __init__(
        self, pid: int, part: str, share: float, options: Mapping[str, Any], now_ns: Callable[[], int]
    ):
        self.pid = pid
        self.nonce = secrets.randbits(62)
        injector = Injector(pid)
        folder, inside = shared_folder(pid)
        sweep(folder)
        name = f"lprism-{self.nonce:016x}"
        shared, source = folder / f"{name}.out", folder / f"{name}.py"
        config = {"file": f"{inside}/{name}.out", "nonce": self.nonce, "share": share, **options}
        self.descriptor = -1
        try:
            lease_ns = now_ns() + int(FIRST_LEASE_S * 1e9)
            head = struct.pack("3q", self.nonce, 0, lease_ns)
            self.descriptor = _create(shared, head.ljust(FILE_BYTES, b"\0"), pid)
            os.close(_create(source, pack(text_of(part, config)), pid))
            injector.run(bootstrap(f"{inside}/{name}.py"), lambda: self._word(_STATE) != 0, timeout_s=_IN_S)
            if self._word(_STATE) != _LIVE:
                raise TargetRefused(f"cannot disturb {pid} from within", self.said() or "it did not start")
        except BaseException:
            self.end()
            raise
        finally:
            shared.unlink(missing_ok=True)
            source.unlink(missing_ok=True)

    def _word(self, index: int) -> int:
        return int(struct.unpack("q", os.pread(self.descriptor, 8, 8 * index))[0])

    def said(self) -> str:
        raw = os.pread(self.descriptor, _SAY_BYTES, _SAY_AT)
        return raw.split(b"\0", 1)[0].decode("utf-8", "replace")

    def end(self) -> None:
        """Take the lease back; the tenant leaves within 50 ms. Harmless twice."""
        if self.descriptor >= 0:
            os.pwrite(self.descriptor, struct.pack("q", 0), 8 * _LEASE_NS)
            os.close(self.descriptor)
            self.descriptor = -1


def _create(path: Path, content: bytes, pid: int) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        if os.geteuid() == 0:
            os.fchown(descriptor, *owner_of(pid))
        os.write(descriptor, content)
    except BaseException:
        os.close(descriptor)
        path.unlink(missing_ok=True)
        raise
    return descriptor
