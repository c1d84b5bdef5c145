"""Requests followed by their changes alone, on a made-up scheduler: joined, they are what really happened."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latencyprism.agent.probe.vllm_compose import compose
from latencyprism.agent.probe.vllm_follow import MAX_TURNS, Follower, route_of
from latencyprism.agent.probe.vllm_sums import Sums
from latencyprism.records import NULL, ROUTES, Request, ring
from latencyprism.timeline.requests import RequestJoin

MS = 1_000_000
BUDGET, CHUNK = 48, 24
PLAIN = {"hooks": {"preempt": ()}, "request_key": "00"}


class Truth:
    """What a request really went through."""

    def __init__(self, name: str, prompt: int, wanted: int) -> None:
        self.request_id, self.num_prompt_tokens, self.wanted = name, prompt, wanted
        self.arrival_time = time.time()
        self.num_computed_tokens = 0
        self._output_token_ids: list[int] = []
        self.status = SimpleNamespace(name="RUNNING")
        self.token_steps: list[int] = []
        self.first_step: int | None = None
        self.preemptions = 0


class Engine:
    """Schedules at random within a token budget: chunks, preemption, requests left out, aborts."""

    def __init__(self, seed: int, *, sees_preemption: bool, leaves_out: bool) -> None:
        self.rng = random.Random(seed)
        self.requests: dict[str, Truth] = {}
        self.waiting: list[Truth] = []
        self.running: list[Truth] = []
        self.finished: set[str] = set()
        self.over: dict[str, Truth] = {}
        self.leaves_out = leaves_out
        config = {**PLAIN, "hooks": {"preempt": ()} if sees_preemption else {}}
        probe = SimpleNamespace(alive=True, emit=self.emit, nonce=1)
        self.follower = Follower(probe, config)
        self.join = RequestJoin("vllm", 0)
        self.number, self.now, self.updated = 0, 10 * MS, ring.STATE_EMPTY
        self.records: list[Request] = []
        self.ends: list[int] = []
        self.sums = Sums()
        self.kept = self.steady = 0

    def emit(self, kind: int, values: Iterable[int]) -> None:
        assert kind == ring.KIND_REQUEST
        words = tuple(values)
        assert all(type(word) is int for word in words) and len(words) <= ring.MAX_PAYLOAD_WORDS
        self.join.events(words + (0,) * (ring.MAX_PAYLOAD_WORDS - len(words)))

    def arrive(self, prompt: int, wanted: int) -> None:
        request = Truth(f"r{len(self.requests) + len(self.over)}-{self.number}", prompt, wanted)
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def end(self, request: Truth, how: str) -> None:
        request.status = SimpleNamespace(name=how)
        self.finished.add(request.request_id)
        self.over[request.request_id] = self.requests.pop(request.request_id)
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)

    def step(self) -> None:
        rng, left = self.rng, BUDGET
        tokens_of: dict[str, int] = {}
        ids, computed, outputs, new, resumed = [], [], [], [], set()
        for request in list(self.running):
            if self.leaves_out and rng.random() < 0.08:
                continue
            if rng.random() < 0.03:
                self.preempt(request)
                continue
            known = request.num_prompt_tokens + len(request._output_token_ids)
            tokens = min(known - request.num_computed_tokens, CHUNK, left)
            if tokens:
                tokens_of[request.request_id] = tokens
                left -= tokens
                ids.append(request.request_id)
                computed.append(request.num_computed_tokens)
                outputs.append(len(request._output_token_ids))
        for request in list(self.waiting):
            if left < 4 or len(self.running) >= 12 or request.request_id in self.skip_now:
                break
            cached = min(8, request.num_prompt_tokens - 1)
            request.num_computed_tokens = cached
            known = request.num_prompt_tokens + len(request._output_token_ids)
            tokens = min(known - cached, CHUNK, left)
            tokens_of[request.request_id] = tokens
            left -= tokens
            if request.first_step is None:
                request.first_step = self.number
                new.append(SimpleNamespace(req_id=request.request_id, num_computed_tokens=cached))
            else:
                resumed.add(request.request_id)
                ids.append(request.request_id)
                computed.append(cached)
                outputs.append(len(request._output_token_ids))
            self.waiting.remove(request)
            self.running.append(request)
        again = SimpleNamespace(
            req_ids=ids, num_computed_tokens=computed, num_output_tokens=outputs, resumed_req_ids=resumed
        )
        finished, self.finished = self.finished, set()
        scheduled = SimpleNamespace(
            num_scheduled_tokens=tokens_of, total_num_scheduled_tokens=sum(tokens_of.values()),
            scheduled_new_reqs=new, scheduled_cached_reqs=again, scheduled_spec_decode_tokens={},
            finished_req_ids=finished,
        )  # fmt: skip
        prefills: list[tuple[str, int, int, bool]] = []
        work = compose(scheduled, again, prefills)
        noted: list[tuple[str, int, int, bool]] = []
        running = len(self.running)
        context = self.sums.goes_on(scheduled, again, self.number, running)
        kept, without = (running, 0, running, 0, running, 0, context, 0, 0), 0
        if context < 0:
            kept, without = self.sums.compose(scheduled, again, self.number, running, self.requests, noted)
        self.steady += context >= 0
        calm = context >= 0 and self.follower.calm == running
        assert kept == work and sorted(noted) == sorted(prefills)
        self.kept += without is not None
        tokened = len(tokens_of) - (without or 0)
        start = self.now
        if not calm:  # else there is nothing to follow
            self.follower.follow(scheduled, self.number, start, self.updated, work, prefills, resumed)
        elif self.follower.log.words:
            self.follower.log.flush_when_due(self.number, False)
        self.finish_step(tokens_of, start)
        assert without is None or tokened == self.tokened

    skip_now: frozenset[str] = frozenset()

    def preempt(self, request: Truth) -> None:
        if self.follower.sees_preemption:
            self.follower.pause(request.request_id)
        self.sums.preempted(request)
        request.preemptions += 1
        request.num_computed_tokens = 0
        self.running.remove(request)
        self.waiting.insert(0, request)
        self.skip_now = frozenset({request.request_id})

    def finish_step(self, tokens_of: dict[str, int], start: int) -> None:
        self.now += self.rng.randrange(1, 40) * MS
        self.tokened = 0
        for name, tokens in tokens_of.items():
            request = self.requests[name]
            request.num_computed_tokens += tokens
            if request.num_computed_tokens >= request.num_prompt_tokens + len(request._output_token_ids):
                self.tokened += 1
                request._output_token_ids.append(1)
                request.token_steps.append(self.number)
                if len(request._output_token_ids) >= request.wanted:
                    self.end(request, "FINISHED_LENGTH_CAPPED")
        self.skip_now = frozenset()
        self.ends.append(self.now)
        self.join.step(self.number, start, self.now)
        self.updated = self.number
        self.number += 1
        self.now += MS
        self.records += self.join.ready(self.now, api=False)


def run(engine: Engine, arrivals: list[tuple[int, int]], abort_every: int = 0) -> None:
    engine.follower.adopt(SimpleNamespace(requests=engine.requests))
    pending = list(arrivals)
    for turn in range(5000):
        if pending and engine.rng.random() < 0.5:
            engine.arrive(*pending.pop())
        if abort_every and turn % abort_every == abort_every - 1 and engine.requests:
            engine.end(engine.rng.choice(list(engine.requests.values())), "FINISHED_ABORTED")
        engine.step()
        if not pending and not engine.requests and not engine.finished:
            break
    engine.step()


def check(engine: Engine, *, told_when_paused: bool = True) -> None:
    by_hash = {engine.follower.log.hashed(name): truth for name, truth in engine.over.items()}
    assert engine.join.in_flight == 0
    carried = [truth for truth in engine.over.values() if truth.first_step is not None]
    assert len(engine.records) >= len(carried)
    for record in engine.records:
        truth = by_hash[record.request]
        assert record.output_tokens == len(truth._output_token_ids)
        assert record.prompt_tokens == truth.num_prompt_tokens
        assert record.first_step == truth.first_step
        if told_when_paused:
            assert record.preempted == truth.preemptions
        if not truth.token_steps:
            assert record.ttft_ns is None and record.token_steps is None
            continue
        assert record.first_token_step == truth.token_steps[0]
        assert record.token_steps == len(truth.token_steps)
        assert record.finish_reason in ("length", "abort")
        if record.finish_reason == "length":
            assert record.last_step == truth.token_steps[-1]
        ends = [engine.ends[step] for step in truth.token_steps]
        gaps = [b - a for a, b in pairwise(ends)]
        assert record.max_itl_ns == (max(gaps) if gaps else None)
        if gaps:
            assert ends[truth.token_steps.index(record.slowest_step)] - ends[
                truth.token_steps.index(record.slowest_step) - 1
            ] == max(gaps)


ARRIVALS = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 30)), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), ARRIVALS, st.booleans(), st.sampled_from([0, 7, 23]))
def test_records_are_what_happened(
    seed: int, arrivals: list[tuple[int, int]], leaves_out: bool, abort_every: int
) -> None:
    engine = Engine(seed, sees_preemption=True, leaves_out=leaves_out)
    run(engine, arrivals, abort_every)
    check(engine)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), ARRIVALS)
def test_versions_that_do_not_tell_of_preemption(seed: int, arrivals: list[tuple[int, int]]) -> None:
    engine = Engine(seed, sees_preemption=False, leaves_out=True)
    run(engine, arrivals)
    check(engine, told_when_paused=False)


@pytest.mark.parametrize(
    ("request_id", "route"),
    [
        ("chatcmpl-8f2e-1a2b3c4d", "/v1/chat/completions"),
        ("cmpl-8f2e-0-1a2b3c4d", "/v1/completions"),
        ("3_cmpl-8f2e-0-1a2b3c4d", "/v1/completions"),  # one of several answers
        ("resp_8f2e_1-1a2b3c4d", "/v1/responses"),
        ("0_resp_8f2e", "/v1/responses"),
        ("embd-8f2e", None),
        ("my own-cmpl-8f2e", None),
        ("", None),
        (17, None),
    ],
)
def test_the_route_is_told_by_what_the_engine_puts_before_an_id(
    request_id: object, route: str | None
) -> None:
    place = route_of(request_id)
    assert (None if place == NULL else ROUTES[place]) == route


def test_requests_carry_their_route() -> None:
    engine = Engine(3, sees_preemption=True, leaves_out=False)
    engine.follower.adopt(SimpleNamespace(requests=engine.requests))
    for name in ("cmpl-1", "chatcmpl-2", "other-3"):
        request = engine.requests[name] = Truth(name, 20, 3)
        engine.waiting.append(request)
    for _ in range(30):
        engine.step()
    routes = {engine.follower.log.hashed(name): name for name in ("cmpl-1", "chatcmpl-2", "other-3")}
    assert {routes[record.request]: record.route for record in engine.records} == {
        "cmpl-1": "/v1/completions", "chatcmpl-2": "/v1/chat/completions", "other-3": None,
    }  # fmt: skip


def test_sums_are_kept_where_they_can_be() -> None:
    engine = Engine(5, sees_preemption=True, leaves_out=False)
    run(engine, [(20, 40)] * 12)
    assert engine.sums.trusted and engine.kept > 0.8 * engine.number
    assert engine.steady > 0.25 * engine.number


def test_wrong_sums_are_noticed_and_not_used_again() -> None:
    engine = Engine(5, sees_preemption=True, leaves_out=False)
    engine.follower.adopt(SimpleNamespace(requests=engine.requests))
    for _ in range(3):
        engine.arrive(4, 400)
        engine.step()
    engine.sums.context += 1  # type: ignore[operator]
    engine.sums.check_at = 0
    with pytest.raises(RuntimeError):
        engine.step()
    assert not engine.sums.trusted
    for _ in range(5):
        engine.step()
    assert engine.sums.context is None and not engine.sums.held


def test_requests_before_the_probe_are_known_by_what_is_left_of_them() -> None:
    engine = Engine(3, sees_preemption=True, leaves_out=False)
    old = Truth("old", 10, 6)
    old.num_computed_tokens, old._output_token_ids, old.first_step = 14, [1, 1, 1, 1, 1], 0
    engine.requests["old"] = old
    engine.running.append(old)
    run(engine, [(5, 3)])
    record = next(r for r in engine.records if r.request == engine.follower.log.hashed("old"))
    assert (record.output_tokens, record.first_step, record.ttft_ns, record.max_itl_ns) == (
        6,
        None,
        None,
        None,
    )
    assert len(engine.records) == 2


@pytest.mark.parametrize("turns", [MAX_TURNS, MAX_TURNS + 1])
def test_a_scheme_of_turns_is_not_followed(turns: int) -> None:
    engine = Engine(1, sees_preemption=True, leaves_out=False)
    follower = engine.follower
    names = [f"r{n}" for n in range(turns + 4)]
    follower.flowing = set(names)
    scheduled = SimpleNamespace(num_scheduled_tokens=dict.fromkeys(names[turns:], 1), finished_req_ids=set())
    follower.follow(scheduled, 0, 0, 0, (4, 0, 4, 0, 4, 0, 0, 0, 0), [], ())
    assert follower.even is (turns <= MAX_TURNS)


class Untouched(list):  # type: ignore[type-arg]
    """A list that says so when somebody goes through it."""

    def __iter__(self) -> object:  # type: ignore[override]
        raise AssertionError("looked at single requests")

    index = count = __getitem__ = __contains__ = __iter__  # type: ignore[assignment]


def test_a_steady_step_looks_at_no_single_request() -> None:
    names = [f"r{number}" for number in range(256)]
    requests = {
        name: SimpleNamespace(num_prompt_tokens=10, num_computed_tokens=20, _output_token_ids=[1] * 10)
        for name in names
    }
    sums = Sums()

    def step(number: int, lists: type[list[int]]) -> tuple[tuple[int, ...], int | None]:
        again = SimpleNamespace(
            req_ids=lists(names), num_computed_tokens=lists([20 + number] * 256),
            num_output_tokens=lists([10 + number] * 256), resumed_req_ids=set(),
        )  # fmt: skip
        scheduled = SimpleNamespace(
            num_scheduled_tokens=dict.fromkeys(names, 1), total_num_scheduled_tokens=256,
            scheduled_new_reqs=[],
            scheduled_cached_reqs=again, scheduled_spec_decode_tokens={}, finished_req_ids=set(),
        )  # fmt: skip
        return sums.compose(scheduled, again, number, 256, requests, [])

    assert step(1, list) == ((256, 0, 256, 0, 256, 0, 256 * 22, 0, 0), None)
    for number in range(2, 40):
        assert step(number, Untouched) == ((256, 0, 256, 0, 256, 0, 256 * (21 + number), 0, 0), 0)
