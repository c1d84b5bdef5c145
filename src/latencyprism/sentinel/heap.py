"""How much memory a watch keeps that it no longer needs."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_ARENA_MAX = -1, -8
_TRIM_BYTES = 1 << 20


def keep_small() -> None:
    """Have glibc use one heap for all threads, and give back what is free at its end. Threads that work for
    some seconds at a time, as while a capture is open, would otherwise each leave a heap of their own."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another C library knows nothing of it
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
