"""``engine.event_loop``: a callback that blocks the asyncio loop for part of each period, as a call does that
should have been awaited."""

# [cut
from latencyprism.inject.tenant.base import W_COUNT, Cannot, gc, locals_of, now_ns, sys, time

# cut]

BLOCK_NS = 20_000_000
COMES_S = 0.5


def is_loop(value):
    return hasattr(type(value), "call_soon_threadsafe") and hasattr(type(value), "is_running")


def running(value):
    try:
        return is_loop(value) and value.is_running()
    except Exception:
        return False


def find():
    """The loops that run now. Frames name most; what only a library in C knows is among what is collected."""
    found = {}
    for frame in list(sys._current_frames().values()):
        while frame is not None:
            for value in list(locals_of(frame).values()):
                for each in (value, getattr(value, "_loop", None)):
                    if running(each):
                        found[id(each)] = each
            frame = frame.f_back
    if not found:
        for each in gc.get_objects():
            if running(each):
                found[id(each)] = each
    return list(found.values())


def harm(tenant):
    if "asyncio" not in sys.modules:
        raise Cannot("it has no event loop: asyncio was never imported")
    loops = find()
    if not loops:
        raise Cannot("no event loop runs in it")
    tenant.words[W_COUNT] = len(loops)
    spent = {}

    def block(ticket):
        if spent.get(ticket) != 0 or tenant.key not in sys.modules:
            return  # too late
        began = now_ns()
        time.sleep(BLOCK_NS / 1e9)
        spent[ticket] = now_ns() - began

    def work():
        total = []
        for loop in loops:
            ticket = object()
            spent[ticket] = 0
            try:
                loop.call_soon_threadsafe(block, ticket)
            except RuntimeError:  # it was closed
                continue
            until = now_ns() + int(COMES_S * 1e9)
            while not spent[ticket] and now_ns() < until and not tenant.over():
                time.sleep(0.001)
            total.append(spent.pop(ticket))
        return max(total, default=0)

    return work
