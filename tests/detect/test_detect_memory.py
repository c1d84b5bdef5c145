"""What a detector has learned can be kept and taken up; whatever else a file holds is refused."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from detect_streams import serving, steady
from hypothesis import given, settings
from hypothesis import strategies as st

from latencyprism.detect import Detector
from latencyprism.detect.memory import BIGGEST, remember, restore
from latencyprism.errors import BadInput


def taught() -> Detector:
    detector = Detector()
    for step in serving(((900, 8, 100, 60), (500, 24, 300, 60)), sd=0.02, seed=3):
        detector.observe(step)
    return detector


STATE: dict[str, Any] = json.loads(json.dumps(remember(taught())))


def test_a_restored_detector_expects_what_the_first_one_did() -> None:
    first, second = taught(), Detector()
    restore(second, STATE)
    for step in serving(((60, 24, 300, 60),), sd=0.02, seed=9):
        assert first.model.expect(step).ms == second.model.expect(step).ms  # type: ignore[union-attr]
    assert second.steps == first.steps


def test_a_restored_detector_pages_soon_and_does_not_begin_from_nothing() -> None:
    before = Detector()
    for step in steady(1500, sd=0.01, seed=1):
        before.observe(step)
    after = Detector()
    restore(after, json.loads(json.dumps(remember(before))))
    found = [f for step in steady(300, sd=0.01, seed=2, shift_at=60, shift=0.3) if (f := after.observe(step))]
    assert found and min(f.step for f in found) >= 60
    assert any(f.level == "page" and f.step < 110 for f in found)


def test_nothing_is_kept_of_a_young_stream_or_while_something_is_wrong() -> None:
    detector = Detector()
    assert remember(detector) is None
    for step in steady(1500, sd=0.01, shift_at=1300, shift=0.4):
        detector.observe(step)
    assert detector.incident_open and remember(detector) is None


def test_state_is_small() -> None:
    assert len(json.dumps(STATE)) < 200_000


@pytest.mark.parametrize("data", [None, 7, [], {}, {"version": 99}, {"version": 1}, "x"])
def test_what_is_no_state_is_refused(data: object) -> None:
    with pytest.raises(BadInput):
        restore(Detector(), data)


def _leaves(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else None
    if items is None:
        return [path]
    return [leaf for key, value in items for leaf in _leaves(value, (*path, key))]


LEAVES = _leaves(STATE)


@settings(max_examples=60, deadline=None)
@given(
    place=st.sampled_from(LEAVES),
    value=st.sampled_from([None, "", "nan", float("nan"), float("inf"), -1e300, BIGGEST * 10, [], {}, True]),
)
def test_one_bad_value_anywhere_changes_nothing(place: tuple[Any, ...], value: Any) -> None:
    data = copy.deepcopy(STATE)
    at = data
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    detector = Detector()
    model, noise = detector.model, detector.noise
    parts = (model.decode, model.mixed, model.prefill)
    with pytest.raises(BadInput):
        restore(detector, data)
    assert (model.decode, model.mixed, model.prefill) == parts
    assert detector.noise is noise and detector.steps == 0
