"""One thread's ring, the writing side. The rules are those of ``records.ring``."""

# [cut
from latencyprism.agent.probe.prelude import Struct, StructError, allocate_lock, get_ident, mmap
from latencyprism.records.ring import (
    CHECK_MASK,
    DECODE_GAP,
    DECODE_REQUESTS,
    H_CHECKED,
    H_HEADS,
    H_SLOTS,
    H_WAITING,
    H_WAKE_BASE_NS,
    H_WAKE_DECODE_NS,
    H_WAKE_GAP_NS,
    H_WAKE_LATE_NS,
    H_WAKE_PREFILL_NS,
    H_WAKE_SPARE_NS,
    H_WAKE_TYPICAL,
    HEADER_BYTES,
    KIND_DECODE,
    KIND_STEP,
    MAX_PAYLOAD_WORDS,
    SLOT_WORDS,
    STEP_DECODE,
    STEP_GAP,
    STEP_PREFILL,
    WAKE_EACH,
)

# cut]

PLAIN = {int}
PACKERS = {}
MADVISE_POPULATE_WRITE = 23  # Linux 5.14


class Lane:
    """Where one thread writes. ``busy`` while it does: a signal handler may come in between."""

    __slots__ = ("barrier", "busy", "count", "first", "map", "number", "slots", "words")

    def __init__(self, file, words, number):
        self.map, self.words, self.number = file, words, number
        self.slots = words[H_SLOTS]
        self.first = HEADER_BYTES // 8 + number * self.slots * SLOT_WORDS
        self.count = words[H_HEADS + number]
        self.busy = False
        self.barrier = None
        if words[H_CHECKED]:
            self.barrier = allocate_lock()
            self.barrier.acquire()

    def allocate(self):
        """Have the kernel give all pages now, so that no store can fail. False: it cannot, or does not know
        how."""
        if self.number == 0 or self.count:
            return True  # done by the watcher; by the thread that had it before
        start = self.first * 8 // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            self.map.madvise(
                MADVISE_POPULATE_WRITE, start, self.first * 8 + self.slots * SLOT_WORDS * 8 - start
            )
        except OSError:
            return False
        return True

    def put(self, kind, values):
        """Write a record. TypeError, struct.error: a value is not fit; the slot is not published then."""
        words = self.words
        index = self.count
        at = self.first + (index % self.slots) * SLOT_WORDS
        # Packing takes anything with an __index__, which would run the target's code.
        if not PLAIN.issuperset(map(type, values)):
            raise TypeError
        packer = PACKERS.get(len(values))
        if packer is None:
            if len(values) > MAX_PAYLOAD_WORDS:
                raise TypeError
            packer = PACKERS[len(values)] = Struct("@q%dq" % len(values))
        words[at] = 2 * index + 1
        packer.pack_into(self.map, at * 8 + 8, kind, *values)
        if self.barrier is not None:
            self.seal(at, at + 2 + len(values), 2 * index + 2 + kind + sum(values))
        words[at] = 2 * index + 2
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


def worth_waking(words, kind, values):
    """Whether a record is one that the waiting reader asked to be woken for. What is NULL in it makes it one,
    where a price is set on it."""
    if words[H_WAITING] == WAKE_EACH:
        return True
    usual = words[H_WAKE_BASE_NS]
    if kind == KIND_DECODE:
        usual += words[H_WAKE_DECODE_NS] * values[DECODE_REQUESTS]
        gap = values[DECODE_GAP]
    elif kind == KIND_STEP:
        usual += words[H_WAKE_DECODE_NS] * values[STEP_DECODE]
        usual += words[H_WAKE_PREFILL_NS] * values[STEP_PREFILL]
        gap = values[STEP_GAP]
    else:
        return False
    took = values[2] - values[1]
    if took > usual or gap > words[H_WAKE_GAP_NS]:
        return True
    spare = words[H_WAKE_SPARE_NS]
    if not spare:
        return False
    late = words[H_WAKE_LATE_NS] + took - (usual * words[H_WAKE_TYPICAL] >> 10)
    words[H_WAKE_LATE_NS] = late if 0 < late < spare else 0
    return late >= spare


def quick_put(probe, kind, count):
    """``put(values)``: ``probe.emit`` of ``count`` values that are plain ints already, and nothing else: what
    ``emit`` does besides is left to ``probe.tend``, at another moment."""
    pack_into = Struct("@q%dq" % count).pack_into
    words, file, lanes, mark = probe.words, probe.map, probe.lanes, probe.mark

    def put(values):
        lane = lanes.get(get_ident())
        if lane is None or lane.busy or lane.barrier is not None or mark is None or not mark[0]:
            return probe.store(kind, values)
        index = lane.count
        at = lane.first + (index % lane.slots) * SLOT_WORDS
        lane.busy = True
        try:
            words[at] = 2 * index + 1
            pack_into(file, at * 8 + 8, kind, *values)
            words[at] = 2 * index + 2
            lane.count = index + 1
            words[H_HEADS + lane.number] = index + 1
        except (TypeError, StructError):
            lane.busy = False
            return probe.store(kind, values)
        finally:
            lane.busy = False
        if words[H_WAITING] and worth_waking(words, kind, values):
            probe.wake()

    return put
