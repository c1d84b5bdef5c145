"""What can be seen of a process, from outside and from within, before and after it was attached to.

From outside: descriptors, mapped files, threads, signal masks, tracer, memory that is used by nobody. From
within, by a short text that is run in it and keeps nothing: attributes of the observed classes, modules,
monitoring tools, callbacks of the collector, trace and profile functions, signal handlers, names in
``__main__``.
"""

from __future__ import annotations

import ast
import os
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .inject import Injector
from .maps import read_maps
from .memory import read_memory
from .process import status_fields
from .shared_folder import owner_of, shared_folder
from .slack import find_slots

# Run in the target in a namespace of its own; imports nothing that is not there already.
_LOOK = """
import sys
def look(owners):
    seen = {}
    for module, name in owners:
        owner = getattr(sys.modules.get(module), name, None)
        for key, value in (vars(owner).items() if isinstance(owner, type) else ()):
            seen['attribute %s.%s' % (name, key)] = id(value)
            code = getattr(value, '__code__', None)
            if code is not None:
                seen['code %s.%s' % (name, key)] = hash(code.co_code)
    for name in list(sys.modules):
        seen['module ' + name] = 1
    monitoring = getattr(sys, 'monitoring', None)
    for number in range(6) if monitoring else ():
        tool = monitoring.get_tool(number)
        seen['monitoring tool %d' % number] = tool
        seen['monitoring events %d' % number] = monitoring.get_events(number) if tool else 0
    gc = sys.modules.get('gc')
    seen['gc callbacks'] = [id(one) for one in gc.callbacks] if gc else []
    for name in ('gettrace', 'getprofile'):
        seen['sys.' + name] = id(getattr(sys, name)())
    for name in ('excepthook', 'unraisablehook', 'stdout', 'stderr', 'meta_path', 'path_hooks'):
        seen['sys.' + name] = id(getattr(sys, name, None))
    seen['switch interval'] = sys.getswitchinterval()
    signal = sys.modules.get('_signal')
    for number in range(1, 32) if signal else ():
        seen['signal handler %d' % number] = id(signal.getsignal(number))
    for name in vars(sys.modules['__main__']):
        seen['name in __main__: ' + name] = 1
    return seen
with open(ANSWER, 'w') as file:
    file.write(repr(look(OWNERS)))
    file.flush()
"""


@dataclass(frozen=True)
class Footprint:
    """``outside`` and ``inside``: what was seen, by its name in words; None inside where nothing was run."""

    outside: dict[str, object] = field(repr=False)
    inside: dict[str, object] | None = field(repr=False)

    def left_since(self, before: Footprint) -> list[str]:
        """In words, what is more, less or other than it was; empty when all is as before."""
        told = _differences(before.outside, self.outside)
        if before.inside is not None and self.inside is not None:
            told += _differences(before.inside, self.inside)
        return told

    def counts(self) -> dict[str, int]:
        """How many things of each kind were looked at."""
        names = [*self.outside, *(self.inside or ())]
        return dict(Counter(name.partition(" ")[0] for name in names))


def _differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    told = [f"{name}: new" for name in after if name not in before]
    told += [f"{name}: gone" for name in before if name not in after]
    return told + [f"{name}: changed" for name in before if name in after and before[name] != after[name]]


def from_outside(pid: int) -> dict[str, object]:
    """What the kernel tells of ``pid``. Memory that it allocates for itself changes by itself: left out."""
    seen: dict[str, object] = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            seen[f"descriptor {name}"] = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue
    maps = read_maps(pid)
    for mapping in maps:
        if mapping.inode:
            seen[f"mapping {mapping.path} {mapping.offset:x} {mapping.perms}"] = mapping.end - mapping.start
    status = status_fields(pid)
    for name in ("Threads", "TracerPid", "SigBlk", "SigIgn", "SigCgt", "SigPnd", "ShdPnd"):
        seen[f"status {name}"] = status.get(name)
    for slot in find_slots(pid, maps):
        seen[f"unused memory {slot.address:x}"] = any(read_memory(pid, slot.address, slot.size))
    return seen


def take(injector: Injector, owners: Sequence[tuple[str, str]], timeout_s: float = 3.0) -> Footprint:
    """Look from outside, then from within at the classes ``owners`` (module, class) and the interpreter.

    Raises TargetRefused as ``Injector.run``.
    """
    folder, inside = shared_folder(injector.pid)
    name = f"lprism-look-{secrets.token_hex(8)}"
    answer, script = folder / f"{name}.txt", folder / f"{name}.py"
    outside = from_outside(injector.pid)
    text = f"ANSWER, OWNERS = {f'{inside}/{name}.txt'!r}, {list(owners)!r}\n{_LOOK}"
    try:
        _create(answer, "", injector.pid)
        _create(script, text, injector.pid)
        run = f"try:\n exec(open({f'{inside}/{name}.py'!r}).read(),{{}})\nexcept BaseException:pass\n"
        injector.run(run, lambda: _whole(answer) is not None, timeout_s)
        return Footprint(outside, _whole(answer))
    finally:
        answer.unlink(missing_ok=True)
        script.unlink(missing_ok=True)


def _create(path: Path, text: str, pid: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        if os.geteuid() == 0:
            os.fchown(descriptor, *owner_of(pid))


def _whole(answer: Path) -> dict[str, object] | None:
    """The dictionary that the target wrote; None while it is not whole."""
    try:
        told = ast.literal_eval(answer.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return None
    return told if isinstance(told, dict) else None
