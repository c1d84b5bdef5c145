"""``python.gil``: a thread that holds the interpreter's lock for part of each period.

One call of ``sum`` does not give the lock up until it returns: others wait for as long as it takes, whatever
the switch interval is.
"""

# [cut
from latencyprism.inject.tenant.base import now_ns

# cut]

HOLD_NS = 4_000_000


def harm(tenant):
    # To get the lock from a thread that never lets go takes 5 ms: a large share needs longer holds.
    hold_ns = int(HOLD_NS / (1 - tenant.share))
    count = [10_000]

    def work():
        began = now_ns()
        sum(range(count[0]))
        took = now_ns() - began
        # The processor may have been elsewhere meanwhile: at most twice as much or half of it next time.
        count[0] = int(count[0] * min(2.0, max(0.5, hold_ns / max(1, took)))) + 1
        return took

    return work
