"""One thread's ring, the writing side. The rules are those of ``records.ring``."""

# [cut
from latencyprism.agent.probe.prelude import allocate_lock
from latencyprism.records.ring import (
    CHECK_MASK,
    H_CHECKED,
    H_HEADS,
    H_SLOTS,
    HEADER_BYTES,
    MAX_PAYLOAD_WORDS,
    SLOT_WORDS,
)

# cut]


class Lane:
    """Where one thread writes. ``busy`` while it does: a signal handler may come in between."""

    __slots__ = ("barrier", "busy", "count", "first", "number", "slots", "words")

    def __init__(self, words, number):
        self.words, self.number = words, number
        self.slots = words[H_SLOTS]
        self.first = HEADER_BYTES // 8 + number * self.slots * SLOT_WORDS
        self.count = words[H_HEADS + number]
        self.busy = False
        self.barrier = None
        if words[H_CHECKED]:
            self.barrier = allocate_lock()
            self.barrier.acquire()

    def put(self, kind, values):
        """Write a record. TypeError, ValueError: a value is not fit; the slot is not published then."""
        words = self.words
        index = self.count
        first = at = self.first + (index % self.slots) * SLOT_WORDS
        words[at] = 2 * index + 1
        words[at + 1] = kind
        at += 2
        for value in values:
            if type(value) is not int:
                raise TypeError
            words[at] = value
            at += 1
        if self.barrier is not None:
            self.seal(first, at, 2 * index + 2 + kind + sum(values))
        words[first] = 2 * index + 2
        self.count = index + 1
        words[H_HEADS + self.number] = index + 1

    def seal(self, first, at, total):
        """What a checked ring needs besides: no stale words, the check word, and both visible before the
        head."""
        words, check = self.words, first + 2 + MAX_PAYLOAD_WORDS
        for rest in range(at, check):
            words[rest] = 0
        words[check] = total & CHECK_MASK
        self.barrier.release()
        self.barrier.acquire()
