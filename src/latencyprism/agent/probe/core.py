"""The part of the probe that every engine needs: ring, lease, hooks, removal.

Runs inside the target: standard library of Python 3.9 and later alone, no thread, no import of engine
modules, no exception ever leaves it. ``latencyprism.agent.assemble`` joins the probe's files, one reader and
the ring's constants into one text; lines between the cut marks are for linters and unit tests only.
"""

# [cut
from latencyprism.agent.probe.budget import Budget
from latencyprism.agent.probe.lane import Lane, worth_waking
from latencyprism.agent.probe.monitor import Monitor
from latencyprism.agent.probe.observe import captured_in, hook_method, name_of
from latencyprism.agent.probe.places import (
    find_class,
    fork_mark,
    keeping_write,
    size,  # noqa: F401
    why_absent,
)
from latencyprism.agent.probe.prelude import (
    KEY,
    TEXT_NAME,
    NotHookable,
    StructError,
    brought,
    from_a_signal,
    gc,
    get_ident,
    get_native_id,
    mmap,
    now_ns,
    os,
    send_back,
    sys,
)
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
    H_LATE,
    H_LEASE_NS,
    H_MAGIC,
    H_NESTED,
    H_NONCE,
    H_PID,
    H_RINGS,
    H_STATE,
    H_THREADS,
    H_UNRINGED,
    H_WAITING,
    KIND_SPAN,
    KIND_STEP,
    KIND_WORKER,
    MAGIC,
    MAX_PAYLOAD_WORDS,
    MESSAGE_BYTES,
    MESSAGE_OFFSET,
    STATE_DETACHED,
    STATE_EXPIRED,
)
from latencyprism.records.step import NULL

# cut]

NOTICES_LIMIT = 16
LANE_RETRY_NS = 1_000_000_000
WAKE_NS = 20_000
"""What a write that wakes somebody may take, on a processor that is not taken away meanwhile."""


class Probe:
    """The rings, the hooks that feed them, and how to be rid of both."""

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
        self.pid = os.getpid()
        self.mark = fork_mark()
        self.stalled_ns = self.woke_ns = 0
        self.lanes = {}
        self.no_lane_until_ns = 0
        self.free_lanes = [
            Lane(self.map, self.words, number) for number in reversed(range(self.words[H_RINGS]))
        ]
        self.hooks = []
        self.undo = []
        self.deep_hooks = []
        self.refused = []
        self.notices = []
        self.last_error = ""
        self.deep = config.get("deep", ())
        self.monitor = None
        self.brought = {}
        self.budget = Budget(self)
        self.gc_ns = self.gc_start = self.gc_last_ns = self.gc_end_ns = 0
        self.write = keeping_write()
        # Opened for reading too: then there is always a reader and a write can never raise SIGPIPE.
        self.wake_fd = os.open(config["fifo"], os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self.alive = True
        self.removal = [1]
        self.words[H_PID] = self.pid

    def begin(self, monitoring):
        """Take what is taken of the process besides hooks; ``remove`` gives it back."""
        self.brought = brought()
        gc.callbacks.append(self.on_gc)
        if monitoring and hasattr(sys, "monitoring"):
            try:
                self.monitor = Monitor(self)
            except Exception as error:  # other tools have all the ids: wrappers then
                self.refused.append(str(error))

    # -- writing -------------------------------------------------------------------------------------

    def emit(self, kind, values):
        """Write one record into this thread's ring; wake the reader if it sleeps; notice lease and commands.

        ``values``: plain ints of 64 bits. Anything else is written as NULL and counted as an error."""
        if not self.store(kind, values):
            return
        if kind == KIND_STEP or kind == KIND_WORKER:
            self.budget.busy(values[1], values[2])
        elif self.budget.stepless:
            self.budget.record()
        self.notice()

    def store(self, kind, values):
        """``emit`` without what comes after. False: not written."""
        words = self.words
        lane = self.lanes.get(get_ident()) or self.new_lane()
        if lane is None or lane.busy:
            words[H_UNRINGED if lane is None else H_NESTED] += 1
            return False
        if self.elsewhere():
            self.remove(None)  # a forked child shares the mapping and must stay silent
            return False
        lane.busy = True
        try:
            lane.put(kind, values)
        except (TypeError, StructError):
            values = self.plain_values(values)
            lane.put(kind, values)
        finally:
            lane.busy = False
        if words[H_WAITING] and worth_waking(words, kind, values):
            self.wake()
        return True

    def wake(self):
        """Let the reader know. Where it runs at once, in our place, the time is its own, not ours:
        ``woke_ns``."""
        self.words[H_WAITING] = 0
        began = now_ns()
        self.write(self.wake_fd, b"\0", 1)  # a full pipe holds wakes enough: its error means nothing
        spent = now_ns() - began
        if spent > WAKE_NS:
            self.woke_ns += spent - WAKE_NS

    def notice(self):
        """The end of the lease, and commands, unless the probe is gone already."""
        if not self.alive:
            return
        words, now = self.words, now_ns()
        if now > words[H_LEASE_NS]:
            self.remove(STATE_EXPIRED)
        elif words[H_COMMAND] != COMMAND_NONE:
            if words[H_COMMAND] == COMMAND_DETACH:
                self.remove(STATE_DETACHED)
        elif (words[H_DEEP_UNTIL_NS] > now) != bool(self.deep_hooks):
            self.arm_deep(words[H_DEEP_UNTIL_NS])

    def elsewhere(self):
        """Whether this is a forked child."""
        mark = self.mark
        return not mark[0] if mark is not None else os.getpid() != self.pid

    def new_lane(self):
        """A ring for a thread that has none: a fresh one, or that of a thread that has ended; None: all
        taken."""
        if self.no_lane_until_ns > now_ns():
            return None
        try:
            lane = self.free_lanes.pop()
        except IndexError:
            live = sys._current_frames()
            ended = [ident for ident in list(self.lanes) if ident not in live]
            lane = self.lanes.pop(ended[0], None) if ended else None
        if lane is None or not lane.allocate():
            self.no_lane_until_ns = now_ns() + LANE_RETRY_NS
            return None
        self.words[H_THREADS + lane.number] = get_native_id()
        self.lanes[get_ident()] = lane
        return lane

    def plain_values(self, values):
        """``values`` with NULL for what is no plain int of 64 bits."""
        self.count_error()
        self.say("a value that is no plain integer, or too large, was not written")
        return [
            value if type(value) is int and -(2**63) <= value < 2**63 else NULL
            for value in values[:MAX_PAYLOAD_WORDS]
        ]

    def cost(self, total_ns, critical_ns, steps=1):
        words = self.words
        words[H_COST_NS] += total_ns
        words[H_CRITICAL_NS] += critical_ns
        words[H_COST_STEPS] += steps

    def tend(self, steps, busy_ns, total_ns, critical_ns):
        """What ``emit`` and ``cost`` do besides writing, for a reader that writes with ``quick_put``: for so
        many steps, which took ``busy_ns`` and cost so much. False: the probe is gone."""
        if self.elsewhere():
            self.remove(None)
        elif self.alive:
            self.cost(total_ns, critical_ns, steps)
            self.budget.many(steps, busy_ns)
            self.notice()
        return self.alive

    def reading(self, name):
        """Declare an optional reading: a handle with ``on`` (ask before each reading) and ``cost_ns`` (add
        what it took). Give it to ``observe`` for a hook that serves it alone. Over budget, the dearest are
        turned off."""
        return self.budget.reading(name)

    def count_error(self):
        if os.getpid() == self.pid:
            self.words[H_ERRORS] += 1

    def error(self):
        """An exception was swallowed: count it; the last one's place is kept for the watcher."""
        try:
            self.count_error()
            kind, _, trace = sys.exc_info()
            line = 0
            while trace is not None:
                if trace.tb_frame.f_code.co_filename == TEXT_NAME:
                    line = trace.tb_lineno
                trace = trace.tb_next
            # Never the exception's text: it may quote what a user sent.
            self.last_error = "%s at probe line %d" % (name_of(kind), line)
            self.write_message()
        except Exception:
            self.alive = False  # the ring itself is gone: nothing can be told any more

    def say(self, text):
        """Leave a notice for the watcher; each is kept once, beside the last error."""
        if text not in self.notices and len(self.notices) < NOTICES_LIMIT:
            self.notices.append(text)
        self.write_message()

    def write_message(self):
        if os.getpid() == self.pid:
            text = "; ".join(self.notices + [self.last_error] * bool(self.last_error))
            raw = text.encode("utf-8", "replace")[: MESSAGE_BYTES - 1] + b"\0"
            self.map[MESSAGE_OFFSET : MESSAGE_OFFSET + len(raw)] = raw

    def dropped(self):
        """A step could not be told. Lease and commands are noticed all the same."""
        self.words[H_DROPPED] += 1
        self.notice()

    def late(self):
        self.words[H_LATE] += 1

    def on_gc(self, phase, info):
        if phase == "start":
            self.gc_start = now_ns()
        elif self.gc_start:
            self.gc_end_ns = now_ns()
            self.gc_last_ns = self.gc_end_ns - self.gc_start
            self.gc_ns += self.gc_last_ns
            self.gc_start = 0

    # -- hooks ---------------------------------------------------------------------------------------

    def observe(self, owner, name, enter=None, leave=None, reading=None, asked=False):
        """Hook the method ``name`` of class ``owner``; returns the Hook, or None: ``refused`` tells why.

        ``enter(args) -> state`` runs before the call, ``leave(state, args, result, start_ns, end_ns)`` after
        a normal return, not after an exception or a failed ``enter``. ``args`` are the positional parameters,
        self first, keywords put in their places; trailing defaults may be missing. Of a coroutine, result and
        times are of the awaited call. What they raise is counted and goes no further. ``reading``: the
        optional reading that it serves, with which it goes when the budget is exceeded. ``asked``: no budget
        applies.
        """
        try:
            hook = hook_method(self, owner, name, enter, leave)
        except NotHookable as error:
            reason = "%s.%s: %s" % (name_of(owner) if isinstance(owner, type) else "?", name, error)
            if reason not in self.refused:
                self.refused.append(reason)
            return None
        hook.asked = asked
        if reading is not None:
            hook.reading = reading
            reading.hooks.append(hook)
        self.hooks.append(hook)
        return hook

    def observe_named(self, place, enter=None, leave=None, reading=None, asked=False):
        """``observe`` for a place of a pack, (module, class, method); what is missing is told with the
        reason."""
        module, owner, name = place
        found = find_class(module, owner)
        if found is None:
            reason = "%s.%s.%s: %s" % (module, owner, name, why_absent(module))
            if reason not in self.refused:
                self.refused.append(reason)
            return None
        return self.observe(found, name, enter, leave, reading, asked)

    def fail(self):
        """Called where a reader's function raised: count it, or, if the target's own signal handler raised it
        while ours happened to run, let it pass."""
        kind, _, trace = sys.exc_info()
        if issubclass(kind, Exception) or not from_a_signal(kind, trace):
            self.error()
            self.notice()  # where every call fails nothing else does
        else:
            raise

    def stalled(self, hook, spent_ns, began_ns):
        """One call of a reader's function took long."""
        if self.alive:
            self.budget.stalled(hook, spent_ns, began_ns)

    def look_for_captured(self, args):
        """Say which methods the object that was called keeps, bound before attach: wrappers do not see
        these."""
        originals = {id(hook.original): hook.label for hook in self.hooks if hook.code is None}
        found = captured_in(args[0], originals) if args else ()
        if found:
            self.say("bound before attach, its calls are not seen: " + ", ".join(found))

    def arm_deep(self, until_ns):
        """Observe the pack's deep functions until then (0: no more); each call of them becomes a span."""
        for hook in self.deep_hooks:
            if hook.remove():
                self.hooks.remove(hook)
        self.deep_hooks = []
        if until_ns > now_ns():
            for index, (module, owner_name, name) in enumerate(self.deep):
                owner = find_class(module, owner_name)
                hook = owner and self.observe(owner, name, None, self.span_of(index), asked=True)
                if hook:
                    self.deep_hooks.append(hook)
            if not self.deep_hooks:
                self.words[H_DEEP_UNTIL_NS] = 0  # nothing to observe here: do not try at every step
        self.words[H_DEEP_ARMED] = len(self.deep_hooks)

    def span_of(self, index):
        emit = self.emit

        def span(state, args, result, start, end):
            emit(KIND_SPAN, (index, start, end, get_native_id()))

        return span

    # -- removal -------------------------------------------------------------------------------------

    def remove(self, state):
        """Put everything back. Idempotent. A wrapper somebody wrapped over stays, as a plain pass-through.

        ``state`` is what the ring tells from then on; None in a forked child, whose ring it is not."""
        try:
            self.removal.pop()  # one of several threads gets it
        except IndexError:
            return
        self.alive = False
        try:
            left = self.take_back()
            if state is not None and left:
                self.say("left as pass-through, wrapped by somebody else: " + ", ".join(left))
        finally:  # whatever an attribute of the target's did: ring and pipe are given back
            if state is not None:
                self.words[H_STATE] = state
                if self.words[H_WAITING]:
                    self.write(self.wake_fd, b"\0", 1)
            self.let_go()

    def take_back(self):
        """Hooks, monitoring and modules. Returns what is left as a pass-through."""
        # The last first: two wrappers of one attribute lie in each other.
        left = [hook.label for hook in reversed(self.hooks) if not hook.remove()]
        self.hooks, self.deep_hooks = [], []
        for undo in self.undo:
            try:
                undo()
            except Exception:
                self.error()
        if self.monitor is not None:
            self.monitor.close()
        try:
            gc.callbacks.remove(self.on_gc)
        except ValueError:
            pass
        if sys.modules.get(KEY) is self:
            del sys.modules[KEY]
        send_back(self.brought)
        return left

    def let_go(self):
        """Free ring and pipe, whatever state the ring tells."""
        self.alive = False
        if self.mark is not None:
            self.mark.close()
        os.close(self.wake_fd)
        self.words.release()
        self.map.close()
