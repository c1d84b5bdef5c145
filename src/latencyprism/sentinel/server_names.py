"""By which model names and on which port a replica serves, as its command line tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from latencyprism.engines.discovery import Replica

_DEFAULT_PORTS = {"vllm": 8000, "sglang": 30000, "transformers": 8000, "llama.cpp": 8080}


class ServerNames(NamedTuple):
    models: frozenset[str]
    port: int | None


def server_names(replica: Replica) -> ServerNames:
    """Empty and None where the command line does not say."""
    member = next((m for m in replica.members if m.role == "api"), None) or replica.members[0]
    words = list(member.process.cmdline)
    names = set(_values(words, "--served-model-name"))
    given = _values(words, "--model") or _values(words, "--model-path")
    if "serve" in words and not given:
        given = [word for word in words[words.index("serve") + 1 :][:1] if not word.startswith("-")]
    if not names:
        names = set(given)
    port = next((int(text) for text in _values(words, "--port")[:1] if text.isdigit()), None)
    known = port if port is not None else _DEFAULT_PORTS.get(replica.engine)
    return ServerNames(frozenset(names), known)


def _values(words: Sequence[str], flag: str) -> list[str]:
    """What follows a flag, up to the next flag; also ``--flag=value``."""
    found: list[str] = []
    for place, word in enumerate(words):
        if word.startswith(flag + "="):
            found.append(word.partition("=")[2])
        elif word == flag:
            for value in words[place + 1 :]:
                if value.startswith("-"):
                    break
                found.append(value)
    return found
