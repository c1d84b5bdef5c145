"""What happens to single requests, as few small events: added, first scheduled, tokens from this step on,
paused, ended. Nothing is written for a request that gets its token in a step like in the one before, so the
cost does not grow with the batch; the watcher knows when each step ended and fills in the rest.

Shared by the readers of engines whose loop is Python. Runs inside the target.
"""

# isort: off
# [cut
from latencyprism.agent.probe.lane import PLAIN, quick_put
from latencyprism.agent.probe.prelude import BROUGHT, now_ns, sys
from latencyprism.records.ring import KIND_REQUEST, REQUEST_EVENT_WORDS, REQUEST_EVENTS_PER_RECORD
from latencyprism.records.step import NULL

# cut]
# isort: on
import time

if "_blake2" not in sys.modules:
    BROUGHT.append("_blake2")
from _blake2 import blake2b  # isort: skip


FULL_WORDS = REQUEST_EVENT_WORDS * REQUEST_EVENTS_PER_RECORD
LATEST_STEPS = 16
LATEST_NS = 50_000_000


class RequestLog:
    """Collects events and writes them several to a record. An id leaves the process only as a keyed hash.
    ``tended``: somebody else sees to ``probe.tend``."""

    def __init__(self, probe, config, tended=False):
        self.tended = tended
        self.probe = probe
        self.key = bytes.fromhex(config.get("request_key", "")) or probe.nonce.to_bytes(8, "little")
        self.words = []
        self.names = {}
        self.puts = {}
        self.flushed_at = self.flushed_ns = 0

    def hashed(self, request_id):
        """63 bits that stand for a request id."""
        text = str(request_id).encode("utf-8", "surrogatepass")
        return int.from_bytes(blake2b(text, digest_size=8, key=self.key).digest(), "little") >> 1

    def forget(self, request_id):
        self.names.pop(request_id, None)

    def note(self, event, request_id, a=NULL, b=NULL, c=NULL, d=NULL):
        name = self.names.get(request_id)
        if name is None:
            name = self.names[request_id] = self.hashed(request_id)  # kept until ``forget``
        self.words += (event, name, a, b, c, d)

    def flush_when_due(self, step, idle):
        """Events name their steps, so they may come late: a full record at once, or when the engine rests.
        Not later than a forecast can use: where steps are long, with the next of them."""
        now = now_ns()
        late = step - self.flushed_at >= LATEST_STEPS or now - self.flushed_ns >= LATEST_NS
        if idle or late or len(self.words) >= FULL_WORDS:
            self.flushed_at, self.flushed_ns = step, now
            self.flush()

    def flush(self):
        """Write what was noted. Where the lease ends meanwhile, the rest is nobody's any more."""
        words, self.words = self.words, []
        plain = self.tended and PLAIN.issuperset(map(type, words))
        for at in range(0, len(words), FULL_WORDS):
            part = words[at : at + FULL_WORDS]
            part.insert(0, len(part) // REQUEST_EVENT_WORDS)
            if self.probe.alive:
                self.put_of(len(part))(part) if plain else self.probe.emit(KIND_REQUEST, part)

    def put_of(self, count):
        put = self.puts.get(count)
        if put is None:
            put = self.puts[count] = quick_put(self.probe, KIND_REQUEST, count)
        return put


def monotonic_of(epoch_s, now):
    """A time.time() reading as CLOCK_MONOTONIC ns, given the monotonic ``now``; NULL for no number."""
    if not isinstance(epoch_s, (int, float)):
        return NULL
    return now - (time.time_ns() - int(epoch_s * 1e9))
