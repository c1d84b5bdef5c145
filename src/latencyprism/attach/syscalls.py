"""The system call a stopped thread was interrupted in, and how it goes on as if nothing had happened.

A stop interrupts a blocking call inside the kernel. Left alone, the kernel restarts it; a thread that is sent
elsewhere first must have that restart written into the registers it returns to.
"""

from __future__ import annotations

from .ptrace import Registers

FUTEX, POLL, EPOLL_WAIT, EPOLL_PWAIT, RESTART_SYSCALL = 202, 7, 232, 281, 219
# Calls in which a Python thread waits for events with the GIL released, and which may be entered again.
WAITING = {
    0: "read",
    POLL: "poll",
    23: "select",
    34: "pause",
    35: "nanosleep",
    43: "accept",
    45: "recvfrom",
    47: "recvmsg",
    61: "wait4",
    130: "rt_sigsuspend",
    FUTEX: "futex",
    RESTART_SYSCALL: "restart_syscall",
    230: "clock_nanosleep",
    EPOLL_WAIT: "epoll_wait",
    247: "waitid",
    270: "pselect6",
    271: "ppoll",
    EPOLL_PWAIT: "epoll_pwait",
    288: "accept4",
    299: "recvmmsg",
    441: "epoll_pwait2",
}
_EINTR = 4
_RESTARTSYS, _RESTARTNOINTR, _RESTARTNOHAND, _RESTART_BLOCK = 512, 513, 514, 516
_FUTEX_WAIT_BITSET = 9
_FUTEX_COMMAND = 0x7F
# A poll with a time limit can only be started anew, so it may end late by at most its own limit.
POLL_LIMIT_MS = 30_000
_NO_SYSCALL = (1 << 64) - 1


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def number_from_code(code: bytes) -> int | None:
    """System call number out of the 7 bytes before the return address: ``mov $number, %eax; syscall``."""
    if len(code) == 7 and code[0] == 0xB8 and code[5:] == b"\x0f\x05":
        return int.from_bytes(code[1:5], "little")
    return None


def interrupted(registers: Registers, code: bytes) -> int | None:
    """Number of the blocking call that the stop interrupted, None when the thread was not in one.

    ``code``: the 7 bytes before ``rip``; they tell which call it is when the kernel only says that it had
    been restarted already.
    """
    number = _signed(registers.orig_rax, 64)
    result = -_signed(registers.rax, 64)
    if number < 0 or result not in (_EINTR, _RESTARTSYS, _RESTARTNOINTR, _RESTARTNOHAND, _RESTART_BLOCK):
        return None
    if result == _EINTR and number not in (EPOLL_WAIT, EPOLL_PWAIT):
        return None
    if number == RESTART_SYSCALL:
        told = number_from_code(code)
        return RESTART_SYSCALL if told is None else told
    return number


def resumed(registers: Registers, code: bytes) -> Registers | None:
    """The registers to return to so that the interrupted call goes on; None when that cannot be written down.

    Exact for every call but two: ``poll`` with a time limit starts it anew (late by at most its limit, which
    must be under ``POLL_LIMIT_MS``), and ``epoll_wait`` with a time limit returns EINTR, as it does after any
    stop and continue. Not possible for relative sleeps, whose rest only the kernel knows.
    """
    after = registers.copy()
    after.orig_rax = _NO_SYSCALL
    number = interrupted(registers, code)
    if number is None:
        return after
    result = -_signed(registers.rax, 64)
    if result == _EINTR:
        if _signed(registers.r10, 32) >= 0:
            return after
    elif result == _RESTART_BLOCK and not _may_start_anew(number, registers):
        return None
    after.rax = number
    after.rip -= 2
    return after


def _may_start_anew(number: int, registers: Registers) -> bool:
    if number == FUTEX:
        # Its time limit is a point in time, so that starting anew is exact.
        return registers.rsi & _FUTEX_COMMAND == _FUTEX_WAIT_BITSET
    return number == POLL and _signed(registers.rdx, 32) <= POLL_LIMIT_MS
