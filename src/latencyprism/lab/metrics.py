"""A server's own counters: the Prometheus text format, reduced to one number per name."""

from __future__ import annotations

import re

_SAMPLE = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(\{.*\})?\s+(\S+)(?:\s+-?\d+)?$")


def parse(text: str) -> dict[str, float]:
    """Name to value, summed over label sets (replicas, ranks); buckets of histograms are left out.

    Lines that are no sample are passed over: a metric that is not there is a missing key, never zero.
    """
    totals: dict[str, float] = {}
    for line in text.splitlines():
        found = _SAMPLE.match(line)
        if not found or found[1].endswith("_bucket"):
            continue
        try:
            value = float(found[3])
        except ValueError:
            continue
        totals[found[1]] = totals.get(found[1], 0.0) + value
    return totals
