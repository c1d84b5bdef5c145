"""What every part of the probe stands on: a clock, frames, and a note of what the process had to load for us.

The probe's files are joined into one text; they share one namespace there.
Imports between cut marks are for linters and unit tests alone.
"""

import sys

# Modules that the process had not imported (an engine has them all). A part that needs more adds to it.
BROUGHT = [
    name
    for name in ("_operator", "_signal", "_struct", "_thread", "gc", "mmap", "os", "time")
    if name not in sys.modules
]

import gc  # noqa: E402
import mmap  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
from _operator import itemgetter  # noqa: E402
from _signal import getsignal, valid_signals  # noqa: E402
from _struct import Struct  # noqa: E402
from _struct import error as StructError  # noqa: E402
from _thread import allocate_lock, get_ident, get_native_id  # noqa: E402

KEY = "_latencyprism_probe"
TEXT_NAME = "<latencyprism>"
STALL_NS = 200_000
"""One call of a reader's function that takes longer is looked into at first: see ``Budget.stalled``."""

now_ns = time.perf_counter_ns  # CLOCK_MONOTONIC on Linux, like monotonic_ns, and cheaper
getframe = sys._getframe

__all__ = [
    "BROUGHT", "KEY", "STALL_NS", "TEXT_NAME", "NotHookable", "Struct", "StructError", "allocate_lock",
    "brought", "from_a_signal", "gc", "get_ident", "get_native_id", "getframe", "itemgetter", "mmap",
    "now_ns", "os", "send_back", "sys",
]  # fmt: skip


def brought():
    """{module loaded for us: references to it}, once all parts are there."""
    return {name: sys.getrefcount(sys.modules[name]) for name in BROUGHT if name in sys.modules}


def send_back(brought_before):
    """Take these modules out of sys.modules, unless somebody else imported one since."""
    for name, references in brought_before.items():
        if name in sys.modules and sys.getrefcount(sys.modules[name]) <= references:
            del sys.modules[name]


class NotHookable(Exception):
    """Why a method cannot be observed."""


def from_a_signal(kind, trace):
    """Whether an exception that is no ``Exception`` came from a signal handler or from another thread, and so
    is the target's own business (vLLM's handler of SIGTERM raises SystemExit), rather than from an object
    read."""
    handlers = [getattr(getsignal(number), "__code__", None) for number in valid_signals()]
    foreign = False
    while trace is not None:
        code = trace.tb_frame.f_code
        if any(code is handler for handler in handlers):
            return True
        foreign = foreign or code.co_filename != TEXT_NAME
        trace = trace.tb_next
    return not foreign and kind in (KeyboardInterrupt, SystemExit)
