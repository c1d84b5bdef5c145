"""The stack image of a borrowed call, and how an interrupted system call goes on; pure arithmetic."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.attach.frame import BLOCKED_SIGNALS, Call, scratch_address, stack_image, xsave_image
from latencyprism.attach.ptrace import Registers, true_mxcsr
from latencyprism.attach.syscalls import interrupted, number_from_code, resumed
from latencyprism.errors import TargetRefused

TRAMPOLINE, STACK = 0x7F00_0000_1000, 0x7FFC_0000_5000


def registers(**values: int) -> Registers:
    made = Registers()
    for name, value in {"rsp": STACK, "rip": 0x40_1000, "cs": 0x33, "ss": 0x2B, **values}.items():
        setattr(made, name, value & (1 << 64) - 1)
    return made


def xstate(size: int = 2432, in_use: int = 0xE7) -> bytes:
    state = bytearray(size)
    state[512:520] = struct.pack("<Q", in_use)
    return bytes(state)


@given(st.integers(0x7FFC_0000_0000, 0x7FFC_FFFF_FFFF), st.integers(1, 4), st.sampled_from([0, 8, 32, 100]))
def test_layout(stack: int, count: int, scratch: int) -> None:
    calls = [Call(0x1000 * (index + 1), (index, 2, 3)) for index in range(count)]
    data = bytes(range(1, scratch + 1))
    before = registers(rsp=stack, rbx=7, r15=9)
    image = stack_image(before, xstate(), 0x55, TRAMPOLINE, calls, data)
    end = image.address + len(image.data)
    assert end <= stack - 128, "the red zone is left alone"
    assert image.entry.rsp == image.address and image.address % 16 == 8
    assert image.entry.rip == 0x1000 and image.entry.eflags & 0x500 == 0
    assert image.entry.orig_rax == (1 << 64) - 1
    at = scratch_address(before, len(data))
    assert image.data[at - image.address : at - image.address + len(data)] == data
    for index in range(count):
        frame = image.data[index * 448 : index * 448 + 440]
        assert struct.unpack_from("<Q", frame)[0] == TRAMPOLINE
        context = struct.unpack_from("<18Q", frame, 8 + 40)
        saved_at, mask = (
            struct.unpack_from("<Q", frame, 8 + 40 + 184)[0],
            struct.unpack_from("<Q", frame, 8 + 296)[0],
        )
        if index == count - 1:
            assert (context[15], context[16], context[11], context[7]) == (stack, 0x40_1000, 7, 9)
            assert mask == 0x55 and saved_at % 64 == 0
            assert image.data[saved_at - image.address :][:2432][464:468] == struct.pack("<I", 0x46505853)
        else:
            assert context[16] == 0x1000 * (index + 2) and context[8] == index + 1
            assert context[15] == image.address + 448 * (index + 1)
            assert mask == BLOCKED_SIGNALS and saved_at == 0


@pytest.mark.parametrize(
    ("size", "in_use", "kept"),
    [(2432, 0xE7, 2432), (576, 3, 576), (11008, 0x2E7, 2816), (11008, 0x602E7, 11008)],
)
def test_xsave_size_is_what_the_kernel_accepts(size: int, in_use: int, kept: int) -> None:
    image = xsave_image(xstate(size, in_use))
    magic, extended, features, true_size = struct.unpack_from("<IIQI", image, 464)
    assert (magic, extended, features, true_size) == (0x46505853, kept + 4, in_use | 3, kept)
    assert image[kept:] == struct.pack("<I", 0x46505845)


def test_no_xsave_is_refused() -> None:
    with pytest.raises(TargetRefused):
        xsave_image(bytes(512))


def test_mxcsr_is_not_taken_from_unused_memory() -> None:
    unused = xstate(in_use=0xA1)
    assert true_mxcsr(unused, compacting=True)[24:28] == struct.pack("<I", 0x1F80)
    used = bytearray(xstate(in_use=0xA3))
    used[24:28] = struct.pack("<I", 0x9FC0)
    assert true_mxcsr(bytes(used), compacting=True) == bytes(used)
    used[512] = 0xA1
    assert true_mxcsr(bytes(used), compacting=False) == bytes(used)


def in_call(number: int, result: int, **values: int) -> Registers:
    return registers(orig_rax=number, rax=-result, **values)


NOP = bytes(7)


def test_thread_in_user_code_goes_on_where_it_was() -> None:
    after = resumed(registers(orig_rax=-1, rax=-512), NOP)
    assert after is not None and (after.rip, after.rax) == (0x40_1000, (1 << 64) - 512)
    assert interrupted(registers(orig_rax=-1, rax=5), NOP) is None


@pytest.mark.parametrize(
    ("number", "result"), [(202, 512), (61, 512), (0, 513), (34, 514), (270, 514), (230, 514)]
)
def test_restartable_call_is_entered_again(number: int, result: int) -> None:
    before = in_call(number, result)
    after = resumed(before, NOP)
    assert after is not None
    assert (after.rip, after.rax, after.orig_rax) == (0x40_1000 - 2, number, (1 << 64) - 1)
    assert interrupted(before, NOP) == number


def test_finished_call_keeps_its_result() -> None:
    after = resumed(in_call(0, -17), NOP)
    assert after is not None and (after.rip, after.rax) == (0x40_1000, 17)


def test_restart_block() -> None:
    timed = resumed(in_call(202, 516, rsi=0x80 | 9), NOP)
    assert timed is not None and timed.rax == 202
    assert resumed(in_call(202, 516, rsi=0x80 | 0), NOP) is None
    assert resumed(in_call(35, 516), NOP) is None
    for limit_ms, possible in ((-1, True), (30_000, True), (30_001, False)):
        assert (resumed(in_call(7, 516, rdx=limit_ms & 0xFFFFFFFF), NOP) is not None) is possible


def test_call_that_was_restarted_before_is_told_by_its_code() -> None:
    code = b"\xb8" + struct.pack("<I", 202) + b"\x0f\x05"
    assert number_from_code(code) == 202
    before = in_call(219, 516, rsi=0x80 | 9)
    after = resumed(before, code)
    assert after is not None and after.rax == 202
    assert resumed(before, NOP) is None


def test_epoll_without_a_limit_does_not_show_the_stop() -> None:
    endless, limited = in_call(232, 4, r10=0xFFFFFFFF), in_call(232, 4, r10=1000)
    after, told = resumed(endless, NOP), resumed(limited, NOP)
    assert after is not None and (after.rip, after.rax) == (0x40_1000 - 2, 232)
    assert told is not None and (told.rip, told.rax) == (0x40_1000, (1 << 64) - 4)
