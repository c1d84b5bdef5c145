"""Which container and pod a process belongs to, told by the paths of its control groups."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from latencyprism.host.held import read_once
from latencyprism.tomlfile import parse_toml

_LONG_HEX = re.compile(r"[0-9a-f]{32,}")
SHOWN = 12
"""Digits of an id that are shown; what the runtimes' own tools show."""
_MOST = 48


@dataclass(frozen=True, slots=True)
class Container:
    """``runtime``: docker, containerd, cri-o, podman, …; ``pod_uid`` and ``pod_class`` (guaranteed,
    burstable, besteffort) under Kubernetes, else None."""

    runtime: str
    container_id: str
    pod_uid: str | None = None
    pod_class: str | None = None

    @property
    def short(self) -> str:
        """``containerd 0123456789ab, pod 1a2b3c4d``."""
        of = self.container_id
        text = f"{self.runtime} {of[:SHOWN] if _LONG_HEX.match(of) else of}"
        return text + (f", pod {self.pod_uid[:8]}" if self.pod_uid else "")


@dataclass(frozen=True, slots=True)
class _Patterns:
    containers: tuple[tuple[str, re.Pattern[str]], ...]
    pods: tuple[re.Pattern[str], ...]
    classes: tuple[tuple[str, re.Pattern[str]], ...]


@cache
def _patterns() -> _Patterns:
    text = files("latencyprism.host").joinpath("containers.toml").read_text(encoding="utf-8")
    table = parse_toml(text, "the container patterns")
    return _Patterns(
        tuple((entry["runtime"], re.compile(entry["pattern"])) for entry in table["container"]),
        tuple(re.compile(entry["pattern"]) for entry in table["pod"]),
        tuple((entry["name"], re.compile(entry["pattern"])) for entry in table["class"]),
    )


def container_of_path(path: str) -> Container | None:
    """The container that a control group's path belongs to; None for none that is known."""
    known = _patterns()
    for runtime, pattern in known.containers:
        match = pattern.search(path)
        if match is None:
            continue
        pods = (found for each in known.pods if (found := each.search(path)) is not None)
        pod = next(pods, None)
        kind = next((name for name, each in known.classes if each.search(path)), None) if pod else None
        return Container(runtime, match["id"], pod["uid"].replace("_", "-") if pod else None, kind)
    return None


def group_paths(text: str) -> list[str]:
    """The paths in the text of /proc/PID/cgroup, longest first."""
    paths = {line.split(":", 2)[-1] for line in text.splitlines() if line.count(":") >= 2}
    return sorted(paths, key=lambda path: (-len(path), path))


def container_of(pid: int) -> Container | None:
    """The container of a process; None outside of one, or inside one that hides its path from itself (a
    control group namespace of its own shows ``/``)."""
    text = (read_once(f"/proc/{pid}/cgroup") or b"").decode("utf-8", "replace")
    found = (container_of_path(path) for path in group_paths(text))
    return next((container for container in found if container is not None), None)


def short_cgroup(path: str) -> str:
    """A control group's path as a person would name it, at most 48 characters: the container and pod, else
    the last part that says something, long ids cut."""
    container = container_of_path(path)
    if container is not None:
        return _cut(container.short)
    parts = [part for part in path.split("/") if part]
    if not parts:
        return path
    kept = [_LONG_HEX.sub(lambda match: match[0][:SHOWN], part) for part in parts]
    # A service or scope names itself; another group is told from its namesakes by its parent.
    telling = kept[-1:] if kept[-1].endswith((".service", ".scope")) else kept[-2:]
    return _cut("/".join(telling))


def _cut(text: str) -> str:
    return text if len(text) <= _MOST else f"{text[: _MOST // 2 - 1]}…{text[-_MOST // 2 :]}"
