"""sys.monitoring for the hooks of CPython 3.12 and later: one tool id, events of single code objects, two
callbacks.

Only PY_START and PY_RETURN, and only on the code objects of hooks: nothing else in the process runs slower.
An exit by exception gives no local event; asking for it globally would put a callback on every raise in every
thread, so what was kept for such a call is swept away by a look at the running frames, at a later call. Calls
are told apart by their frame: recursion and threads need nothing more.
"""

# [cut
from latencyprism.agent.probe.prelude import getframe, now_ns, sys

# cut]

SWEEP_NS = 250_000_000
OPEN_LIMIT = 256


class Monitor:
    """The tool id and its hooks. RuntimeError from the constructor: no id is free."""

    NAME = "latencyprism"

    def __init__(self, probe):
        self.api = sys.monitoring
        self.table = {}
        self.id = self.claim()
        events = self.api.events
        self.wanted = events.PY_START | events.PY_RETURN
        started, returned = callbacks(probe, self.table)
        self.api.register_callback(self.id, events.PY_START, started)
        self.api.register_callback(self.id, events.PY_RETURN, returned)

    def claim(self):
        # 0, 1, 2 and 5 are meant for debuggers, coverage, profilers and optimisers: taken last.
        for number in (4, 3, 5, 2, 1, 0):
            if self.api.get_tool(number) is None:
                try:
                    self.api.use_tool_id(number, self.NAME)
                    return number
                except ValueError:
                    continue  # somebody took it this moment
        raise RuntimeError("no monitoring tool id is free")

    def add(self, hook):
        # By id: hashing a code object hashes all of it. The hook keeps it alive.
        hooks = self.table.get(id(hook.code), ())
        self.table[id(hook.code)] = (*hooks, hook)
        if not hooks:
            self.api.set_local_events(self.id, hook.code, self.wanted)

    def discard(self, hook):
        left = tuple([other for other in self.table.get(id(hook.code), ()) if other is not hook])
        if left:
            self.table[id(hook.code)] = left
        elif self.table.pop(id(hook.code), None) is not None:
            self.api.set_local_events(self.id, hook.code, 0)
        return True

    def close(self):
        """Give everything back: freeing the id alone leaves events and callbacks set."""
        for hooks in list(self.table.values()):
            self.api.set_local_events(self.id, hooks[0].code, 0)
        self.table.clear()
        for event in (self.api.events.PY_START, self.api.events.PY_RETURN):
            self.api.register_callback(self.id, event, None)
        self.api.free_tool_id(self.id)


def callbacks(probe, table):
    """The two callbacks. Nothing leaves them but an exception that a signal handler of the target raised."""
    fail, stalled = probe.fail, probe.stalled

    def started(code, offset):
        for hook in table.get(id(code), ()):
            before = now_ns()
            try:
                if not hook.on:
                    continue
                frame = getframe(1)
                args = hook.pick(frame.f_locals)
                if hook.only is not None and hook.only not in type(args[0]).__mro__:
                    continue
                if hook.open and before > hook.sweep_at_ns:
                    sweep(hook, before)
                enter = hook.enter
                state = enter(args) if enter is not None else None
                start = now_ns()
                hook.open[id(frame)] = (state, args, start)
                hook.cost_ns += start - before
                if start - before > hook.limit_ns:
                    stalled(hook, start - before, before)
            except BaseException:
                fail()

    def returned(code, offset, result):
        end = now_ns()
        for hook in table.get(id(code), ()):
            try:
                opened = hook.open.pop(id(getframe(1)), None)
                if opened is None or not hook.on:
                    continue  # it began before the hook was there
                leave = hook.leave
                if leave is not None:
                    leave(opened[0], opened[1], result, opened[2], end)
                hook.calls += 1
                spent = now_ns() - end
                hook.cost_ns += spent
                if spent > hook.limit_ns:
                    stalled(hook, spent, end)
            except BaseException:
                fail()

    return started, returned


def sweep(hook, now):
    """Drop what was kept for calls that ended by an exception: their frames run no more.

    Other threads go on meanwhile. What is looked at was there before the frames were, so that a call that
    begins now is none of it; and a new frame may get the place, and so the id, of one that ended."""
    hook.sweep_at_ns = now + SWEEP_NS
    kept = hook.open
    looked_at = list(kept.items())
    live = set()
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code is hook.code:
                live.add(id(frame))
            frame = frame.f_back
    for key, call in looked_at:
        # No thread gets in between the comparison and the removal: neither calls anything.
        if key not in live and key in kept and kept[key] is call:
            del kept[key]
    if len(kept) > OPEN_LIMIT:
        kept.clear()
