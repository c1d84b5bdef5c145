"""What `check` says about eBPF."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from latencyprism.bpf import kernel
from latencyprism.bpf.features import conditions, measure_probe
from latencyprism.errors import PrismError


def test_every_condition_that_fails_comes_with_a_remedy() -> None:
    found = conditions()
    assert len({condition.name for condition in found}) == len(found) >= 6
    for condition in found:
        assert condition.detail and condition.ok != bool(condition.remedy)


def test_a_refused_call_names_the_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: int, attribute: bytes) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(kernel, "_bpf", refuse)
    failed = [condition for condition in conditions() if not condition.ok]
    assert len(failed) >= 3
    assert all("CAP_BPF" in condition.remedy and "CAP_PERFMON" in condition.remedy for condition in failed)


def test_an_old_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: int, attribute: bytes) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(kernel, "_bpf", refuse)
    with pytest.raises(PrismError, match=r"Linux 5\.17"):
        kernel.map_create(kernel.MAP_RINGBUF, 0, 0, 4096)


@pytest.mark.bpf
@pytest.mark.root
def test_a_probe_has_a_price() -> None:
    cost_ns, hits = measure_probe()
    assert hits > 0 and 50 < cost_ns < 200_000


_TELL = """
import json
from dataclasses import asdict
from latencyprism.bpf.features import conditions
print(json.dumps([asdict(condition) for condition in conditions()]))
"""


def told_with(capabilities: str) -> dict[str, dict[str, object]]:
    """The conditions as a root process with these capabilities alone sees them."""
    command = ["setpriv", "--bounding-set", f"-all{capabilities}", "--inh-caps", "-all", sys.executable]
    done = subprocess.run([*command, "-c", _TELL], capture_output=True, text=True, timeout=60, check=True)
    return {condition["name"]: condition for condition in json.loads(done.stdout)}


@pytest.mark.bpf
@pytest.mark.root
@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv is not installed")
def test_three_capabilities_are_enough_and_none_are_not() -> None:
    enough = told_with(",+bpf,+perfmon,+sys_ptrace")
    for name in ("timed calls", "price of a probed call", "scheduler tracing, structure offsets right"):
        assert enough[name]["ok"], enough[name]
    none = told_with("")
    failed = [condition for condition in none.values() if not condition["ok"]]
    assert len(failed) >= 4 and all("CAP_BPF" in str(condition["remedy"]) for condition in failed)
