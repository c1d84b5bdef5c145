"""What this project does on a real accelerator, part by part: ``measure.py [OUTPUT_FOLDER]``.

Starts an engine of its own and looks at it. Each part is bounded and guarded: what fails is written down and
the next part runs. Writes ``gpu.json`` after every part, and prints what it does.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter as Tally
from collections.abc import Callable
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from gpu_engine import HERE, Child, Collector, quantile, step_times

from latencyprism.bpf.features import conditions, measure_probe
from latencyprism.bpf.prices import Prices, measure_calls
from latencyprism.errors import PrismError
from latencyprism.records import Step
from latencyprism.records.step import pack_steps
from latencyprism.xpu import kernels, symbols
from latencyprism.xpu.device import Telemetry
from latencyprism.xpu.nvidia import Nvidia
from latencyprism.xpu.runtime_calls import RuntimeProbe

OVERALL_S = 450.0
SHOWN = ("clock_mhz", "power_w", "temperature_c", "compute_utilisation", "memory_utilisation",
         "pcie_received_bytes_per_s", "pcie_sent_bytes_per_s", "memory_used_bytes")  # fmt: skip


class Bench:
    """The engine under test and everything that looks at it."""

    def __init__(self, folder: Path, shape: str, quick: bool) -> None:
        self.folder, self.shape, self.quick = folder, shape, quick
        self.result: dict[str, Any] = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self.engine: Child | None = None
        self.tenant: Child | None = None
        self.collector: Collector | None = None
        self.readings: list[Telemetry] = []
        self._stop = threading.Event()

    def part(self, name: str, action: Callable[[], dict[str, Any]]) -> None:
        begun = time.monotonic()
        print(f"== {name}", flush=True)
        try:
            found = action()
        except Exception as error:  # noqa: BLE001  the next part must run whatever this one met
            traceback.print_exc(file=sys.stdout)
            found = {"failed": f"{type(error).__name__}: {error}"[:1500]}
        found["seconds"] = round(time.monotonic() - begun, 1)
        self.result[name] = found
        print(json.dumps(found, default=str)[:3000], flush=True)
        self.write()

    def write(self) -> None:
        (self.folder / "gpu.json").write_text(json.dumps(self.result, indent=1, default=str))

    def close(self) -> None:
        self._stop.set()
        for each in (self.collector, self.tenant, self.engine):
            if each is not None:
                try:
                    each.close()
                except Exception:  # noqa: BLE001  the others must be closed too
                    traceback.print_exc(file=sys.stdout)

    # -- parts -----------------------------------------------------------------------------------

    def machine(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "python": platform.python_version(),
            "kernel": platform.release(),
            "cores": os.cpu_count(),
        }
        for name in ("torch", "transformers", "numpy", "nvidia-ml-py"):
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = None
        found["bpf"] = [[c.name, c.ok, c.detail] for c in conditions()]
        return found

    def start_engine(self) -> dict[str, Any]:
        """With CUDA graphs; without them where that fails, which is told."""
        seconds = "440" if not self.quick else "200"
        small = ("--slots", "4", "--new-tokens", "24", "--prompt-tokens", "24") if self.quick else ()
        why: str | None = None
        for more in ((), ("--no-graphs",)):
            self.engine = Child(
                "engine.py", "transformers", "serve", "--continuous-batching", "--shape", self.shape,
                "--seconds", seconds, *small, *more, log=self.folder / "engine.log",
            )  # fmt: skip
            try:
                ready = self.engine.wait_for("ready", 120)
            except RuntimeError as error:
                why = why or str(error)
                self.engine.close()
                continue
            time.sleep(1 if self.quick else 10)  # graphs of further sizes are captured on the way
            return {**ready, "failed_with_graphs": why}
        raise RuntimeError(why)

    def attach(self) -> dict[str, Any]:
        engine = self._engine()
        self.collector = collector = Collector(engine.pid)
        report = collector.source.attach_reports()[engine.pid]
        time.sleep(1.0)
        counted = []
        for _ in range(2):
            before = engine.order("pause")
            seen = len(collector.steps)
            engine.order("go")
            time.sleep(2 if self.quick else 6)
            after = engine.order("pause")
            counted.append([after["batches"] - before["batches"], len(collector.steps) - seen])
            engine.order("go")
        time.sleep(1)
        totals = collector.source.totals
        own = [ns / 1e3 for ns in totals.probe_self_ns]
        health = collector.source.health()[engine.pid]
        return {
            "engine": collector.replica.engine,
            "version": collector.replica.version,
            "warning": collector.source.warning,
            "attach_ms": collector.attach_ms,
            "route": report.route,
            "stop_us": report.stop_us,
            "held_us": report.held_us,
            "ack_ms": report.ack_ms,
            "batches_and_steps": counted,
            "exact": all(batches == steps > 0 for batches, steps in counted),
            "probe_us_p50": quantile(own, 0.5),
            "probe_us_p99": quantile(own, 0.99),
            "health": health,
            "times": step_times(list(collector.steps)),
            "collector_error": collector.error,
        }

    def telemetry(self) -> dict[str, Any]:
        vendor = Nvidia()
        device = vendor.devices()[0]
        begun = time.monotonic()
        reading = vendor.telemetry(device)
        took_ms = (time.monotonic() - begun) * 1e3
        users = vendor.processes(device)

        def sample() -> None:
            while not self._stop.is_set():
                self.readings.append(vendor.telemetry(device))
                time.sleep(0.1)

        threading.Thread(target=sample, daemon=True).start()
        time.sleep(2)
        return {
            "device": _plain(device),
            "reading": _plain(reading),
            "reading_took_ms": took_ms,
            "processes": [_plain(user) for user in users],
            "engine_listed": self._engine().pid in [user.pid for user in users],
            "after_2_s": _plain(self.readings[-1]) if self.readings else None,
        }

    def uprobes(self) -> dict[str, Any]:
        pid = self._engine().pid
        libraries = symbols.find_libraries(pid, ("launch", "graph", "copy", "wait", "matmul"))
        found: dict[str, Any] = {
            "libraries": [
                {
                    "name": each.library.name,
                    "path": os.path.basename(each.mapping.path),
                    "version": each.version,
                    "note": each.note,
                    "symbols": {symbol.name: symbol.prologue for symbol in each.symbols},
                }
                for each in libraries
            ]
        }
        try:
            found["empty_probe_ns"] = round(measure_probe()[0])
        except PrismError as error:
            found["refused"] = str(error)
            return found
        prices = Prices(measure_calls(pairs_only=True), {})
        found["pair_ns"] = {kind: price.pair_ns for kind, price in prices.calls.items()}
        for kinds in (("graph", "wait"), ("launch",), ("copy",), ("matmul",)):
            try:
                found[" and ".join(kinds)] = self._count(pid, kinds, prices)
            except PrismError as error:
                found[" and ".join(kinds)] = {"refused": str(error)}
        return found

    def _count(self, pid: int, kinds: tuple[str, ...], prices: Prices) -> dict[str, Any]:
        """Calls of each function in 3 s, their time, and what the probes did to the steps."""
        begun = time.monotonic()
        probe = RuntimeProbe(pid, kinds, prices=prices)
        attach_s = time.monotonic() - begun
        start, spans = time.monotonic_ns(), 0
        try:
            while time.monotonic_ns() - start < 3_000_000_000:
                spans += len(probe.spans({}))
                time.sleep(0.005)
                probe.look(time.monotonic_ns())
            end = time.monotonic_ns()
            totals, lost, share = probe.totals(), probe.lost, probe.cost_share
            given_up = list(probe.given_up)
        finally:
            begun = time.monotonic()
            probe.close()
        detach_s = time.monotonic() - begun
        time.sleep(3.0)
        return {
            "calls": [
                {**total._asdict(), "per_s": round(total.calls / ((end - start) / 1e9), 1)}
                for total in sorted(totals, key=lambda total: -total.calls)
                if total.calls
            ],
            "spans": spans,
            "lost": lost,
            "cost_share": share,
            "given_up": given_up,
            "attach_s": attach_s,
            "detach_s": detach_s,
            "steps_during": step_times(self._steps(start, end)),
            "steps_before": step_times(self._steps(start - 3_000_000_000, start - int(attach_s * 1e9))),
            "steps_after": step_times(self._steps(end + int(detach_s * 1e9), time.monotonic_ns())),
        }

    def kernels(self) -> dict[str, Any]:
        """Three captures in one process: the first pays for what the driver has to set up."""
        if self.collector is None:
            self.collector = Collector(self._engine().pid)
            time.sleep(3)
        found: dict[str, Any] = {}
        for number in range(1, 4):
            try:
                found[f"capture {number}"] = self._capture(self.collector)
            except PrismError as error:
                found[f"capture {number}"] = {"refused": str(error)}
                self._engine()  # it must have outlived the refusal
        return found

    def _capture(self, collector: Collector) -> dict[str, Any]:
        now = time.monotonic_ns()
        typical = step_times(self._steps(now - 3_000_000_000, now))
        window_s = min(0.5, max(0.02, 5 * (typical["p50_ms"] or 10) / 1e3))
        capture = kernels.capture_kernels(self._engine().pid, window_s, timeout_s=30)
        time.sleep(3)
        moments = capture.moments
        begin, end = moments["preparing"], moments["done"]
        hit = [s for s in list(collector.steps) if s.end_ns > begin and s.start_ns < end]
        return {
            "window_s": window_s,
            "framework": capture.framework,
            "moments_ms": {name: (at - begin) / 1e6 for name, at in moments.items()},
            "events": len(capture.events),
            "left_out": capture.left_out,
            "route": capture.attach.route,
            "normal": typical,
            "while_it_ran": step_times(hit),
            "slowest_ms": sorted((round(s.duration_ms, 1) for s in hit), reverse=True)[:6],
            "largest_pause_ms": _largest_pause_ms(hit),
            "after": step_times(self._steps(end, time.monotonic_ns())),
            "work": _kernel_work(capture, self._steps(moments["started"], moments["stopping"])),
        }

    def start_tenant(self) -> dict[str, Any]:
        self.tenant = Child("cotenant.py", log=self.folder / "cotenant.log")
        return self.tenant.wait_for("ready", 60)

    def contention(self) -> dict[str, Any]:
        tenant = self.tenant
        if tenant is None:
            raise RuntimeError("no co-tenant")
        found: dict[str, Any] = {}
        time.sleep(12)
        for kind in ("sm", "hbm", "pcie"):
            gone = self._attach_again()
            calm_ns = time.monotonic_ns() - 10_000_000_000
            found[kind] = self._contend(tenant, self._collector(), kind, calm_ns)
            found[kind] |= {"probe_was_gone": gone, "probe_gone_during": self._collector().error}
            time.sleep(10)
        return found

    def _attach_again(self) -> str | None:
        """Why the probe was gone, None if it was not; it is there again then, with steps to judge by."""
        gone = self._collector().error
        if gone is not None:
            self._collector().close()
            self.collector = Collector(self._engine().pid)
            time.sleep(12)
        return gone

    def _contend(self, tenant: Child, collector: Collector, kind: str, calm_ns: int) -> dict[str, Any]:
        assert tenant.process.stdin
        asked_ns = time.monotonic_ns()
        tenant.process.stdin.write(f"{kind} 10\n")
        begin = tenant.wait_for("begin", 30)["time_ns"]
        ended = tenant.wait_for("end", 40)
        end = ended["time_ns"]
        time.sleep(0.5)
        calm, busy = self._steps(calm_ns, asked_ns), self._steps(begin, end)
        before, during = step_times(calm), step_times(busy)
        firings = [f for f in list(collector.firings) if begin <= f[0] <= end + 500_000_000]
        false = [f for f in list(collector.firings) if calm_ns <= f[0] < asked_ns]
        ratio = None
        if before["p50_ms"] and during["p50_ms"]:
            ratio = during["p50_ms"] / before["p50_ms"]
        users = [_plain(user) for user in Nvidia().processes(Nvidia().devices()[0])]
        return {
            "before": before,
            "during": during,
            "p50_ratio": ratio,
            "tenant_per_s": ended["per_s"],
            "evidence_after_ms": _first(firings, begin, None),
            "page_after_ms": _first(firings, begin, "page"),
            "firings": len(firings),
            "firings_before": len(false),
            "pages_before": sum(f[2] == "page" for f in false),
            "excess": [round(f[4], 2) for f in firings[:5]],
            "telemetry_before": self._told(calm_ns, asked_ns),
            "telemetry_during": self._told(begin + 1_000_000_000, end),
            "tenant_listed": tenant.pid in [user["pid"] for user in users],
            "processes": users,
        }

    def command_line(self) -> dict[str, Any]:
        """The commands a person would use: check, and a watch that is disturbed once."""
        engine, tenant = self._engine(), self.tenant
        if self.collector is not None:
            self.collector.close()
            np.savez_compressed(self.folder / "steps.npz", steps=pack_steps(self.collector.steps))
            self.collector = None
        base = [sys.executable, "-m", "latencyprism"]
        check = subprocess.run([*base, "check", "--json"], capture_output=True, text=True, timeout=60)
        (self.folder / "check.json").write_text(check.stdout)
        log = self.folder / "watch.jsonl"
        seconds = 20 if self.quick else 45
        command = [
            *base,
            "watch",
            "-p",
            str(engine.pid),
            "--json",
            "--no-capture",
            "--duration",
            str(seconds),
        ]
        with log.open("w") as out, tempfile.TemporaryFile("w+") as errors:
            watch = subprocess.Popen(command, stdout=out, stderr=errors)
            time.sleep(seconds - 15)
            begin = tenant.order("sm 8", "begin")["time_ns"] if tenant is not None else None
            watch.wait(seconds + 30)
            errors.seek(0)
            said = errors.read()[-800:]
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        return {
            "check_rc": check.returncode,
            "check_stderr": check.stderr[-500:],
            "watch_rc": watch.returncode,
            "tenant_began_ns": begin,
            "events": dict(Tally(str(line.get("event")) for line in lines)),
            "alerts": [line for line in lines if line.get("event") == "alert"][:6],
            "last": lines[-1] if lines else None,
            "stderr": said,
        }

    # -- shared ----------------------------------------------------------------------------------

    def _engine(self) -> Child:
        if self.engine is None or self.engine.process.poll() is not None:
            raise RuntimeError("the engine does not run" + (f": {self.engine.tail()}" if self.engine else ""))
        return self.engine

    def _collector(self) -> Collector:
        if self.collector is None:
            raise RuntimeError("no probe is attached")
        return self.collector

    def _steps(self, start_ns: int, end_ns: int) -> list[Step]:
        # None where no probe is attached.
        return [] if self.collector is None else self.collector.between(start_ns, end_ns)

    def _told(self, start_ns: int, end_ns: int) -> dict[str, Any]:
        """Medians of the telemetry of a stretch, and every reason for throttling that was told."""
        mine = [reading for reading in list(self.readings) if start_ns <= reading.time_ns < end_ns]
        told: dict[str, Any] = {"readings": len(mine)}
        for name in SHOWN:
            values = [float(v) for r in mine if (v := getattr(r, name)) is not None]
            told[name] = quantile(values, 0.5)
        told["throttled"] = dict(Tally(word for reading in mine for word in reading.throttled or ()))
        return told


def _plain(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}


def _first(firings: list[tuple[int, int, str, str, float]], begin: int, level: str | None) -> float | None:
    times = [told for told, _, of, _, _ in firings if level in (None, of)]
    return (min(times) - begin) / 1e6 if times else None


def _largest_pause_ms(steps: list[Step]) -> float | None:
    gaps = [(b.start_ns - a.end_ns) / 1e6 for a, b in pairwise(steps)]
    return max(gaps, default=None)


def _kernel_work(capture: kernels.KernelCapture, steps: list[Step]) -> dict[str, Any]:
    """How the captured events lie within the steps that were whole inside the window."""
    device = [event for event in capture.events if event.device_kind != "CPU"]
    chosen = device or capture.events
    rows = []
    for step in steps:
        mine = [e for e in chosen if step.start_ns <= e.start_ns < step.end_ns]
        busy = sum(e.end_ns - e.start_ns for e in mine) / 1e6
        rows.append({"step_ms": step.duration_ms, "phase": step.phase, "events": len(mine), "busy_ms": busy})
    total: Tally[str] = Tally()
    for event in chosen:
        total[event.name[:60]] += event.end_ns - event.start_ns
    return {
        "kinds": dict(Tally(event.device_kind for event in capture.events)),
        "steps": rows[:12],
        "top_ms": {name: round(ns / 1e6, 3) for name, ns in total.most_common(8)},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=Path(os.environ.get("OUT", "gpu-result")))
    parser.add_argument("--shape", default="large")
    parser.add_argument("--quick", action="store_true", help="without a device: the parts that need none")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.folder, options.shape, options.quick)

    def give_up() -> None:
        print("== out of time", flush=True)
        bench.result["out_of_time"] = True
        bench.write()
        bench.close()
        os._exit(1)

    watchdog = threading.Timer(OVERALL_S, give_up)
    watchdog.daemon = True
    watchdog.start()
    os.environ["PYTHONPATH"] = f"{HERE.parents[1] / 'src'}:{os.environ.get('PYTHONPATH', '')}"
    try:
        bench.part("machine", bench.machine)
        bench.part("engine", bench.start_engine)
        bench.part("attach", bench.attach)
        if not options.quick:
            bench.part("telemetry", bench.telemetry)
        bench.part("uprobes", bench.uprobes)
        if not options.quick:
            bench.part("tenant", bench.start_tenant)
            bench.part("contention", bench.contention)
        bench.part("command line", bench.command_line)
        # The deepest comes last: what it may break was measured before.
        bench.part("kernels", bench.kernels)
    finally:
        bench.close()
        bench.write()
    print("== done", flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
