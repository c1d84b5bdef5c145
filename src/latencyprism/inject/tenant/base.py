"""The part that every disturbance from within needs: a lease, a thread, a share of the time, and leaving.

Runs inside the target: standard library of Python 3.9 and later alone. ``inject.lease`` joins this file, one
cause and a call of ``begin`` into one text. The thread ends when its time is over, when the lease is not
renewed, or when the process forks (a child has no such thread); then everything is put back.
"""

import sys

BROUGHT = [name for name in ("_thread", "gc", "mmap", "os", "time") if name not in sys.modules]

import _thread  # noqa: E402
import gc  # noqa: E402, F401
import mmap  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402

# Words of the file that is shared with the injector: 64-bit integers, times CLOCK_MONOTONIC ns.
(
    W_NONCE,
    W_STATE,
    W_LEASE_NS,
    W_UNTIL_NS,
    W_BEGUN_NS,
    W_ENDED_NS,
    W_HARM_NS,
    W_ROUNDS,
    W_CPU_NS,
    W_COUNT,
    W_THREAD,
) = range(11)
EMPTY, LIVE, ENDED, FAILED = 0, 1, 2, 3
SAY_AT, SAY_BYTES = 256, 512

now_ns = time.perf_counter_ns  # CLOCK_MONOTONIC on Linux
LOOK_S = 0.005
LEAST_REST_S = 0.0005
CATCH_UP_NS = 200_000_000
"""Harm that could not be done in time is made up for no longer than this."""


class Cannot(Exception):
    """Why this process cannot be disturbed in that way, in words."""


class Tenant:
    """``words`` of the shared file; ``share`` of the time that ``work`` is to take."""

    def __init__(self, config):
        descriptor = os.open(config["file"], os.O_RDWR | os.O_CLOEXEC)
        try:
            self.map = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        self.words = memoryview(self.map).cast("q")
        self.config = config
        self.share = config["share"]
        self.pid = os.getpid()
        self.key = "_latencyprism_tenant_%x" % config["nonce"]
        self.work = None
        self.undo = []
        self.brought = {}

    def over(self):
        now = now_ns()
        until = self.words[W_UNTIL_NS]
        return now > self.words[W_LEASE_NS] or (until != 0 and now > until) or os.getpid() != self.pid

    def harmed(self, spent_ns, rounds=1):
        self.words[W_HARM_NS] += spent_ns
        self.words[W_ROUNDS] += rounds

    def say(self, text):
        raw = text.encode("utf-8", "replace")[: SAY_BYTES - 1] + b"\0"
        self.map[SAY_AT : SAY_AT + len(raw)] = raw

    def sleep(self, seconds):
        """Not past the end; a lease that ran out is noticed within 50 ms."""
        end = now_ns() + int(seconds * 1e9)
        while not self.over():
            left = end - now_ns()
            if left <= 0:
                return
            time.sleep(min(left / 1e9, 0.05))

    def run(self):
        """The thread: work for ``share`` of the time, counted by what ``work`` says it took (ns)."""
        try:
            self.words[W_THREAD] = _thread.get_native_id()
            while self.words[W_UNTIL_NS] == 0 and not self.over():
                time.sleep(LOOK_S)
            self.live()
        except Exception as error:  # never the text of it: it may quote what a user sent
            self.say("%s in the target at line %d" % (type(error).__name__, last_line(error)))
        finally:
            self.leave()

    def live(self):
        words = self.words
        begun = words[W_BEGUN_NS] = now_ns()
        done = 0
        while not self.over():
            spent = self.work()
            done += spent
            self.harmed(spent)
            rest = done / self.share - (now_ns() - begun)
            if rest < -CATCH_UP_NS:
                begun -= int(rest + CATCH_UP_NS)
            words[W_CPU_NS] = time.thread_time_ns()
            self.sleep(max(rest / 1e9, LEAST_REST_S))

    def leave(self):
        for undo in self.undo:
            try:
                undo()
            except Exception as error:
                self.say("%s while undoing" % type(error).__name__)
        self.undo = []
        threading = sys.modules.get("threading")
        if threading is not None:
            # A log record asks for the thread's name, by which the module takes note of this one.
            threading._active.pop(_thread.get_ident(), None)
        sys.modules.pop(self.key, None)
        self.send_back()
        if os.getpid() == self.pid:
            words = self.words
            words[W_CPU_NS] = time.thread_time_ns()
            words[W_ENDED_NS] = now_ns()
            words[W_STATE] = ENDED
        self.words.release()
        self.map.close()

    def note_brought(self):
        for name in BROUGHT:
            if name in sys.modules and name not in self.brought:
                self.brought[name] = sys.getrefcount(sys.modules[name])

    def send_back(self):
        """Modules that were loaded for us go, unless somebody else imported one since."""
        for name, references in self.brought.items():
            if name in sys.modules and sys.getrefcount(sys.modules[name]) <= references:
                del sys.modules[name]


OPTIMISED = 1  # CO_OPTIMIZED: a function's frame, whose locals are no dictionary of their own


def locals_of(frame):
    """A frame's locals. Up to 3.12 looking makes a dictionary that stays with the frame and keeps what it
    names: it is emptied, unless the target's own code holds it."""
    seen = frame.f_locals
    if type(seen) is not dict or not frame.f_code.co_flags & OPTIMISED:
        return seen
    found = dict(seen)
    if sys.getrefcount(seen) <= 3:  # the frame's, ours, and the call's
        seen.clear()
    return found


def last_line(error):
    line, trace = 0, error.__traceback__
    while trace is not None:
        line, trace = trace.tb_lineno, trace.tb_next
    return line


def begin(config, harm):
    """``harm(tenant)`` returns ``work``: called again and again, it disturbs for a few ms and returns how
    many ns it did. It raises Cannot where that is not possible here."""
    tenant = Tenant(config)
    if (
        tenant.key in sys.modules
        or tenant.words[W_STATE] != EMPTY
        or tenant.words[W_NONCE] != config["nonce"]
    ):
        return  # the same text came twice
    try:
        tenant.note_brought()
        tenant.work = harm(tenant)
        tenant.note_brought()  # it may have loaded more
        sys.modules[tenant.key] = tenant
        tenant.words[W_STATE] = LIVE
        _thread.start_new_thread(tenant.run, ())
    except Exception as error:
        tenant.say(str(error) if isinstance(error, Cannot) else type(error).__name__)
        sys.modules.pop(tenant.key, None)
        for undo in tenant.undo:
            undo()
        tenant.send_back()
        tenant.words[W_STATE] = FAILED
        tenant.words.release()
        tenant.map.close()
