"""Step: the packed form holds every value and tells null from zero."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.records import PHASES, STEP_COLUMNS, STEP_DTYPE, Step
from latencyprism.records.step import pack_steps, unpack_steps

NULLABLE = st.none() | st.integers(-(2**62), 2**62)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    values: dict[str, object] = {name: draw(NULLABLE) for name in STEP_COLUMNS}
    values["engine"] = draw(st.sampled_from(["vllm", "llama.cpp", "transformers"]))
    values["phase"] = draw(st.none() | st.sampled_from(PHASES))
    values["kv_usage"] = draw(st.none() | st.floats(0, 1))
    for name in ("replica", "rank", "step", "start_ns", "end_ns"):
        values[name] = draw(st.integers(0, 2**62))
    return Step(**values)  # type: ignore[arg-type]


@given(st.lists(steps(), max_size=5))
def test_pack_and_unpack_are_inverse(given_steps: list[Step]) -> None:
    assert unpack_steps(pack_steps(given_steps)) == given_steps


def test_layout_has_no_padding_and_the_columns_in_order() -> None:
    assert STEP_DTYPE.names == STEP_COLUMNS
    assert STEP_DTYPE.itemsize == 16 + 8 * (len(STEP_COLUMNS) - 1)


def test_other_layout_is_refused() -> None:
    with pytest.raises(ValueError):
        unpack_steps(np.zeros(3, dtype=[("a", "<i8")]))
