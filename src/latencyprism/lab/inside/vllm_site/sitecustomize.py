"""For test engines alone: bools that an extension's error cannot wear out.

The spin loop of vLLM 0.32 (``VLLM_USE_SPINLOOP_EXT``) calls a function and gives its result back to nobody:
of ``True`` one reference is lost a call, two a step. Before CPython 3.12, where bools became immortal,
EngineCore ends after some 39,000 steps ("bool_dealloc"), watched or not. A long benchmark needs more.
"""

import ctypes
import sys

if sys.version_info < (3, 12):
    for value in (True, False):
        # The reference count is the first word of an object.
        ctypes.c_ssize_t.from_address(id(value)).value += 1 << 40
