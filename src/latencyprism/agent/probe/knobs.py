"""Three of vLLM's own knobs, turned down on the watcher's order and back again: most tokens of a step, most
sequences that run, most tokens of one long prompt in a step.

Only ever lowered: the engine's buffers are as large as it was started with. An order holds until a time of
its own, ends with the probe, and is taken back where nobody else has set the knob meanwhile. Values are set
between two calls of ``schedule`` in its own thread. SGLang's knob is in ``sglang_knobs``. Runs inside the
target.
"""

# [cut
from latencyprism.agent.probe.prelude import now_ns
from latencyprism.records.ring import (
    H_KNOB_DONE,
    H_KNOB_ORDER,
    H_KNOB_PROMPT_NOW,
    H_KNOB_PROMPT_WAS,
    H_KNOB_ROOM,
    H_KNOB_SEQUENCES,
    H_KNOB_SEQUENCES_NOW,
    H_KNOB_SEQUENCES_WAS,
    H_KNOB_TOKENS,
    H_KNOB_TOKENS_NOW,
    H_KNOB_TOKENS_WAS,
    H_KNOB_UNTIL_NS,
)

# cut]

TOKENS = "max_num_scheduled_tokens"
SEQUENCES = ("max_num_active_reqs", "max_num_running_reqs")
"""The first that the scheduler has is the one it admits by. Where it has both, the second is the number of
its slots: lowered, an assertion of the scheduler's own would end the engine once more are running."""
LONG = "long_prefill_token_threshold"
LEAST_TOKENS, LEAST_PROMPT, WAITING_SEEN = 16, 4, 8
"""Tokens of a step that prompts keep beside one for each running sequence (more where it drafts)."""


class Knobs:
    """Call ``look`` after every ``schedule``: one read of memory as long as there is no order."""

    def __init__(self, probe):
        self.probe, self.words = probe, probe.words
        self.scheduler = None
        self.was, self.now, self.holders = {}, {}, {}
        self.tokens, self.sequences, self.each = TOKENS, SEQUENCES[-1], 1
        probe.undo.append(self.restore)

    def look(self, scheduler):
        words = self.words
        order = words[H_KNOB_ORDER]
        if not order:
            return
        if now_ns() > words[H_KNOB_UNTIL_NS]:
            self.restore()
            words[H_KNOB_ORDER] = 0
            return
        if self.scheduler is not scheduler and not self.take(scheduler):
            words[H_KNOB_DONE] = -order
            words[H_KNOB_ORDER] = 0
            return
        running = self.running(scheduler)
        room = words[H_KNOB_ROOM] if LONG in self.was else 0
        # A scheduler with more running than it may have stops at an assertion of its own.
        asked = words[H_KNOB_TOKENS]
        self.turn(self.tokens, asked + room if asked > 0 else 0, running * self.each + LEAST_TOKENS)
        if self.sequences in self.was:
            self.turn(self.sequences, words[H_KNOB_SEQUENCES], max(running, 1))
        if LONG in self.was:
            self.turn(LONG, self.share(scheduler, room) if room > 0 else 0, LEAST_PROMPT)
            words[H_KNOB_PROMPT_NOW] = self.now[LONG]
        words[H_KNOB_TOKENS_NOW], words[H_KNOB_SEQUENCES_NOW] = self.values(self.now)
        words[H_KNOB_DONE] = order

    def running(self, scheduler):
        return len(scheduler.running)

    def values(self, of):
        """Tokens and sequences of ``was`` or ``now``; 0: there is no such knob."""
        return of[self.tokens], of.get(self.sequences, 0)

    def share(self, scheduler, room):
        """What each long prompt may have of a step, so that all of them leave ``room``; 0: there is none."""
        long, prefilling = 0, 0
        for request in scheduler.running:
            left = request.num_prompt_tokens - request.num_computed_tokens
            prefilling += left > 0
            long += left > room
        for number, request in enumerate(scheduler.waiting):
            if number == WAITING_SEEN:
                break
            long += request.num_prompt_tokens > room
        decodes = (len(scheduler.running) - prefilling) * self.each
        return max((self.now[TOKENS] - decodes - room) // long, LEAST_PROMPT) if long else 0

    def take(self, scheduler):
        """Note what the knobs were. False: they must not be touched here."""
        self.restore()
        sequences = next((name for name in SEQUENCES if hasattr(scheduler, name)), SEQUENCES[-1])
        was = {name: getattr(scheduler, name, None) for name in (TOKENS, sequences)}
        config = getattr(scheduler, "scheduler_config", None)
        chunked = getattr(config, "enable_chunked_prefill", getattr(config, "chunked_prefill_enabled", None))
        drafts = getattr(scheduler, "num_spec_tokens", 0)
        if not all(type(value) is int and value > 0 for value in was.values()) or type(drafts) is not int:
            self.probe.say("knobs left alone: the scheduler has none that we know")
            return False
        if chunked is not True:
            self.probe.say("knobs left alone: without chunked prefill a long prompt would never be scheduled")
            return False
        if getattr(scheduler, "max_num_encoder_input_tokens", 0):
            self.probe.say("knobs left alone: images are not split into chunks")
            return False
        each_prompt = getattr(config, LONG, None)
        if type(each_prompt) is int and each_prompt >= 0 and hasattr(scheduler, "waiting"):
            was[LONG] = self.words[H_KNOB_PROMPT_WAS] = each_prompt
        self.holders = {LONG: config}
        self.scheduler, self.was, self.now, self.each = scheduler, was, dict(was), 1 + drafts
        self.sequences = sequences
        self.words[H_KNOB_TOKENS_WAS], self.words[H_KNOB_SEQUENCES_WAS] = self.values(was)
        return True

    def turn(self, name, asked, least):
        was, holder = self.was[name], self.holders.get(name, self.scheduler)
        value = max(asked, least) if asked > 0 else was
        if was > 0:  # 0: no limit
            value = min(value, was)
        if value != self.now[name] and getattr(holder, name) == self.now[name]:
            setattr(holder, name, value)
            self.now[name] = value

    def restore(self):
        """As it was, unless somebody else has set it since. Idempotent."""
        scheduler, self.scheduler = self.scheduler, None
        if scheduler is None:
            return
        for name, was in self.was.items():
            holder = self.holders.get(name, scheduler)
            if getattr(holder, name) == self.now[name]:
                setattr(holder, name, was)
        words = self.words
        words[H_KNOB_TOKENS_NOW], words[H_KNOB_SEQUENCES_NOW] = self.values(self.was)
        words[H_KNOB_PROMPT_NOW] = self.was.get(LONG, 0)
