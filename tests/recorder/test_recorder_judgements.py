"""Alerts as JSON: every field of an alert is read back."""

from __future__ import annotations

from dataclasses import fields, replace

from recorder_samples import alert, incident

from latencyprism.recorder.judgements import alert_from_dict, alert_to_dict
from latencyprism.records import Alert


def test_every_field_of_an_alert_comes_back() -> None:
    told = replace(
        alert(incident(30, 15).steps[21], 15),
        where="execute",
        text="a sentence",
        capture="a.pftrace",
        verdict={"cause": "none"},
        detectable={"cpu": 1.5},
        machine={"steal_share": 0.25, "frequency_ratio": None, "explains": 0.5},
    )
    empty = [field.name for field in fields(Alert) if getattr(told, field.name) is None]
    assert empty == [], "a field that is new must be filled here, and read by alert_from_dict"
    assert alert_from_dict(alert_to_dict(told)) == told
