"""The part of the probe that every engine needs: ring, lease, wrapping, removal.

Runs inside the target: standard library of Python 3.9 and later alone, no thread, no import of engine
modules, no exception ever leaves it. ``latencyprism.agent.assemble`` joins this file, one reader and the
ring's constants into one text; lines between the cut marks are for linters and unit tests only.
"""

# isort: off
# [cut
from latencyprism.records.ring import (
    COMMAND_DETACH,
    COMMAND_NONE,
    H_COMMAND,
    H_COST_NS,
    H_COST_STEPS,
    H_CRITICAL_NS,
    H_DEEP_ARMED,
    H_DEEP_UNTIL_NS,
    H_DROPPED,
    H_ERRORS,
    H_HEAD,
    H_LATE,
    H_LEASE_NS,
    H_MAGIC,
    H_NONCE,
    H_PID,
    H_SLOTS,
    H_STATE,
    H_WAITING,
    HEADER_BYTES,
    KIND_SPAN,
    MAGIC,
    MESSAGE_BYTES,
    MESSAGE_OFFSET,
    SLOT_WORDS,
    STATE_DETACHED,
    STATE_EXPIRED,
    STATE_FAILED,
    STATE_LIVE,
)

# cut]
# isort: on
import ctypes
import gc
import mmap
import os
import sys
import threading
from time import perf_counter_ns as now_ns  # CLOCK_MONOTONIC on Linux, like monotonic_ns, and cheaper

KEY = "_latencyprism_probe"


class Probe:
    """One ring, the wraps that feed it, and how to be rid of both."""

    def __init__(self, config):
        fd = os.open(config["ring"], os.O_RDWR | os.O_CLOEXEC)
        try:
            self.map = mmap.mmap(fd, 0)
        finally:
            os.close(fd)
        self.words = memoryview(self.map).cast("q")
        if self.words[H_MAGIC] != MAGIC or self.words[H_NONCE] != config["nonce"]:
            raise RuntimeError("not the ring that was announced")
        self.nonce = config["nonce"]
        self.slots = self.words[H_SLOTS]
        self.count = 0
        self.pid = os.getpid()
        self.thread = None
        self.wraps = []
        self.deep_wraps = []
        self.deep_hooks = config.get("deep", ())
        self.gc_ns = 0
        self.gc_start = 0
        # Through PyDLL, which keeps the GIL: os.write would give it away, and getting it back from a busy
        # thread costs the engine loop up to a switch interval (5 ms).
        self.write = ctypes.PyDLL(None).write
        self.write.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)
        # Opened for reading too: then there is always a reader and a write can never raise SIGPIPE.
        self.wake_fd = os.open(config["fifo"], os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self.alive = True
        gc.callbacks.append(self.on_gc)
        self.words[H_PID] = self.pid

    # -- writing -------------------------------------------------------------------------------------

    def emit(self, kind, values):
        """Write one record; wake the reader if it sleeps; notice lease and commands. One thread only."""
        words = self.words
        if self.thread is None:
            self.thread = threading.get_ident()
        elif self.thread != threading.get_ident():
            words[H_ERRORS] += 1
            return
        if os.getpid() != self.pid:  # a forked child shares the mapping and must stay silent
            self.alive = False
            return
        index = self.count
        at = HEADER_BYTES // 8 + (index % self.slots) * SLOT_WORDS
        words[at] = 2 * index + 1
        words[at + 1] = kind
        at += 2
        for value in values:
            words[at] = value
            at += 1
        words[at - len(values) - 2] = 2 * index + 2
        self.count = index + 1
        words[H_HEAD] = index + 1
        if words[H_WAITING]:
            words[H_WAITING] = 0
            self.write(self.wake_fd, b"\0", 1)  # a full pipe holds wakes enough: its error means nothing
        now = now_ns()
        if now > words[H_LEASE_NS]:
            self.remove(STATE_EXPIRED)
        elif words[H_COMMAND] != COMMAND_NONE:
            if words[H_COMMAND] == COMMAND_DETACH:
                self.remove(STATE_DETACHED)
        elif (words[H_DEEP_UNTIL_NS] > now) != bool(self.deep_wraps):
            self.arm_deep(words[H_DEEP_UNTIL_NS] > now)

    def cost(self, total_ns, critical_ns):
        words = self.words
        words[H_COST_NS] += total_ns
        words[H_CRITICAL_NS] += critical_ns
        words[H_COST_STEPS] += 1

    def error(self):
        """An exception was swallowed: count it; the last one's place is kept for the watcher."""
        try:
            self.words[H_ERRORS] += 1
            kind, _, trace = sys.exc_info()
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            # Never the exception's text: it may quote what a user sent.
            self.say(
                "%s at probe line %s" % (getattr(kind, "__name__", "?"), trace.tb_lineno if trace else "?")
            )
        except Exception:
            self.alive = False  # the ring itself is gone: nothing can be told any more

    def say(self, text):
        raw = text.encode("utf-8", "replace")[: MESSAGE_BYTES - 1] + b"\0"
        self.map[MESSAGE_OFFSET : MESSAGE_OFFSET + len(raw)] = raw

    def dropped(self):
        self.words[H_DROPPED] += 1

    def late(self):
        self.words[H_LATE] += 1

    def on_gc(self, phase, info):
        if phase == "start":
            self.gc_start = now_ns()
        elif self.gc_start:
            self.gc_ns += now_ns() - self.gc_start
            self.gc_start = 0

    # -- wrapping ------------------------------------------------------------------------------------

    def wrap(self, owner, name, make):
        """Replace the plain function ``name`` of class ``owner`` by ``make(original)``."""
        self.wraps.append(install(owner, name, make))

    def arm_deep(self, on):
        """Wrap (or unwrap) the pack's deep functions, each call of which becomes a span."""
        if not on:
            for record in self.deep_wraps:
                uninstall(record)
            self.deep_wraps = []
        else:
            for index, (module, owner_name, name) in enumerate(self.deep_hooks):
                owner = find_class(module, owner_name)
                if owner is not None and callable(vars(owner).get(name)):
                    self.deep_wraps.append(install(owner, name, self.make_span(index)))
            if not self.deep_wraps:
                self.words[H_DEEP_UNTIL_NS] = 0  # nothing to wrap here: do not try at every step
        self.words[H_DEEP_ARMED] = len(self.deep_wraps)

    def make_span(self, index):
        probe = self

        def make(original):
            def span(*args, **kwargs):
                start = now_ns()
                try:
                    return original(*args, **kwargs)
                finally:
                    if probe.alive and probe.thread == threading.get_ident():
                        try:
                            probe.emit(KIND_SPAN, (index, start, now_ns(), 0))
                        except Exception:
                            probe.error()

            return span

        return make

    # -- removal -------------------------------------------------------------------------------------

    def remove(self, state):
        """Put everything back. Idempotent. A wrapper somebody wrapped over stays, as a plain pass-through."""
        if not self.alive:
            return
        self.alive = False
        left = [record for record in self.deep_wraps + self.wraps if not uninstall(record)]
        self.wraps, self.deep_wraps = [], []
        try:
            gc.callbacks.remove(self.on_gc)
        except ValueError:
            pass
        if sys.modules.get(KEY) is self:
            del sys.modules[KEY]
        if left:
            self.say(
                "left as pass-through, wrapped by somebody else: " + ", ".join(name for _, name, _, _ in left)
            )
        self.words[H_STATE] = state
        if self.words[H_WAITING]:
            self.write(self.wake_fd, b"\0", 1)
        os.close(self.wake_fd)
        self.words.release()
        self.map.close()


def install(owner, name, make):
    original = vars(owner)[name]
    if not callable(original) or isinstance(original, (staticmethod, classmethod)):
        raise TypeError("not a plain function")
    new = make(original)
    for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(new, attribute, getattr(original, attribute, None))
    new.__wrapped__ = original
    setattr(owner, name, new)
    return (owner, name, original, new)


def uninstall(record):
    owner, name, original, new = record
    if vars(owner).get(name) is not new:
        return False
    setattr(owner, name, original)
    return True


def find_class(module, name):
    """A class of an already imported module; the probe never imports."""
    return getattr(sys.modules.get(module), name, None)


def size(value):
    """len() of a plain container, else -1: a length is all that is ever read of token lists."""
    try:
        return len(value)
    except TypeError:
        return -1


def start(config, reader):
    """Install ``reader`` unless another watcher holds this process; tell the outcome through the ring."""
    present = sys.modules.get(KEY)
    if present is not None and getattr(present, "nonce", None) == config["nonce"]:
        return  # the same command came twice
    probe = Probe(config)
    try:
        if present is not None:
            if present.alive and now_ns() < present.words[H_LEASE_NS]:
                raise RuntimeError("watched already")
            present.remove(STATE_EXPIRED)
        missing = reader(probe, config)
        if not probe.wraps:
            raise RuntimeError("nothing to hook: " + ", ".join(missing))
        if missing:
            probe.say("not found: " + ", ".join(missing))
        sys.modules[KEY] = probe
        probe.words[H_STATE] = STATE_LIVE
    except Exception as error:
        probe.say(str(error) if isinstance(error, RuntimeError) else type(error).__name__)
        probe.remove(STATE_FAILED)
