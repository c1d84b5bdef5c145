"""Finding things in the target, and waking the watcher, without setting anything of the target off."""

# [cut
from latencyprism.agent.probe.prelude import mmap, os, sys

# cut]

MADV_WIPEONFORK = 18  # Linux 4.14


def find_class(module, name):
    """A class of an already imported module; the probe never imports, nor lets a module's ``__getattr__`` do
    so."""
    found = getattr(sys.modules.get(module), "__dict__", {}).get(name)
    return found if isinstance(found, type) else None


def why_absent(module):
    """Why a class of this module was not found. The module's own ``__getattr__`` is not asked."""
    found = sys.modules.get(module)
    if found is None:
        return "its module is not imported"
    spec = getattr(found, "__dict__", {}).get("__spec__")
    if getattr(spec, "_initializing", False):
        return "its module is still being imported"
    return "no such class"


def size(value):
    """len() of a plain container, else -1: a length is all that is ever read of token lists."""
    try:
        return len(value)
    except TypeError:
        return -1


def keeping_write():
    """write(fd, bytes, length) that keeps the GIL: os.write gives it away, and getting it back from a busy
    thread costs the engine loop up to a switch interval (5 ms). Needs ctypes, which is not loaded for this
    alone."""
    ctypes = sys.modules.get("ctypes")
    if ctypes is None:
        return lambda fd, data, length: ignore_full(os.write, fd, data)
    write = ctypes.PyDLL(None).write
    write.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)
    return write


def ignore_full(write, fd, data):
    try:
        write(fd, data)
    except BlockingIOError:
        pass  # a full pipe holds wakes enough


def fork_mark():
    """A page whose first byte is 1, and 0 in a forked child: reading it costs less than asking the kernel who
    we are. None: this kernel does not wipe."""
    mark = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        mark.madvise(MADV_WIPEONFORK)
    except (OSError, ValueError):
        mark.close()
        return None
    mark[0] = 1
    return mark
