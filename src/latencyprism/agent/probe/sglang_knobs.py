"""SGLang's one knob that shapes steps: ``chunked_prefill_size`` of the scheduler, which it reads for every
batch that it makes, with the rules of ``knobs``.

Only with mixed chunks, where a chunk's size is what a step may have, its decodes included: without them
prompts go before answers whatever their chunks are. Only with one rank: each rank makes the batches for
itself, and ranks that make other batches than each other wait for ever. How many may run is a setting of the
whole process, which is not touched. Runs inside the target.
"""

# [cut
from latencyprism.agent.probe.core import size
from latencyprism.agent.probe.knobs import LEAST_TOKENS, Knobs
from latencyprism.records.ring import H_KNOB_TOKENS_WAS

# cut]

CHUNK = "chunked_prefill_size"
LEAST_PAGES = 2
"""A chunk shorter than a page of the cache is never scheduled; one page may be lost to alignment."""


class ChunkKnobs(Knobs):
    """``joining``: requests of the batch in flight, which may be among those that decode in the next."""

    def __init__(self, probe):
        Knobs.__init__(self, probe)
        self.tokens, self.sequences = CHUNK, None
        self.page, self.joining = 1, 0

    def running(self, scheduler):
        return size(scheduler.running_batch.reqs) + self.joining

    def take(self, scheduler):
        self.restore()
        why = self.reason(scheduler)
        if why:
            self.probe.say("knobs left alone: " + why)
            return False
        self.page, whole = scheduler.page_size, getattr(scheduler, CHUNK)
        self.scheduler, self.was, self.now = scheduler, {CHUNK: whole}, {CHUNK: whole}
        self.words[H_KNOB_TOKENS_WAS] = whole
        return True

    def reason(self, scheduler):
        """Why they must not be touched here; empty: they may be."""
        chunk, page = getattr(scheduler, CHUNK, None), getattr(scheduler, "page_size", None)
        if not all(type(value) is int and value > 0 for value in (chunk, page)):
            return "the scheduler has no chunks, or none that we know"
        if getattr(scheduler, "tp_size", None) != 1 or getattr(scheduler, "pp_size", 1) != 1:
            return "each rank makes its batches for itself; ranks that differ would wait for ever"
        if getattr(scheduler, "is_mixed_chunk", None) is not True:
            return "without --enable-mixed-chunk prompts go before answers whatever their chunks are"
        aligned = getattr(scheduler, "truncation_align_size", None) is not None
        if aligned or getattr(scheduler, "dllm_config", None) is not None:
            return "chunks must keep to an alignment here"
        return ""

    def turn(self, name, asked, least):
        """Whole pages, more than what decodes take of them."""
        page = self.page
        least = max(least, least - LEAST_TOKENS + LEAST_PAGES * page)
        Knobs.turn(self, name, -(-asked // page) * page if asked > 0 else 0, -(-least // page) * page)
