"""What a step of vLLM V1 is made of, from the scheduler's output: counts, never contents.

Sums over requests are left to built-in functions and to vLLM's own totals; Python looks at single requests
only where they are no plain decodes. Runs inside the target.
"""

# isort: off
# [cut
from latencyprism.records.step import NULL

# cut]
# isort: on
from _operator import attrgetter, ge

NOTHING = []
PROMPT = attrgetter("num_prompt_tokens")
ID, COMPUTED = attrgetter("req_id"), attrgetter("num_computed_tokens")
RESUMED = attrgetter("resumed_from_preemption")


class Lists:
    """What older versions say of the requests that were scheduled before, in the newer one's words.
    ``num_output_tokens``: only whether there are any, that is, whether the prompt has been computed."""

    __slots__ = ("num_computed_tokens", "num_output_tokens", "req_ids", "resumed_req_ids")

    def __init__(self, layout, again, requests):
        if layout == "objects":
            self.req_ids = list(map(ID, again))
            self.num_computed_tokens = list(map(COMPUTED, again))
            resumed = list(map(RESUMED, again))
        else:
            self.req_ids = again.req_ids
            self.num_computed_tokens = again.num_computed_tokens
            resumed = again.resumed_from_preemption
        prompts = map(PROMPT, map(requests.__getitem__, self.req_ids))
        self.num_output_tokens = list(map(ge, self.num_computed_tokens, prompts))
        self.resumed_req_ids = ()
        if True in resumed:
            self.resumed_req_ids = {name for name, is_resumed in zip(self.req_ids, resumed) if is_resumed}


def compose(scheduled, again, prefills):
    """What a step is made of, from the scheduler's output alone: counts, never contents. ``again``: its
    scheduled_cached_reqs, as parallel lists.

    Returns (requests, prefill requests, decode requests, prefill tokens, decode tokens, cached tokens,
    context tokens, attention work, draft tokens); appends (request id, computed, tokens, begins) of each
    request that is no plain decode to ``prefills``."""
    tokens_of = scheduled.num_scheduled_tokens
    total = scheduled.total_num_scheduled_tokens
    requests = len(tokens_of)
    context_tokens = total + sum(again.num_computed_tokens)
    resumed = again.resumed_req_ids
    new_requests = scheduled.scheduled_new_reqs
    if total == requests and not new_requests and not resumed and all(again.num_output_tokens):
        return (requests, 0, requests, 0, requests, 0, context_tokens, 0, 0)
    prefill_tokens = cached_tokens = attention_work = 0
    for new in new_requests:
        tokens = tokens_of[new.req_id]
        computed = new.num_computed_tokens
        cached_tokens += computed
        context_tokens += computed
        attention_work += tokens * (computed + tokens)
        prefill_tokens += tokens
        prefills.append((new.req_id, computed, tokens, True))
    ids = again.req_ids
    places = unusual(
        again, tokens_of, scheduled.scheduled_spec_decode_tokens, total - prefill_tokens, new_requests
    )
    for place in places:
        request = ids[place]
        tokens = tokens_of[request]
        computed = again.num_computed_tokens[place]
        attention_work += tokens * (computed + tokens)
        prefill_tokens += tokens
        if request in resumed:
            cached_tokens += computed
        prefills.append((request, computed, tokens, False))
    decode_requests = len(ids) - len(places)
    decode_tokens = total - prefill_tokens
    return (
        len(new_requests) + len(ids), len(new_requests) + len(places), decode_requests,
        prefill_tokens, decode_tokens, cached_tokens, context_tokens, attention_work,
        decode_tokens - decode_requests,
    )  # fmt: skip


def unusual(again, tokens_of, drafts_of, tokens, new_requests):
    """Places in ``again`` of later chunks of prompts and of work recomputed after a preemption; ``tokens``:
    all that these requests were given."""
    ids = again.req_ids
    outputs = again.num_output_tokens
    places = set()
    if again.resumed_req_ids:
        places.update(place for place, request in enumerate(ids) if request in again.resumed_req_ids)
    place = -1
    for _ in range(outputs.count(0)):
        place = outputs.index(0, place + 1)
        places.add(place)
    # The others have one token each and their drafts on top; more is a later chunk of a recomputed prompt.
    excess = tokens - len(ids) - sum(tokens_of[ids[place]] - 1 for place in places)
    if excess and drafts_of:
        excess -= sum(map(tokens_of.__getitem__, drafts_of)) - len(drafts_of)
        prefilling = [ids[place] for place in places] + [new.req_id for new in new_requests]
        excess += sum(tokens_of[request] - 1 for request in prefilling if request in drafts_of)
    if excess:
        places.update(
            place for place, request in enumerate(ids) if tokens_of[request] != 1 and request not in drafts_of
        )
    return sorted(places)


def count_outputs(sampled, drafts):
    """(tokens that a step gave, of which accepted drafts). Without drafts no request gets more than one."""
    if not drafts:
        if sampled and type(sampled[0]) is list:
            return len(sampled) - sampled.count(NOTHING), NULL
        return sum(map(len, sampled)), NULL
    lengths = list(map(len, sampled))
    outputs = sum(lengths)
    return outputs, outputs - len(lengths) + lengths.count(0)
