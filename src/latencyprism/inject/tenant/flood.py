"""``log.flood``: lines through the target's own log handlers, for part of each period."""

# [cut
from latencyprism.inject.tenant.base import W_COUNT, Cannot, now_ns, sys

# cut]

BURST_NS = 4_000_000
MOST_LINES = 2_000_000
TEXT = "latencyprism inject log.flood: this line is written on purpose, line %d" + " ." * 60


def harm(tenant):
    logging = sys.modules.get("logging")
    select = sys.modules.get("select") or sys.modules.get("_select")
    if logging is None:
        raise Cannot("it has no log: the module logging was never imported")
    loggers = [logging.root, *list(logging.root.manager.loggerDict.values())]
    handlers = []
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler not in handlers:
                handlers.append(handler)
    if not handlers:
        raise Cannot("none of its loggers has a handler that writes to a stream or a file")

    def room(handler):
        """A pipe that nobody reads would keep the handler's lock for ever."""
        try:
            descriptor = handler.stream.fileno()
        except Exception:
            return True  # no descriptor, no pipe
        return select is None or bool(select.select((), (descriptor,), (), 0)[1])

    def work():
        began = now_ns()
        record = logging.LogRecord("latencyprism", logging.WARNING, "inject", 0, TEXT, (0,), None)
        while now_ns() - began < BURST_NS and tenant.words[W_COUNT] < MOST_LINES:
            record.args = (tenant.words[W_COUNT],)
            written = 0
            for handler in handlers:
                if handler.stream is not None and room(handler):
                    handler.handle(record)
                    written += 1
            tenant.words[W_COUNT] += written
            if not written:
                break
        return now_ns() - began

    return work
