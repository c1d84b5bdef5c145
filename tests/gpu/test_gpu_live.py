"""On a machine with an NVIDIA device: everything of ``measure.py`` once, and what it must have found.

``LATENCYPRISM_GPU_RESULT`` names a folder with the ``gpu.json`` of an earlier run: that is then judged.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from latencyprism.errors import PrismError
from latencyprism.xpu.nvidia import Nvidia

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(560)]
HERE = Path(__file__).parent


def why_not() -> str:
    if os.environ.get("LATENCYPRISM_GPU_RESULT"):
        return ""
    try:
        vendor = Nvidia()
        if not vendor.devices():
            return "no NVIDIA device"
    except PrismError as error:
        return str(error)
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    return f"not installed here: {', '.join(missing)}" if missing else ""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if why_not():
        pytest.skip(why_not())
    earlier = os.environ.get("LATENCYPRISM_GPU_RESULT")
    folder = Path(earlier) if earlier else tmp_path_factory.mktemp("gpu")
    if not earlier:
        subprocess.run([sys.executable, str(HERE / "measure.py"), str(folder)], timeout=520, check=False)
    found: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    return found


def part(result: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = result[name]
    assert "failed" not in found, found["failed"]
    return found


def test_the_engine_runs_on_the_device_with_graphs(result: dict[str, Any]) -> None:
    engine = part(result, "engine")
    assert engine["device"] == "cuda" and "True" in engine["cuda_graphs"] and engine["failed"] == 0


def test_every_turn_of_the_loop_is_a_step(result: dict[str, Any]) -> None:
    attach = part(result, "attach")
    assert attach["exact"], attach["batches_and_steps"]
    assert attach["health"]["lost"] == attach["health"]["errors"] == 0
    assert attach["probe_us_p50"] < 100


def test_telemetry_is_plausible_and_the_engine_is_on_the_device(result: dict[str, Any]) -> None:
    found = part(result, "telemetry")
    reading = found["after_2_s"]
    assert 100 <= reading["clock_mhz"] <= reading["clock_max_mhz"] <= 5000
    assert 20 < reading["power_w"] < 2000 and reading["power_w"] < 1.3 * reading["power_limit_w"]
    assert 10 < reading["temperature_c"] < 110
    assert 0 < reading["memory_used_bytes"] < reading["memory_total_bytes"]
    assert 0 <= reading["compute_utilisation"] <= 1
    assert reading["throttled"] is not None
    assert found["engine_listed"], found["processes"]


def test_launches_are_seen_by_uprobes(result: dict[str, Any]) -> None:
    found = part(result, "uprobes")
    if "refused" in found:
        pytest.skip(f"no uprobes on this machine: {found['refused']}")
    graphs, launches = found["graph and wait"], found["launch"]
    assert graphs["lost"] == launches["lost"] == 0
    assert any("GraphLaunch" in call["symbol"] for call in graphs["calls"]), graphs
    assert any("Launch" in call["symbol"] for call in launches["calls"]), launches


def test_a_late_capture_sees_kernels_with_device_time(result: dict[str, Any]) -> None:
    found = part(result, "kernels")
    for number in (1, 2, 3):
        capture = found[f"capture {number}"]
        assert capture["events"] > 0
        assert capture["work"]["kinds"].get("CUDA", 0) > 0
        whole = [row for row in capture["work"]["steps"] if row["events"]]
        assert whole and all(row["busy_ms"] > 0 for row in whole)


@pytest.mark.parametrize("kind", ["sm", "hbm"])
def test_a_co_tenant_pages(result: dict[str, Any], kind: str) -> None:
    found = part(result, "contention")[kind]
    assert found["p50_ratio"] > 1.1
    assert found["page_after_ms"] is not None and found["page_after_ms"] < 5000
    assert found["pages_before"] == 0
    assert found["tenant_listed"]


def test_the_watch_tells_of_a_co_tenant(result: dict[str, Any]) -> None:
    found = part(result, "command line")
    assert found["check_rc"] == 0 and found["watch_rc"] == 0
    begun = found["tenant_began_ns"]
    assert begun is not None and any(alert["level"] == "page" for alert in found["alerts"])
