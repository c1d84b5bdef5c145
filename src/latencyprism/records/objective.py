"""Objective: how fast requests shall be, and what share of them may be slower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from latencyprism.records.request import Request

METRICS = ("ttft", "tpot", "itl", "e2e")
_COLUMN = {"ttft": "ttft_ns", "tpot": "tpot_ns", "itl": "max_itl_ns", "e2e": "e2e_ns"}


class Judged(NamedTuple):
    """``value_ns`` None: it violates for certain, though its value was never observed."""

    violated: bool
    value_ns: int | None


@dataclass(frozen=True, slots=True)
class Objective:
    """``share`` of the requests (0.99: all but one in a hundred) have a ``metric`` below ``limit_ns``, over
    ``period_s``. ``itl`` is the largest interval between two tokens of a request. ``model``, ``port``: the
    servers it holds for, None: any; ``route``: the requests, one of ``request.ROUTES``, None: all;
    ``tenant``: what a person calls those who use that port or route."""

    metric: str
    share: float
    limit_ns: int
    period_s: float
    model: str | None = None
    port: int | None = None
    tenant: str | None = None
    route: str | None = None

    @property
    def budget(self) -> float:
        """Share of requests that may violate."""
        return 1.0 - self.share

    @property
    def name(self) -> str:
        """As it is written in the file: ``ttft_p99``."""
        return f"{self.metric}_p{quantile_digits(self.share)}"

    @property
    def label(self) -> str:
        """A name that is its own in a file: ``ttft_p99``, ``ttft_p99@llama:8001``,
        ``ttft_p99@8001:/v1/completions``."""
        port = None if self.port is None else str(self.port)
        where = ":".join(part for part in (self.model, port, self.route) if part is not None)
        return f"{self.name}@{where}" if where else self.name

    def judge(self, request: Request) -> Judged | None:
        """None where it does not apply (a single token has no TPOT, another route) or was not observed, or is
        not sane."""
        if self.route is not None and request.route != self.route:
            return None
        value = getattr(request, _COLUMN[self.metric])
        if type(value) is int and value >= 0:
            return Judged(value > self.limit_ns, value)
        if value is None and self.metric == "ttft" and not request.output_tokens:
            # Given up before its first token: by then it had waited for as long as it lived.
            lived = request.e2e_ns
            if lived is not None and lived > self.limit_ns:
                return Judged(True, None)
        return None


def quantile_digits(share: float) -> str:
    """0.99 as ``99``, 0.999 as ``999``."""
    return f"{share * 100:.4f}".replace(".", "").rstrip("0").ljust(2, "0")
