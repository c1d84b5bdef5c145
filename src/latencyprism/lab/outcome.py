"""What a load measured: requests, gaps between arrivals, and their summary."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from latencyprism.errors import BadInput
from latencyprism.lab.generate import Request

# One row for each arrival that brought tokens. time_ns: CLOCK_MONOTONIC when it was read; gap_ns: since the
# arrival before it in the same request (the ITL where events is 1), -1 for the first of a request; events:
# how many token events came at once. Events are not tokens: a server may hold back bytes of an unfinished
# character.
GAP = np.dtype([("time_ns", "<i8"), ("gap_ns", "<i8"), ("request", "<i8"), ("events", "<i8")])


@dataclass(frozen=True)
class Result:
    """``began_ns``..``ended_ns``: while requests were sent (CLOCK_MONOTONIC); ``gaps``: rows of ``GAP`` by
    time."""

    profile: str
    began_ns: int
    ended_ns: int
    requests: list[Request]
    gaps: npt.NDArray[np.void]

    @property
    def failures(self) -> list[Request]:
        return [request for request in self.requests if request.outcome == "failed"]

    def itl_ms(self, start_ns: int | None = None, end_ns: int | None = None) -> npt.NDArray[np.float64]:
        """Gaps between arrivals, ms, of those read within [start_ns, end_ns)."""
        rows = self.gaps[self.gaps["gap_ns"] >= 0]
        if start_ns is not None:
            rows = rows[rows["time_ns"] >= start_ns]
        if end_ns is not None:
            rows = rows[rows["time_ns"] < end_ns]
        return np.asarray(rows["gap_ns"], dtype=np.float64) / 1e6

    def summary(self) -> dict[str, Any]:
        """Counts, token sums of the requests that went well, and quantiles (ms); None where nothing was
        observed."""
        ok = [request for request in self.requests if request.outcome == "ok"]
        ttft = [(r.first_ns - r.due_ns) / 1e6 for r in ok if r.first_ns is not None]
        last_ns = max((r.end_ns for r in ok if r.end_ns is not None), default=None)
        output = sum(r.output_tokens or 0 for r in ok)
        seconds = (last_ns - self.began_ns) / 1e9 if last_ns is not None else None
        return {
            "requests": len(self.requests),
            "ok": len(ok),
            "failed": len(self.failures),
            "cut": sum(request.outcome == "cut" for request in self.requests),
            "why": sorted({request.why for request in self.failures}),
            "prompt_tokens": sum(r.prompt_tokens or 0 for r in ok),
            "output_tokens": output,
            "seconds": seconds,
            "tokens_per_s": output / seconds if seconds else None,
            "ttft_ms": _quantiles(np.asarray(ttft)),
            "itl_ms": _quantiles(self.itl_ms()),
        }

    def write(self, path: Path, gaps_path: Path | None = None) -> None:
        """JSON at ``path``; the gaps beside it as raw ``GAP`` rows (``gaps_path``)."""
        document = {
            "profile": self.profile,
            "began_ns": self.began_ns,
            "ended_ns": self.ended_ns,
            "summary": self.summary(),
            "requests": [request.as_dict() for request in self.requests],
        }
        if gaps_path is not None:
            self.gaps.tofile(gaps_path)
        path.write_text(json.dumps(document) + "\n")


def read(path: Path, gaps_path: Path | None = None) -> Result:
    """A result as ``Result.write`` left it; raises BadInput where the file is not one."""
    try:
        document = json.loads(path.read_text())
        requests = [Request(**row) for row in document["requests"]]
        gaps = np.fromfile(gaps_path, dtype=GAP) if gaps_path else np.empty(0, dtype=GAP)
        return Result(document["profile"], document["began_ns"], document["ended_ns"], requests, gaps)
    except (OSError, ValueError, KeyError, TypeError) as failure:
        raise BadInput(f"cannot read the load's result {path}", str(failure)) from failure


def _quantiles(values: npt.NDArray[np.float64]) -> dict[str, float] | None:
    if not len(values):
        return None
    p50, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(values.max())}
