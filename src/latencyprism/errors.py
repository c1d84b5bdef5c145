"""Errors that a person caused or can mend; the command line prints them without a traceback."""

from __future__ import annotations


class PrismError(Exception):
    """What failed, why, and what to do: ``PrismError("cannot attach", "812 is stopped", "send SIGCONT")``.

    ``exit_code``: 1 the tool failed, 2 bad arguments, 3 target refused or unsuitable.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", remedy: str = "") -> None:
        self.what, self.why, self.remedy = what, why, remedy
        super().__init__(": ".join(part for part in (what, why) if part) + (f". {remedy}" if remedy else ""))


class BadInput(PrismError):
    """Arguments or a file that cannot be used (exit 2)."""

    exit_code = 2


class TargetRefused(PrismError):
    """The target cannot or must not be attached to (exit 3)."""

    exit_code = 3


class TargetBusy(TargetRefused):
    """It did not come round to it in time; asked again, it may."""


def reason_of(error: BaseException) -> str:
    """Why it failed, without what: for a list of what is missing, which says that itself."""
    return (error.why if isinstance(error, PrismError) else "") or str(error)
