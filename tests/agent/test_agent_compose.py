"""What a step is made of, worked out with built-in sums: the same as when every request is looked at."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from latencyprism.agent.probe import transformers
from latencyprism.agent.probe.vllm_compose import Lists, compose, count_outputs
from latencyprism.records.step import NULL


def one_by_one(scheduled: Any) -> tuple[tuple[int, ...], list[tuple[str, int, int]]]:
    """The plain form: a loop over all requests. Also (id, computed, tokens) of those that are prefills."""
    tokens_of = scheduled.num_scheduled_tokens
    prefill_requests = decode_requests = prefill_tokens = decode_tokens = 0
    cached_tokens = context_tokens = attention_work = draft_tokens = 0
    prefills = []
    for new in scheduled.scheduled_new_reqs:
        tokens = tokens_of[new.req_id]
        computed = new.num_computed_tokens
        cached_tokens += computed
        context_tokens += computed + tokens
        attention_work += tokens * (computed + tokens)
        prefill_tokens += tokens
        prefill_requests += 1
        prefills.append((new.req_id, computed, tokens))
    again = scheduled.scheduled_cached_reqs
    for request, computed, output in zip(again.req_ids, again.num_computed_tokens, again.num_output_tokens):
        tokens = tokens_of[request]
        context_tokens += computed + tokens
        if output and tokens == 1 and request not in again.resumed_req_ids:
            decode_requests += 1
            decode_tokens += 1
        elif (
            output
            and request in scheduled.scheduled_spec_decode_tokens
            and request not in again.resumed_req_ids
        ):
            decode_requests += 1
            decode_tokens += tokens
            draft_tokens += tokens - 1
        else:
            prefill_requests += 1
            prefill_tokens += tokens
            attention_work += tokens * (computed + tokens)
            prefills.append((request, computed, tokens))
            if request in again.resumed_req_ids:
                cached_tokens += computed
    return (
        prefill_requests + decode_requests, prefill_requests, decode_requests, prefill_tokens, decode_tokens,
        cached_tokens, context_tokens, attention_work, draft_tokens,
    ), prefills  # fmt: skip


KINDS = ("new", "decode", "chunk", "one-token chunk", "resumed", "recomputed chunk", "drafts", "padded new")
REQUEST = st.tuples(st.sampled_from(KINDS), st.integers(0, 5000), st.integers(2, 300), st.integers(1, 900))


def scheduler_output(requests: list[tuple[str, int, int, int]]) -> SimpleNamespace:
    """Requests as (kind, computed, tokens, outputs), in the shape of vLLM's SchedulerOutput."""
    tokens_of: dict[str, int] = {}
    drafts: dict[str, list[int]] = {}
    new, ids, computed_of, outputs_of, resumed = [], [], [], [], set()
    for number, (kind, computed, tokens, outputs) in enumerate(requests):
        name = f"r{number}"
        tokens_of[name] = 1 if kind in ("decode", "one-token chunk") else tokens
        if kind in ("new", "padded new"):
            new.append(SimpleNamespace(req_id=name, num_computed_tokens=computed))
        else:
            ids.append(name)
            computed_of.append(computed)
            outputs_of.append(0 if "chunk" in kind and kind != "recomputed chunk" else outputs)
        if kind == "resumed":
            resumed.add(name)
        if kind in ("drafts", "padded new"):
            drafts[name] = [-1] * (tokens - 1)
    return SimpleNamespace(
        num_scheduled_tokens=tokens_of,
        total_num_scheduled_tokens=sum(tokens_of.values()),
        scheduled_new_reqs=new,
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=ids,
            num_computed_tokens=computed_of,
            num_output_tokens=outputs_of,
            resumed_req_ids=resumed,
        ),
        scheduled_spec_decode_tokens=drafts,
    )


@settings(max_examples=500, deadline=None)
@given(st.lists(REQUEST, max_size=40))
@example([])
@example([("decode", 10, 2, 1)] * 256)
@example([("drafts", 10, 5, 1)] * 8 + [("recomputed chunk", 64, 100, 7)])
def test_sums_are_those_of_a_loop_over_all_requests(requests: list[tuple[str, int, int, int]]) -> None:
    scheduled = scheduler_output(requests)
    expected, prefills = one_by_one(scheduled)
    noted: list[tuple[str, int, int, bool]] = []
    assert compose(scheduled, scheduled.scheduled_cached_reqs, noted) == expected
    assert sorted(p[:3] for p in noted) == sorted(prefills)
    assert {p[0] for p in noted if p[3]} == {new.req_id for new in scheduled.scheduled_new_reqs}


@settings(max_examples=200, deadline=None)
@given(st.lists(REQUEST, max_size=20), st.sampled_from(["objects", "lists"]))
def test_older_layouts_say_the_same(requests: list[tuple[str, int, int, int]], layout: str) -> None:
    scheduled = scheduler_output(requests)
    again = scheduled.scheduled_cached_reqs
    resumed = [name in again.resumed_req_ids for name in again.req_ids]
    # There a request has output once its prompt is computed.
    known = {
        name: SimpleNamespace(num_prompt_tokens=computed if output else computed + 1)
        for name, computed, output in zip(again.req_ids, again.num_computed_tokens, again.num_output_tokens)
    }
    older = SimpleNamespace(
        req_ids=again.req_ids, num_computed_tokens=again.num_computed_tokens, resumed_from_preemption=resumed
    )
    if layout == "objects":
        older = [  # type: ignore[assignment]
            SimpleNamespace(req_id=name, num_computed_tokens=computed, resumed_from_preemption=flag)
            for name, computed, flag in zip(again.req_ids, again.num_computed_tokens, resumed)
        ]
    noted: list[tuple[str, int, int, bool]] = []
    assert compose(scheduled, Lists(layout, older, known), noted) == one_by_one(scheduled)[0]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=30))
def test_outputs_and_accepted_drafts(sampled: list[tuple[bool, int]]) -> None:
    """(has drafts, tokens it got); a request without drafts gets none or one."""
    tokens = [[7] * (got if drafts else min(got, 1)) for drafts, got in sampled]
    drafts = sum(drafts for drafts, _ in sampled)
    accepted = sum(max(len(t) - 1, 0) for (d, _), t in zip(sampled, tokens) if d)
    assert count_outputs(tokens, drafts) == (sum(map(len, tokens)), accepted if drafts else NULL)
    assert count_outputs([tuple(t) for t in tokens], 0)[0] == sum(map(len, tokens))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.integers(0, 4000), st.integers(0, 3), st.booleans()), max_size=40
    )
)
def test_transformers_sums_are_those_of_a_loop(batch: list[tuple[int, int, int, bool]]) -> None:
    futures = [
        SimpleNamespace(
            query_length=tokens,
            has_new_token=new_token,
            state=SimpleNamespace(position_offset=computed, generated_tokens=[0] * generated),
        )
        for tokens, computed, generated, new_token in batch
    ]
    prefills = [place for place, entry in enumerate(batch) if entry[2] == 0]
    prefill_tokens = sum(batch[place][0] for place in prefills)
    expected = (
        len(batch), len(prefills), len(batch) - len(prefills),
        prefill_tokens, sum(entry[0] for entry in batch) - prefill_tokens,
        sum(entry[0] + entry[1] for entry in batch),
        sum(batch[place][0] * (batch[place][0] + batch[place][1]) for place in prefills),
        sum(entry[3] for entry in batch),
    )  # fmt: skip
    assert transformers.compose(futures) == (expected, prefills)
