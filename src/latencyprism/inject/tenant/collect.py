"""``python.gc``: full collections, forced. Where the heap is small, objects are kept beside it that make one
collection last some ms."""

# [cut
from latencyprism.inject.tenant.base import gc, now_ns

# cut]

LEAST_NS = 3_000_000
MOST_BALLAST = 400_000


def harm(tenant):
    ballast = []
    tenant.undo.append(ballast.clear)

    def work():
        began = now_ns()
        gc.collect()
        took = now_ns() - began
        if took < LEAST_NS and len(ballast) < MOST_BALLAST:
            ballast.extend([[]] for _ in range(20_000))
        return took

    return work
