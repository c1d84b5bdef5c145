"""Another tenant of an NVIDIA device: ``python -E -s -S cotenant.py SPEC`` with SPEC a JSON object.

``kind``: ``contention`` (arithmetic on every multiprocessor), ``memory_bandwidth`` (copies within the
device), ``pcie`` (copies from and to pinned host memory), ``link`` (copies to another device), ``allocator``
(allocates and frees); ``share``: part of each 20 ms spent so; ``device``: its number; ``until_ns``
(CLOCK_MONOTONIC). It ends then, when standard input closes, or when its parent is gone; the driver frees what
it holds. Settings of the device are left alone. Work is queued a millisecond at a time, so that its end is
never far.

One JSON line when it begins, one at the end. Through the driver's own library: nothing to install.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

from bounds import Bounds, say

Spec = dict[str, Any]
CYCLE_NS = 20_000_000
COPY_BYTES, PIECE_BYTES = 256 << 20, 32 << 20
LEFT_FREE_BYTES, MOST_TAKEN_BYTES = 2 << 30, 8 << 30
MULTIPROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
THREADS, ROUNDS = 1024, 20_000

BURN = b"""
.version 6.0
.target sm_70
.address_size 64
.visible .entry burn(.param .u32 rounds)
{
  .reg .u32 %r<3>;
  .reg .f32 %f<3>;
  .reg .pred %p;
  ld.param.u32 %r1, [rounds];
  mov.f32 %f1, 0f3F800001;
  mov.f32 %f2, 0f3F800001;
again:
  fma.rn.f32 %f1, %f1, %f2, %f2;
  fma.rn.f32 %f1, %f1, %f2, %f2;
  fma.rn.f32 %f1, %f1, %f2, %f2;
  fma.rn.f32 %f1, %f1, %f2, %f2;
  sub.u32 %r1, %r1, 1;
  setp.ne.u32 %p, %r1, 0;
  @%p bra again;
  setp.eq.f32 %p, %f1, 0f00000000;
  @%p trap;
  ret;
}
\0"""


class Refused(Exception):
    """What the driver would not do, in words."""


class Driver:
    def __init__(self, library: str, number: int) -> None:
        self.lib = ctypes.CDLL(library)
        self.must("cuInit", c_uint(0))
        self.device = c_int()
        self.must("cuDeviceGet", byref(self.device), c_int(number))
        self.context = self.open(self.device)

    def must(self, name: str, *arguments: Any) -> None:
        code = getattr(self.lib, name)(*arguments)
        if code:
            raise Refused(f"{name} says {code}")

    def open(self, device: c_int) -> c_void_p:
        context = c_void_p()
        self.must("cuCtxCreate_v2", byref(context), c_uint(0), device)
        return context

    def allocate(self, size: int) -> c_uint64:
        address = c_uint64()
        self.must("cuMemAlloc_v2", byref(address), c_size_t(size))
        return address

    def wait(self) -> None:
        self.must("cuCtxSynchronize")


Round = Callable[[], None]


def contention(driver: Driver, _spec: Spec) -> Round:
    module, function, count = c_void_p(), c_void_p(), c_int()
    driver.must("cuModuleLoadData", byref(module), ctypes.c_char_p(BURN))
    driver.must("cuModuleGetFunction", byref(function), module, ctypes.c_char_p(b"burn"))
    driver.must("cuDeviceGetAttribute", byref(count), c_int(MULTIPROCESSORS), driver.device)
    rounds = (c_uint * 1)(ROUNDS)
    given = (ctypes.POINTER(c_uint * 1) * 1)(ctypes.pointer(rounds))  # which keeps what it points to
    grid, block = (c_uint(2 * count.value), c_uint(1), c_uint(1)), (c_uint(THREADS), c_uint(1), c_uint(1))

    def once() -> None:
        driver.must("cuLaunchKernel", function, *grid, *block, c_uint(0), c_void_p(), given, c_void_p())

    return once


def memory_bandwidth(driver: Driver, _spec: Spec) -> Round:
    source, target = driver.allocate(COPY_BYTES), driver.allocate(COPY_BYTES)
    return lambda: driver.must("cuMemcpyDtoDAsync_v2", target, source, c_size_t(COPY_BYTES), c_void_p())


def pcie(driver: Driver, _spec: Spec) -> Round:
    host, there = c_void_p(), driver.allocate(PIECE_BYTES)
    driver.must("cuMemAllocHost_v2", byref(host), c_size_t(PIECE_BYTES))

    def once() -> None:
        driver.must("cuMemcpyHtoDAsync_v2", there, host, c_size_t(PIECE_BYTES), c_void_p())
        driver.must("cuMemcpyDtoHAsync_v2", host, there, c_size_t(PIECE_BYTES), c_void_p())

    return once


def link(driver: Driver, spec: Spec) -> Round:
    """To the next device, through whatever joins the two."""
    count, other = c_int(), c_int()
    driver.must("cuDeviceGetCount", byref(count))
    if count.value < 2:
        raise Refused("there is one device alone, so no link")
    driver.must("cuDeviceGet", byref(other), c_int((spec["device"] + 1) % count.value))
    here = driver.allocate(COPY_BYTES)
    context = driver.open(other)
    there = driver.allocate(COPY_BYTES)
    driver.must("cuCtxSetCurrent", driver.context)

    def once() -> None:
        size = c_size_t(COPY_BYTES)
        driver.must("cuMemcpyPeerAsync", there, context, here, driver.context, size, c_void_p())

    return once


def allocator(driver: Driver, _spec: Spec) -> Round:
    """Never takes what is needed: 2 GiB stay free."""

    def once() -> None:
        free, total = c_size_t(), c_size_t()
        driver.must("cuMemGetInfo_v2", byref(free), byref(total))
        size = min(MOST_TAKEN_BYTES, free.value - LEFT_FREE_BYTES)
        if size <= 0:
            raise Refused(f"{free.value >> 20} MiB are free on the device: too few to take any")
        driver.must("cuMemFree_v2", driver.allocate(size))

    return once


KINDS: dict[str, Callable[[Driver, Spec], Round]] = {
    "contention": contention,
    "memory_bandwidth": memory_bandwidth,
    "pcie": pcie,
    "link": link,
    "allocator": allocator,
}


def main() -> None:
    spec = json.loads(sys.argv[1])
    bounds = Bounds(spec["until_ns"], spare_s=13)
    try:
        driver = Driver(spec["library"], spec["device"])
        once = KINDS[spec["kind"]](driver, spec)
        once()
        driver.wait()
        rounds, busy_ns, begun_ns = 0, 0, time.monotonic_ns()
        say(begun_ns=begun_ns, pid=os.getpid())
        while not bounds.over():
            cycle_ns = time.monotonic_ns()
            while time.monotonic_ns() - cycle_ns < spec["share"] * CYCLE_NS:
                once()
                driver.wait()
                rounds += 1
            now_ns = time.monotonic_ns()
            busy_ns += now_ns - cycle_ns
            if bounds.over((cycle_ns + CYCLE_NS - now_ns) / 1e9):
                break
    except (Refused, OSError, AttributeError) as error:
        say(error=str(error)[:300])
        return
    say(begun_ns=begun_ns, ended_ns=time.monotonic_ns(), busy_ns=busy_ns, rounds=rounds)


if __name__ == "__main__":
    main()
