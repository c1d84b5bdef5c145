"""The probe's knobs on a made-up scheduler: bounded, on a lease, put back, and never where they do harm."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.agent import knobs as orders_module
from latencyprism.agent.assemble import READERS, assemble_source
from latencyprism.agent.knobs import KnobOrders
from latencyprism.agent.probe import knobs as knobs_module
from latencyprism.agent.probe.knobs import LEAST_TOKENS, Knobs

S = 1_000_000_000


class Setting:
    """Probe and watcher over one header, with a clock of their own."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch | None = None, config: Any = None, **scheduler: Any
    ) -> None:
        config = {} if config is None else config
        self.words = [0] * 64
        self.notices: list[str] = []
        self.now = S
        self.probe = SimpleNamespace(words=self.words, undo=[], say=self.notices.append)
        self.knobs = Knobs(self.probe)
        self.scheduler = SimpleNamespace(**{
            "max_num_scheduled_tokens": 1024, "max_num_running_reqs": 16, "running": [], "waiting": [],
            "scheduler_config": SimpleNamespace(enable_chunked_prefill=True, **config), **scheduler,
        })  # fmt: skip
        header = SimpleNamespace(header=self.words.__getitem__, set_header=self.words.__setitem__)
        self.orders = KnobOrders(SimpleNamespace(ring=header))  # type: ignore[arg-type]
        if monkeypatch is not None:
            monkeypatch.setattr(knobs_module, "now_ns", lambda: self.now)
            monkeypatch.setattr(orders_module.time, "monotonic_ns", lambda: self.now)

    def look(self, seconds: float = 0.0) -> tuple[int, int]:
        self.now += int(seconds * S)
        self.knobs.look(self.scheduler)
        return self.scheduler.max_num_scheduled_tokens, self.scheduler.max_num_running_reqs


def test_without_an_order_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Setting(monkeypatch)
    assert here.look(5) == (1024, 16) and here.knobs.scheduler is None
    assert here.orders.state().tokens is None and not here.orders.refused


def test_an_order_is_carried_out_and_released(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Setting(monkeypatch)
    number = here.orders.order(tokens=128, sequences=4)
    assert here.look() == (128, 4)
    state = here.orders.state()
    assert (state.tokens, state.tokens_was, state.sequences, state.sequences_was) == (128, 1024, 4, 16)
    assert state.done == number and not here.orders.refused
    here.orders.release()
    assert here.look(0.001) == (1024, 16)
    here.orders.renew()  # after a release there is nothing to renew
    assert here.look() == (1024, 16)


def test_it_ends_with_its_lease_and_comes_back_with_a_late_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Setting(monkeypatch)
    here.orders.order(tokens=128)
    assert here.look() == (128, 16)
    assert here.look(orders_module.LEASE_S - 0.1) == (128, 16)
    assert here.look(0.2) == (1024, 16)
    here.orders.renew()
    assert not here.orders.refused and here.look() == (128, 16)


def test_it_ends_with_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Setting(monkeypatch)
    here.orders.order(tokens=128, sequences=2)
    here.look()
    for undo in here.probe.undo:
        undo()
        undo()
    assert (here.scheduler.max_num_scheduled_tokens, here.scheduler.max_num_running_reqs) == (1024, 16)


def test_what_somebody_else_set_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Setting(monkeypatch)
    here.orders.order(tokens=128)
    here.look()
    here.scheduler.max_num_scheduled_tokens = 512
    here.orders.order(tokens=64)
    assert here.look() == (512, 16)
    here.orders.release()
    assert here.look(0.001) == (512, 16)


def test_where_slots_and_admission_are_two_numbers_the_slots_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from vLLM 0.32: lowering the slots below what admission lets in would end the engine."""
    here = Setting(monkeypatch, max_num_active_reqs=12)
    here.orders.order(tokens=128, sequences=4)
    assert here.look() == (128, 16) and here.scheduler.max_num_active_reqs == 4
    state = here.orders.state()
    assert (state.sequences, state.sequences_was) == (4, 12)
    here.orders.release()
    assert here.look(0.001) == (1024, 16) and here.scheduler.max_num_active_reqs == 12


@given(tokens=st.integers(1, 2**31 - 1), sequences=st.integers(1, 2**31 - 1), running=st.integers(0, 16))
def test_it_is_bounded(tokens: int, sequences: int, running: int) -> None:
    """Never above what the engine was started with, never below what runs."""
    here = Setting(running=[None] * running)
    here.orders.order(tokens=tokens, sequences=sequences)
    most_tokens, most_running = here.look()
    assert min(running + LEAST_TOKENS, 1024) <= most_tokens <= 1024
    assert max(running, 1) <= most_running <= 16


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        ({"scheduler_config": SimpleNamespace(enable_chunked_prefill=False)}, "chunked prefill"),
        ({"scheduler_config": None}, "chunked prefill"),
        ({"max_num_scheduled_tokens": None}, "none that we know"),
        ({"max_num_running_reqs": True}, "none that we know"),
        ({"num_spec_tokens": "3"}, "none that we know"),
        ({"max_num_encoder_input_tokens": 8}, "images"),
    ],
)
def test_where_it_would_do_harm_it_is_refused_and_said(
    scheduler: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Setting(monkeypatch, **scheduler)
    before = here.look()
    here.orders.order(tokens=64)
    assert here.look() == before
    assert here.orders.refused and said in here.notices[0]
    here.orders.renew()
    assert here.look(1) == before and len(here.notices) == 1


def prompt(tokens: int, computed: int = 0) -> SimpleNamespace:
    return SimpleNamespace(num_prompt_tokens=tokens, num_computed_tokens=computed)


def test_long_prompts_share_and_leave_room(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Setting(monkeypatch, {"long_prefill_token_threshold": 0})
    config = here.scheduler.scheduler_config
    here.scheduler.running = [prompt(50, 60), prompt(50, 70), prompt(1500, 400)]
    here.orders.order(tokens=100, room=16)
    assert here.look()[0] == 116
    assert config.long_prefill_token_threshold == 116 - 2 - 16  # one long prompt, two that decode
    here.scheduler.waiting = [prompt(12), prompt(900), prompt(900)]
    here.look()
    assert config.long_prefill_token_threshold == (116 - 2 - 16) // 3 == here.orders.state().prompt
    here.scheduler.running, here.scheduler.waiting = [prompt(50, 60)] * 3, []
    here.look()
    assert config.long_prefill_token_threshold == 0 and here.orders.state().prompt is None
    here.scheduler.waiting = [prompt(900)] * 500
    here.look()
    assert config.long_prefill_token_threshold == (116 - 3 - 16) // 8
    here.orders.release()
    assert here.look(0.001)[0] == 1024 and config.long_prefill_token_threshold == 0


def test_an_engine_with_a_limit_for_long_prompts_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Setting(monkeypatch, {"long_prefill_token_threshold": 40})
    config = here.scheduler.scheduler_config
    here.scheduler.running = [prompt(1500, 400)]
    here.orders.order(tokens=100, room=16)
    here.look()
    assert config.long_prefill_token_threshold == 40
    here.orders.order(tokens=30, room=16)
    here.look()
    assert config.long_prefill_token_threshold == 30
    assert here.look(9)[0] == 1024 and config.long_prefill_token_threshold == 40


def test_without_such_a_limit_in_the_engine_no_room_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Setting(monkeypatch)
    here.scheduler.running = [prompt(1500, 400)]
    here.orders.order(tokens=100, room=16)
    assert here.look()[0] == 100 and here.orders.state().prompt is None


def test_drafts_keep_their_room(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Setting(monkeypatch, num_spec_tokens=3, running=[None] * 10)
    here.orders.order(tokens=1)
    assert here.look()[0] == 10 * 4 + LEAST_TOKENS


def test_another_scheduler_gets_its_own_values(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Setting(monkeypatch)
    here.orders.order(tokens=128)
    here.look()
    first = here.scheduler
    here.scheduler = SimpleNamespace(**{**vars(first), "max_num_scheduled_tokens": 2048})
    assert here.look()[0] == 128 and first.max_num_scheduled_tokens == 1024
    here.orders.release()
    assert here.look(0.001)[0] == 2048


@pytest.mark.parametrize("value", [0, -1, 1 << 31])
def test_no_order_is_an_error(value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no order"):
        Setting(monkeypatch).orders.order(tokens=value)


@pytest.mark.parametrize("reader", READERS)
def test_parts_of_a_probe_do_not_take_each_others_names(reader: str) -> None:
    """They share one namespace inside the target: the later of two would win there, and in no unit test."""
    source = Path(knobs_module.__file__).with_name(f"{reader}.py").read_text(encoding="utf-8")
    names: Counter[str] = Counter()
    for node in ast.parse(assemble_source(source, {})).body:
        found = set()
        if isinstance(node, ast.Assign):
            found = {part.id for t in node.targets for part in ast.walk(t) if isinstance(part, ast.Name)}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found = {node.name}
        names.update(found)
    assert [name for name, times in names.items() if times > 1 and name != "NULL"] == []
