"""Vendor libraries opened at run time, and calls into them that may be absent, refuse, or never return."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from latencyprism.errors import PrismError

T = TypeVar("T")


class LibraryMissing(PrismError):
    """The vendor's library is not on this machine: no such device, or no driver."""


def open_library(names: Sequence[str], what: str) -> ctypes.CDLL:
    """The first of ``names`` that loads. A name with a slash is a path. LibraryMissing if none does."""
    why = []
    for name in names:
        try:
            return ctypes.CDLL(name, mode=os.RTLD_LOCAL | os.RTLD_NOW)
        except OSError as error:
            why.append(str(error))
    raise LibraryMissing(f"{what} is not here", "; ".join(why)[:300])


def function(library: ctypes.CDLL, *names: str) -> Callable[..., int] | None:
    """The first function of these names that this version of the library has; it returns a C int."""
    for name in names:
        found = getattr(library, name, None)
        if found is not None:
            found.restype = ctypes.c_int
            return found  # type: ignore[no-any-return]
    return None


class Hung(PrismError):
    """A call into a vendor's library did not come back in time."""


class Bounded(Generic[T]):
    """Runs calls on one thread of its own and waits for each at most ``limit_s``.

    A thread that hangs in a driver cannot be ended: it is left behind (a daemon), and every later call is
    refused at once, so that a dead driver costs one wait and one thread.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._hung = ""

    @property
    def hung(self) -> bool:
        return bool(self._hung)

    def call(self, what: str, action: Callable[[], T]) -> T:
        """What ``action`` returns or raises; Hung if it does not come back."""
        if self._hung:
            raise Hung(f"{what} is not asked any more", self._hung)
        done = threading.Event()
        outcome: list[T] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                outcome.append(action())
            except BaseException as error:  # noqa: BLE001  handed to the caller below
                failure.append(error)
            done.set()

        threading.Thread(target=work, daemon=True, name="lp-xpu").start()
        if not done.wait(self._limit_s):
            self._hung = f"it did not answer within {self._limit_s:g} s"
            raise Hung(what, self._hung)
        if failure:
            raise failure[0]
        return outcome[0]
