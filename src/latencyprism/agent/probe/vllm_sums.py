"""The same sums as ``vllm_compose.compose``, kept from step to step: only requests that came, went or are in
their prompt are looked at, so the cost does not grow with the batch.

A request that stays has computed in this step what it had computed and was given in the last one. Wherever
that need not hold (drafts, requests that run and are left out), where the counts do not add up, and now and
then to make sure, the step is composed as a whole. Runs inside the target.
"""

# [cut
from latencyprism.agent.probe.vllm_compose import compose

# cut]

CHECK_STEPS = 64


class Sums:
    """``context``: sum of computed and scheduled tokens after the last step, None where that is not known;
    ``partial``: computed tokens of requests whose prompt goes on; ``held``: the engine's objects by id;
    ``steady``: how many requests there are where all of them decode, else -1."""

    def __init__(self):
        self.trusted = True
        self.context = None
        self.count = self.step = self.check_at = 0
        self.partial, self.held = {}, {}
        self.gone = self.gone_context = 0
        self.steady = -1

    def distrust(self):
        """What the engine says does not add up, or is no number: nothing is kept any more."""
        self.trusted = False
        self.context, self.steady = None, -1
        self.partial, self.held = {}, {}

    def preempted(self, request):
        """Before the engine forgets what it had computed."""
        self.steady = -1
        self.gone += 1
        self.gone_context += request.num_computed_tokens
        self.partial.pop(request.request_id, None)

    def goes_on(self, scheduled, again, step, running):
        """Context tokens of a step in which each of the same requests as before gets one more token; -1 where
        it is another step, or that is not certain."""
        if (
            len(scheduled.num_scheduled_tokens) == self.steady == running
            and scheduled.total_num_scheduled_tokens == running
            and self.step + 1 == step < self.check_at
            and not scheduled.scheduled_new_reqs
            and not scheduled.finished_req_ids
            and not again.resumed_req_ids
            and not scheduled.scheduled_spec_decode_tokens
        ):
            self.step = step
            self.context += running
            return self.context
        return -1

    def compose(self, scheduled, again, step, running, requests, prefills):
        """``compose``'s tuple, and how many of the requests get no token (None: not known). RuntimeError if
        the sums turn out wrong: they are not used again."""
        whole = not scheduled.scheduled_spec_decode_tokens and running == len(scheduled.num_scheduled_tokens)
        kept = None
        if whole and self.trusted and self.context is not None and step == self.step + 1:
            kept = self.from_changes(scheduled, again, requests)
        self.step = step
        self.gone = self.gone_context = 0
        self.steady = -1
        if kept is not None and step < self.check_at:
            prefills += kept[1]
            self.steady = -1 if self.partial else self.count
            return kept[0], len(self.partial)
        work = compose(scheduled, again, prefills)
        wrong = kept is not None and kept[0] != work
        self.trusted = self.trusted and not wrong
        if whole and self.trusted:
            self.seed(work, step, requests, prefills, kept is None)
        else:  # and nothing of the engine's is held on to
            self.context = None
            self.partial, self.held = {}, {}
        if wrong:
            raise RuntimeError
        return work, None

    def seed(self, work, step, requests, prefills, anew):
        self.context, self.count = work[6], work[0]
        self.check_at = step + CHECK_STEPS
        if anew:
            self.held = dict(requests)
            self.partial = {}
            for name, computed, tokens, _ in prefills:
                self.note(name, computed + tokens)
        self.steady = -1 if self.partial else self.count

    def note(self, name, computed):
        """Remember a prompt that is not computed to its end."""
        request = self.held.get(name)
        if request is None or computed < request.num_prompt_tokens + len(request._output_token_ids):
            self.partial[name] = computed

    def from_changes(self, scheduled, again, requests):
        """(what ``compose`` returns, what it appends to prefills), or None."""
        tokens_of, total = scheduled.num_scheduled_tokens, scheduled.total_num_scheduled_tokens
        context = self.context + total - self.gone_context
        expected = self.count - self.gone
        held, before = self.held, self.partial
        for name in scheduled.finished_req_ids:
            request = held.pop(name, None)
            before.pop(name, None)
            if request is not None and request.num_computed_tokens:
                context -= request.num_computed_tokens
                expected -= 1
        prefills = []
        cached_tokens = 0
        for new in scheduled.scheduled_new_reqs:
            name, computed = new.req_id, new.num_computed_tokens
            if name in requests:
                held[name] = requests[name]
            cached_tokens += computed
            prefills.append((name, computed, tokens_of[name], True))
        goes_on = []
        for name in again.resumed_req_ids:
            computed = again.num_computed_tokens[again.req_ids.index(name)]
            cached_tokens += computed
            goes_on.append((name, computed, tokens_of[name], False))
        expected += len(prefills) + len(goes_on)
        context += cached_tokens
        for name, computed in before.items():
            tokens = tokens_of.get(name)
            if tokens is None:
                return None
            # The last token of a prompt that is computed once more looks like any decode.
            if tokens != 1 or name not in held or not held[name]._output_token_ids:
                goes_on.append((name, computed, tokens, False))
        prefills += goes_on
        self.partial = {}
        prefill_tokens = attention_work = 0
        for name, computed, tokens, _ in prefills:
            prefill_tokens += tokens
            attention_work += tokens * (computed + tokens)
            self.note(name, computed + tokens)
        requests_now = len(tokens_of)
        decodes = requests_now - len(prefills)
        if requests_now != expected or total - prefill_tokens != decodes:
            return None
        self.context, self.count = context, requests_now
        work = (requests_now, len(prefills), decodes, prefill_tokens, decodes, cached_tokens, context)
        return (*work, attention_work, 0), prefills
