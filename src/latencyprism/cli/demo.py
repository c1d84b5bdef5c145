"""Show what LatencyPrism does, on a real engine that the demonstration starts itself.

llama.cpp's server with a tiny random model serves realistic load over HTTP on loopback. Three acts: normal;
a workload surge, which must not alert; a real fault, which must. Ends with the cause and a report.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from latencyprism.bpf.features import conditions as bpf_conditions
from latencyprism.demo.acts import FAULT, Play, pin, play
from latencyprism.demo.show import Screen, main_verdict, verdict_text
from latencyprism.errors import BadInput, PrismError
from latencyprism.faces.report import write_report
from latencyprism.lab import serve
from latencyprism.lab.install import EngineName
from latencyprism.recorder.capture import Capture, read_capture

NAME = "demo"
HELP = "watch a real engine through three acts, on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, default=Path("out"), metavar="DIR", help="default: out")
    parser.add_argument("--engine", choices=("llama.cpp", "transformers", "vllm"), help="default: llama.cpp")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on standard output, nothing else"
    )


def run(args: argparse.Namespace) -> int:
    begun = time.monotonic()
    screen = Screen(quiet=args.json)
    engine: EngineName = args.engine or _engine(screen)
    folder: Path = args.output / time.strftime("demo-%Y%m%d-%H%M%S")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot use {folder}", error.strerror or str(error)) from None
    screen.say(f"starting {engine} with a tiny random model on loopback")
    with serve.start(engine) as server:
        pin(server)
        screen.say(f"{engine} serves as process {server.pid}; attaching to it while it runs")
        done = play(server, folder, screen.show)
    report = _report(done, folder)
    result = _result(engine, done, report, time.monotonic() - begun)
    if args.json:
        print(json.dumps(result))
    else:
        _tell(done, result)
    failed = result["alerts_normal"] or result["alerts_surge"] or not result["alerts_fault"]
    return 1 if failed else 0


def _engine(screen: Screen) -> EngineName:
    """llama.cpp where kernel probes are allowed, else an engine in Python, which needs only ptrace."""
    missing = [condition for condition in bpf_conditions() if not condition.ok]
    if not missing:
        return "llama.cpp"
    for condition in missing:
        screen.say(f"not available: {condition.name}: {condition.detail}. {condition.remedy}")
    screen.say("llama.cpp cannot be watched without kernel probes; Transformers is watched instead")
    return "transformers"


def _report(done: Play, folder: Path) -> Path:
    """The whole play as one page: the fault's capture for the verdict, the flight record for the picture."""
    pages = done.during("fault")
    verdict_of = next(
        (c for c in done.verdicts if c.alert in pages and c.result and c.result.get("path")), None
    )
    inside = read_capture(verdict_of.path) if verdict_of is not None else Capture()
    window = done.window
    whole = Capture(
        meta=inside.meta,
        steps=window.steps,
        spans=window.spans,
        counters=window.counters,
        alerts=[*pages, *(alert for _, alert in done.alerts if alert.level == "page" and alert not in pages)],
        verdict=inside.verdict,
        expected_ms=[done.expected.get(step.step) for step in window.steps],
    )
    path = folder / "report.html"
    write_report(
        path, whole, acts=done.acts,
        capture_path=verdict_of.path if verdict_of is not None else None,
    )  # fmt: skip
    return path


def _result(engine: str, done: Play, report: Path, seconds: float) -> dict[str, Any]:
    verdict = main_verdict(done)
    delays = sorted(alert.delay_ms for _, alert in done.alerts if alert.delay_ms is not None)
    ranking = [entry["cause"] for entry in verdict["ranking"]] if verdict else []
    captures = [c for c in done.verdicts if c.alert in done.during("fault")]
    return {
        "engine": engine,
        "steps": done.steps,
        "steps_true": done.steps_true,
        "lost": done.lost,
        "alerts_normal": len(done.during("normal")),
        "alerts_surge": len(done.during("surge")),
        "alerts_fault": len(done.during("fault")),
        "evidence_normal": len(done.during("normal", "evidence")),
        "evidence_surge": len(done.during("surge", "evidence")),
        "alert_delay_ms_p50": delays[len(delays) // 2] if delays else None,
        "alert_delay_ms_p99": delays[min(len(delays) - 1, int(len(delays) * 0.99))] if delays else None,
        "fault": FAULT,
        "fault_strength": done.strength,
        "fault_effect": done.effect.text if done.effect is not None else None,
        "cause": verdict["cause"] if verdict else None,
        "cause_rank": ranking.index(FAULT) + 1 if FAULT in ranking else None,
        "capture": str(captures[0].path) if captures else None,
        "report": str(report),
        "seconds": round(seconds, 1),
    }


def _tell(done: Play, result: dict[str, Any]) -> None:
    print()
    print(f"normal: {result['alerts_normal']} alerts   surge: {result['alerts_surge']} alerts   "
          f"fault: {result['alerts_fault']} alerts   steps seen {result['steps']}, "
          f"the engine's own count {result['steps_true']}")  # fmt: skip
    for line in verdict_text(done):
        print(line)
    if result["capture"]:
        print(f"capture {result['capture']}   open it at https://ui.perfetto.dev (it stays on your machine)")
        print(f"        or: latencyprism explain {result['capture']}")
    print(f"report  {result['report']}")
    if not result["alerts_fault"]:
        raise PrismError(
            "the fault raised no alert",
            f"the injection: {result['fault_effect'] or 'did not happen'}",
            "Run it again while the machine does nothing else.",
        )
