"""Symbols as data, found in real files: versions, twins, prologues."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

import pytest

from latencyprism.attach.elf import Elf
from latencyprism.xpu.symbols import KINDS, find_libraries, load_libraries, prologue

Build = Callable[..., str]
RUNTIME = """
__attribute__((naked)) int cudaLaunchKernel(void) { __asm__("push %rbp; pop %rbp; xor %eax,%eax; ret"); }
__attribute__((naked)) int cudaLaunchKernel_ptsz(void) { __asm__("endbr64; push %r12; pop %r12; ret"); }
__attribute__((naked)) int cudaGraphLaunch(void) { __asm__("sub $8,%rsp; add $8,%rsp; ret"); }
__attribute__((naked)) int cudaMalloc(void) { __asm__("endbr64; sub $8,%rsp; add $8,%rsp; ret"); }
"""
x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 prologues")


def test_every_entry_is_whole_and_every_kind_known() -> None:
    libraries = load_libraries()
    assert {library.vendor for library in libraries} == {"nvidia", "amd", "ascend", "intel", "cpu"}
    for library in libraries:
        assert library.since < library.below and library.functions
        names = [function.name for function in library.functions]
        assert len(names) == len(set(names))
        for function in library.functions:
            assert function.kind in KINDS
            assert all(0 <= at <= 5 for _, at in function.integers), "beyond the integer registers"


def test_patterns_take_what_wheels_and_systems_call_the_files() -> None:
    names = {
        "libcudart.so.13.0.96": "CUDA runtime", "libcudart-9335f6a2.so.12": "CUDA runtime",
        "libcuda.so.580.159.04": "CUDA driver", "libcublasLt.so.13": "cuBLASLt", "libcublas.so.12": "cuBLAS",
        "libnccl.so.2": "NCCL", "librccl.so.1.0.70200": "RCCL", "libamdhip64.so.7": "HIP runtime",
        "libhccl.so": "HCCL", "libze_loader.so.1.24": "Level Zero", "libgomp-a34b3233.so.1.0.0": "GNU OpenMP",
        "libiomp5.so": "LLVM OpenMP", "libcudadebugger.so.1": None, "libgomp.a": None,
    }  # fmt: skip
    for name, expected in names.items():
        found = [library.name for library in load_libraries() if library.file.match(name)]
        assert found == ([expected] if expected else []), name


@x86
def test_a_mapped_library_is_found_with_its_twins_and_prologues(build: Build) -> None:
    path = build("cudart", source=RUNTIME, stem="libcudart.so.13.0.1")
    ctypes.CDLL(path)
    mapped = next(each for each in find_libraries(os.getpid()) if each.mapping.path == path)
    assert mapped.library.name == "CUDA runtime" and mapped.version == 13 and mapped.note is None
    assert {symbol.name: symbol.prologue for symbol in mapped.symbols} == {
        "cudaLaunchKernel": "push",
        "cudaLaunchKernel_ptsz": "endbr64+push",
        "cudaGraphLaunch": "other",
        "cudaMalloc": "endbr64+other",
    }
    launches = next(e for e in find_libraries(os.getpid(), ["launch"]) if e.mapping.path == path)
    assert {symbol.name for symbol in launches.symbols} == {"cudaLaunchKernel", "cudaLaunchKernel_ptsz"}


@x86
def test_a_version_nobody_checked_is_said_to_be_so(build: Build) -> None:
    path = build("cudart", source=RUNTIME, stem="libcudart.so.99")
    ctypes.CDLL(path)
    mapped = next(each for each in find_libraries(os.getpid()) if each.mapping.path == path)
    assert mapped.symbols and mapped.note == "CUDA runtime 99 is outside the versions that were checked"


def test_a_library_deleted_while_mapped_still_tells_its_symbols_or_why_not(build: Build) -> None:
    path = build("nccl", source="int ncclAllReduce(void) { return 0; }", stem="libnccl.so.2.30.1")
    ctypes.CDLL(path)
    os.unlink(path)
    mapped = next(each for each in find_libraries(os.getpid()) if each.mapping.path == path)
    assert [symbol.name for symbol in mapped.symbols] == ["ncclAllReduce"] or mapped.note


@x86
def test_a_stripped_library_keeps_its_dynamic_symbols(build: Build) -> None:
    path = build("gomp", "-s", source="int GOMP_parallel(void) { return 0; }", stem="libgomp.so.1")
    with Elf(path) as elf:
        assert prologue(elf, elf.lookup(["GOMP_parallel"])["GOMP_parallel"].value) in (
            "other",
            "endbr64+other",
        )
