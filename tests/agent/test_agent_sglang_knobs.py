"""SGLang's knob on a made-up scheduler: where it is refused, and what bounds it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.agent.knobs import KnobOrders
from latencyprism.agent.probe.knobs import LEAST_TOKENS
from latencyprism.agent.probe.sglang_knobs import ChunkKnobs

WHOLE = 8192


class Setting:
    def __init__(self, running: int = 0, **scheduler: Any) -> None:
        self.words = [0] * 64
        self.notices: list[str] = []
        self.knobs = ChunkKnobs(SimpleNamespace(words=self.words, undo=[], say=self.notices.append))
        self.scheduler = SimpleNamespace(**{
            "chunked_prefill_size": WHOLE, "page_size": 1, "tp_size": 1, "pp_size": 1, "is_mixed_chunk": True,
            "running_batch": SimpleNamespace(reqs=[None] * running), **scheduler,
        })  # fmt: skip
        header = SimpleNamespace(header=self.words.__getitem__, set_header=self.words.__setitem__)
        self.orders = KnobOrders(SimpleNamespace(ring=header))  # type: ignore[arg-type]

    def look(self) -> int:
        self.knobs.look(self.scheduler)
        chunk = self.scheduler.chunked_prefill_size
        assert type(chunk) is int
        return chunk


def test_it_is_carried_out_and_taken_back() -> None:
    here = Setting()
    assert here.look() == WHOLE and here.knobs.scheduler is None
    here.orders.order(tokens=512, sequences=4, room=16)
    assert here.look() == 512  # no room is added where long prompts cannot be limited
    state = here.orders.state()
    assert (state.tokens, state.tokens_was, state.sequences, state.sequences_was) == (512, WHOLE, None, None)
    here.orders.release()
    assert here.look() == WHOLE
    here.orders.order(tokens=512)
    here.look()
    here.knobs.restore()
    assert here.scheduler.chunked_prefill_size == WHOLE


@given(
    tokens=st.integers(1, 2**31 - 1), running=st.integers(0, 64), joining=st.integers(0, 64),
    page=st.sampled_from([1, 16, 64]),
)  # fmt: skip
def test_it_is_bounded(tokens: int, running: int, joining: int, page: int) -> None:
    """Whole pages; never above what it was; decodes leave two pages and ``LEAST_TOKENS`` to prompts."""
    here = Setting(running, page_size=page)
    here.knobs.joining = joining
    here.orders.order(tokens=tokens)
    chunk = here.look()
    assert chunk % page == 0 and chunk <= WHOLE
    assert chunk - running - joining >= max(2 * page, LEAST_TOKENS)
    assert chunk == WHOLE or chunk >= min(tokens, WHOLE)


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        ({"chunked_prefill_size": None}, "no chunks"),
        ({"chunked_prefill_size": -1}, "no chunks"),
        ({"chunked_prefill_size": True}, "no chunks"),
        ({"page_size": None}, "none that we know"),
        ({"tp_size": 2}, "wait for ever"),
        ({"tp_size": None}, "wait for ever"),
        ({"pp_size": 2}, "wait for ever"),
        ({"is_mixed_chunk": False}, "--enable-mixed-chunk"),
        ({"truncation_align_size": 4096}, "alignment"),
        ({"dllm_config": object()}, "alignment"),
    ],
)
def test_where_it_would_do_harm_it_is_refused_and_said(scheduler: dict[str, Any], said: str) -> None:
    here = Setting(**scheduler)
    before = dict(vars(here.scheduler))
    here.orders.order(tokens=512)
    here.knobs.look(here.scheduler)
    assert vars(here.scheduler) == before
    assert here.orders.refused and said in here.notices[0]
    here.orders.renew()
    here.knobs.look(here.scheduler)
    assert vars(here.scheduler) == before and len(here.notices) == 1
