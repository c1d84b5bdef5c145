"""What `check` says about eBPF."""

from __future__ import annotations

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
