"""Two of vLLM's own knobs, turned down on the watcher's order and back again: most tokens of a step, most
sequences that run.

Only ever lowered: the engine's buffers are as large as it was started with. An order holds until a time of
its own, ends with the probe, and is taken back where nobody else has set the knob meanwhile. Values are set
between two calls of ``schedule`` in its own thread. Runs inside the target.
"""

# [cut
from latencyprism.agent.probe.prelude import now_ns
from latencyprism.records.ring import (
    H_KNOB_DONE,
    H_KNOB_ORDER,
    H_KNOB_SEQUENCES,
    H_KNOB_SEQUENCES_NOW,
    H_KNOB_SEQUENCES_WAS,
    H_KNOB_TOKENS,
    H_KNOB_TOKENS_NOW,
    H_KNOB_TOKENS_WAS,
    H_KNOB_UNTIL_NS,
)

# cut]

TOKENS, SEQUENCES = "max_num_scheduled_tokens", "max_num_running_reqs"
LEAST_TOKENS = 16
"""Tokens of a step that prompts keep beside one for each running sequence (more where it drafts)."""


class Knobs:
    """Call ``look`` after every ``schedule``: one read of memory as long as there is no order."""

    def __init__(self, probe):
        self.probe, self.words = probe, probe.words
        self.scheduler = None
        self.was, self.now = {}, {}
        self.each = 1
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
        running = len(scheduler.running)
        # A scheduler with more running than it may have stops at an assertion of its own.
        self.turn(TOKENS, words[H_KNOB_TOKENS], running * self.each + LEAST_TOKENS)
        self.turn(SEQUENCES, words[H_KNOB_SEQUENCES], max(running, 1))
        words[H_KNOB_TOKENS_NOW], words[H_KNOB_SEQUENCES_NOW] = self.now[TOKENS], self.now[SEQUENCES]
        words[H_KNOB_DONE] = order

    def take(self, scheduler):
        """Note what the knobs were. False: they must not be touched here."""
        self.restore()
        was = {name: getattr(scheduler, name, None) for name in (TOKENS, SEQUENCES)}
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
        self.scheduler, self.was, self.now, self.each = scheduler, was, dict(was), 1 + drafts
        self.words[H_KNOB_TOKENS_WAS], self.words[H_KNOB_SEQUENCES_WAS] = was[TOKENS], was[SEQUENCES]
        return True

    def turn(self, name, asked, least):
        was = self.was[name]
        value = min(was, max(asked, least)) if asked > 0 else was
        if value != self.now[name] and getattr(self.scheduler, name) == self.now[name]:
            setattr(self.scheduler, name, value)
            self.now[name] = value

    def restore(self):
        """As it was, unless somebody else has set it since. Idempotent."""
        scheduler, self.scheduler = self.scheduler, None
        if scheduler is None:
            return
        for name, was in self.was.items():
            if getattr(scheduler, name) == self.now[name]:
                setattr(scheduler, name, was)
        self.words[H_KNOB_TOKENS_NOW], self.words[H_KNOB_SEQUENCES_NOW] = (
            self.was[TOKENS],
            self.was[SEQUENCES],
        )
