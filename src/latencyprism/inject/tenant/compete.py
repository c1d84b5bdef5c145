"""``cpu.oversubscription``: a thread of the target's own that wants the CPU of its busiest thread.

It computes in one native call that gives the interpreter's lock up: the two compete for the CPU, not for the
lock.
"""

# [cut
from latencyprism.inject.tenant.base import BROUGHT, os, sys, time

# cut]

BURST_NS = 4_000_000


def last_cpu(path):
    with open(path, "rb") as file:
        data = file.read()
    return int(data[data.rfind(b")") + 1 :].split()[36])


def computation():
    """A function of how much to compute, 1000 being about a millisecond."""
    hashing = sys.modules.get("_hashlib")
    if hashing is not None:
        return lambda much: hashing.pbkdf2_hmac("sha256", b"x", b"y", much)
    if "zlib" not in sys.modules:
        BROUGHT.append("zlib")
    import zlib

    buffer = bytes(8 << 20)
    return lambda much: [zlib.crc32(buffer) for _ in range(much // 1000)]


def harm(tenant):
    compute = computation()
    much = [4000]

    def work():
        os.sched_setaffinity(0, {last_cpu(tenant.config["stat"])})
        began = time.thread_time_ns()
        compute(much[0])
        took = time.thread_time_ns() - began
        much[0] = max(1000, int(much[0] * min(2.0, max(0.5, BURST_NS / max(1, took)))))
        return took

    return work
