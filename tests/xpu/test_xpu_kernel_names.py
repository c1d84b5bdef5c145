"""Kernels classed by name, from data that checks itself."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

from latencyprism.errors import PrismError
from latencyprism.timeline.collectives import MEETING
from latencyprism.xpu.kernel_names import Meaning, meaning_of, read_names

TEXT = files("latencyprism.xpu").joinpath("kernel_names.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("ncclDevKernel_AllReduce_Sum_f32_TREE_LL(ncclDevKernelArgs)", ("kernel", "all_reduce")),
        ("ncclKernel_AllGather_RING_LL_Sum_int8_t(ncclDevComm*)", ("kernel", "all_gather")),
        ("ncclSymkDevKernel_AllGather_LLMC(ncclSymkDevWorkArgs4K)", ("kernel", "all_gather")),
        ("ncclDevKernel_Generic(ncclDevKernelArgsStorage<4096ul>)", ("kernel", "other")),
        ("void vllm::cross_device_reduce_2stage<c10::BFloat16, 4>()", ("kernel", "all_reduce")),
        ("hcom_broadcast__1_2_3", ("kernel", "broadcast")),
        ("Memcpy DtoD (Device -> Device)", ("copy", None)),
        ("Memset (Device)", ("copy", None)),
        ("Stream Sync", ("wait", None)),
        ("void MemcpyLikeKernel(float*)", ("kernel", None)),
        ("void cutlass::Kernel<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>()", ("kernel", None)),
        ("", ("kernel", None)),
    ],
)  # fmt: skip
def test_names_of_each_kind(name: str, meaning: tuple[str, str | None]) -> None:
    assert meaning_of(name) == Meaning(*meaning)


def test_a_collective_of_a_later_day_is_doubted_not_passed_over() -> None:
    assert meaning_of("ncclNextKernel_AllReduce_v9") == Meaning("kernel", None, True)
    assert meaning_of("new::lib::all_reduce_cluster_kernel") == Meaning("kernel", None, True)


def test_the_words_are_those_of_the_timeline() -> None:
    told = set(re.findall(r'= "([a-z_]+)"', "".join(re.findall(r"^collectives = .*$", TEXT, re.MULTILINE))))
    assert {"all_reduce", "all_gather", "reduce_scatter", "all_to_all"} <= told & MEETING


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("cross_device_reduce_[12]stage", "cross_device_reduce_3stage", "is not an example of custom"),
        ('SendRecv = "send_recv", ', "", "is other, not send_recv"),
        ("'^Mem(?:cpy|set)", "'Mem|reduce_kernel|(?:cpy|set)", "is no plain kernel"),
    ],
)
def test_a_table_that_contradicts_its_examples_is_refused(before: str, after: str, why: str) -> None:
    assert before in TEXT
    with pytest.raises(PrismError, match=why):
        read_names(TEXT.replace(before, after))
