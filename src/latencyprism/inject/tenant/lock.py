"""``python.lock``: holds locks that threads at work can see: mutexes of queues, and what is called a lock.

They are held until somebody has waited for ``HOLD_NS`` (or ``MOST_NS`` have passed), and what was waited is
what counts: a step that asks for no lock loses nothing. No lock is waited for longer than ``PATIENCE_S``, so
that locks held in another order elsewhere are no dead end.
"""

# [cut
from latencyprism.inject.tenant.base import W_COUNT, Cannot, _thread, locals_of, now_ns, sys, time

# cut]

HOLD_NS, MOST_NS = 15_000_000, 100_000_000
LOOK_EVERY_S = 0.002
PATIENCE_S = 0.005
MOST_LOCKS, MOST_LOOKED_AT = 64, 20_000
TYPES = (type(_thread.allocate_lock()), _thread.RLock)
# What belongs to the interpreter's own machinery is never touched: a thread's end, an import.
MACHINERY = ("threading", "importlib", "_weakrefset", "concurrent", "multiprocessing", "selectors")


def frames():
    """All frames of all threads, but for ours."""
    for frame in list(sys._current_frames().values()):
        while frame is not None:
            if frame.f_globals.get("__name__") != "_lp":
                yield frame
            frame = frame.f_back


def locks_in(name, value):
    mutex = getattr(value, "mutex", None)
    if isinstance(mutex, TYPES) and hasattr(value, "not_empty"):
        yield mutex  # a queue
    elif isinstance(value, TYPES) and ("lock" in name or "mutex" in name) and "tstate" not in name:
        yield value


def find():
    """{id: lock} of what the frames' locals, and the attributes of these, hold."""
    found, seen = {}, 0
    for frame in frames():
        if frame.f_globals.get("__name__", "").partition(".")[0] in MACHINERY:
            continue
        for name, value in list(locals_of(frame).items()):
            inside = getattr(value, "__dict__", None)
            inside = inside if type(inside) is dict and not isinstance(value, type(sys)) else {}
            for key, each in [(name, value), *list(inside.items())]:
                seen += 1
                for lock in locks_in(str(key), each):
                    found[id(lock)] = lock
            if len(found) >= MOST_LOCKS or seen > MOST_LOOKED_AT:
                return found
    return found


def positions(known):
    """Where each other thread is that may wait for a lock: {thread: (frame, instruction)}. ``known``: what
    was found out of code before."""
    own = _thread.get_ident()
    return {
        ident: (id(frame), frame.f_lasti)
        for ident, frame in sys._current_frames().items()
        if ident != own and sees_lock(frame, known)
    }


def sees_lock(frame, known):
    """Whether this frame is one that waits for locks: of a queue, of the log, or with one in its sight."""
    if frame.f_globals.get("__name__") in ("queue", "logging"):
        return True
    if frame.f_code not in known:
        inside = getattr(locals_of(frame).get("self"), "__dict__", None)
        values = list(inside.values()) if type(inside) is dict else ()
        known[frame.f_code] = any(isinstance(value, TYPES) for value in values)
    return known[frame.f_code]


def harm(tenant):
    locks = list(find().values())
    if not locks:
        raise Cannot("no thread at work has a lock or a queue in sight")

    known = {}
    tenant.undo.append(known.clear)

    def take():
        return [lock for lock in locks if lock.acquire(True, PATIENCE_S)]

    def work():
        idle = positions(known)
        held = take()
        tenant.words[W_COUNT] = max(tenant.words[W_COUNT], len(held))
        began = now_ns()
        waited, before, looked = 0, {}, began
        try:
            while held and waited < HOLD_NS and now_ns() - began < MOST_NS and not tenant.over():
                time.sleep(LOOK_EVERY_S)
                now, here = now_ns(), positions(known)
                # Who stood there before the locks were taken waits for something else.
                if any(before.get(one) == at and idle.get(one) != at for one, at in here.items()):
                    waited += now - looked
                before, looked = here, now
        finally:
            for lock in held:
                lock.release()
        return waited

    return work
