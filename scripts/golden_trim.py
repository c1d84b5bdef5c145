"""Makes a small capture without names of a machine out of one that scripts/golden_record.py recorded.

    .venv/bin/python scripts/golden_trim.py raw.pftrace tests/recorder/golden/vllm.pftrace

Kept is what lies between 4 s before the stop (`stopped_ns`) and 5.5 s after it, or as two more numbers
say, with the alerts of that stretch; calls of operators are kept of one step alone. Where a third number
is given, spans shorter than so many ms are left out, and those of threads other than the main ones. The
host's name, the version of the kernel, names of processes that are neither the engine's nor the
kernel's, control groups and paths are replaced by words that say what stood there, the key of the
requests' hashes by zeros. Numbers and times stay as they were recorded. The verdict is worked out again
from what was kept, with the stopped step as the onset.
"""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from latencyprism.recorder import Capture, read_capture, write_capture
from latencyprism.recorder.judgements import alert_from_dict
from latencyprism.records import Alert, Counter, Span
from latencyprism.records.operators import Operators
from latencyprism.sentinel.finish import finish

BEFORE_S, AFTER_S = 4.0, 5.5
STEPS_WITH_OPERATORS = 1
MOST_BYTES = 300_000
_PATH = re.compile(r"(?<![\w.])/[\w.-]+/[^\s'\"]*")
_PLAIN = re.compile(
    r"(swapper|kworker|ksoftirqd|migration|rcu|python|vllm|llama|pt_|Thread|EngineCore|Worker|timer|sched|irq|virtio)",
    re.IGNORECASE,
)
_AFTER = re.compile(r"run-queue \(after (\d+) (.*)\)")


class Neutral:
    """Replaces words. ``own``: pids of the engine, whose names tell nothing about a machine."""

    def __init__(self, host: str, own: set[int]) -> None:
        self._host, self._own = host, own
        self._others: dict[str, str] = {}

    def word(self, text: str) -> str:
        text = _PATH.sub("(path)", text)
        return text.replace(self._host, "(host)") if self._host else text

    def name(self, pid: int, text: str) -> str:
        """Of a process: kept where it is the engine's, the kernel's, or an interpreter's."""
        if pid in self._own or _PLAIN.match(text):
            return self.word(text)
        return self._others.setdefault(text, f"other{len(self._others)}")

    def span(self, span: Span) -> Span:
        name, after = self.word(span.name), _AFTER.fullmatch(span.name)
        if after:
            name = f"run-queue (after {after[1]} {self.name(int(after[1]), after[2])})"
        pids = dict(span.details)
        details = []
        for key, value in span.details:
            if key.endswith("_comm"):
                value = self.name(int(pids.get(key.removesuffix("_comm"), 0)), str(value))
            details.append((key, self.word(value) if isinstance(value, str) else value))
        return span._replace(track=tuple(map(self.word, span.track)), name=name, details=tuple(details))

    def counter(self, counter: Counter) -> Counter:
        track = counter.track
        if track and track[0].startswith("neighbour "):
            return counter._replace(
                track=(track[0], self.name(int(track[0].split()[1]), track[1]), "(group)")
            )
        return counter._replace(track=tuple(map(self.word, track)))

    def any(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.word(value)
        if isinstance(value, dict):
            return {self.word(str(key)): self.any(entry) for key, entry in value.items()}
        return [self.any(entry) for entry in value] if isinstance(value, list) else value


def trimmed(capture: Capture, before_s: float, after_s: float) -> Capture:
    at_ns = capture.meta["stopped_ns"]
    stopped = next(step for step in capture.steps if step.start_ns < at_ns < step.end_ns)
    since_ns, until_ns = stopped.start_ns - int(before_s * 1e9), stopped.end_ns + int(after_s * 1e9)
    kept = [i for i, s in enumerate(capture.steps) if since_ns <= s.start_ns and s.end_ns <= until_ns]
    steps = [capture.steps[i] for i in kept]
    neutral = Neutral(str(capture.meta.get("host", "")), {int(pid) for pid in capture.meta["roles"]})
    alerts = _alerts(capture, stopped.step, steps[-1].step, neutral)
    meta = neutral.any(capture.meta)
    meta["versions"]["kernel"] = "(kernel)"
    meta.update(
        host="(host)",
        alert_ns=stopped.end_ns if alerts else None,
        onset_ns=stopped.start_ns,
        request_key="00" * 16 if meta.get("request_key") else None,
        trimmed="scripts/golden_trim.py",
    )
    known = capture.expected_ms or [None] * len(capture.steps)
    first, last = steps[0].step, steps[-1].step
    return Capture(
        meta=meta,
        steps=steps,
        spans=[neutral.span(s) for s in capture.spans if since_ns <= s.start_ns and s.end_ns <= until_ns],
        counters=[neutral.counter(c) for c in capture.counters if since_ns <= c.time_ns <= until_ns],
        requests=[r for r in capture.requests if r.last_step is not None and first <= r.last_step <= last],
        operators=_operators(capture.operators),
        alerts=alerts,
        expected_ms=[known[i] for i in kept],
    )


def _alerts(capture: Capture, stopped: int, last: int, neutral: Neutral) -> list[Alert]:
    found = [alert for alert in capture.alerts if stopped <= alert.step <= last]
    told = [neutral.any({**asdict(alert), "verdict": None, "capture": None}) for alert in found]
    return [alert_from_dict(entry) for entry in told]


def _operators(operators: list[Operators]) -> list[Operators]:
    """Of the first step that has any, of each thread."""
    kept = []
    for calls in operators:
        inside = calls.rows["step"] >= 0
        wanted = np.unique(calls.rows["step"][inside])[:STEPS_WITH_OPERATORS]
        rows = calls.rows[np.isin(calls.rows["step"], wanted)]
        kept.append(Operators(calls.track, calls.names, rows, calls.every))
    return kept


def _tells(span: Span, meta: dict[str, Any], least_ns: int) -> bool:
    """A stop always does; else it lasts, and is of a process's main thread or of what the engine calls."""
    mains = {*meta["roles"], *map(str, meta["loop_threads"])}
    main = span.track[0].rpartition(" ")[2] in mains
    return span.name == "off-CPU (stopped)" or (main and span.end_ns - span.start_ns >= least_ns)


def main() -> int:
    if len(sys.argv) not in (3, 5, 6):
        print("usage: golden_trim.py RAW FILE [BEFORE_S AFTER_S [LEAST_MS]]", file=sys.stderr)
        return 2
    before_s, after_s = map(float, sys.argv[3:5] or (BEFORE_S, AFTER_S))
    least_ns = int(float(sys.argv[5]) * 1e6) if len(sys.argv) == 6 else 0
    capture = trimmed(read_capture(sys.argv[1]), before_s, after_s)
    if least_ns:
        capture.spans = [span for span in capture.spans if _tells(span, capture.meta, least_ns)]
    size = write_capture(Path(sys.argv[2]), finish(capture))
    print(f"{sys.argv[2]}: {size} bytes")
    return 1 if size > MOST_BYTES else 0


if __name__ == "__main__":
    sys.exit(main())
