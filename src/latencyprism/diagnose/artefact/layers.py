"""Which layer an operation of the tables belongs to."""

from __future__ import annotations

_COLLECTIVES = (
    "nccl", "rccl", "hccl", "all_reduce", "allreduce", "allgather", "reduce_1stage", "reduce_2stage",
)  # fmt: skip
_MATRIX = ("gemm", "gemv", "cutlass", "matmul", "_mm_kernel")
_COPIES = ("h2d", "d2h", "d2d")


def layer_of(kind: str, operation: str, device: str) -> str:
    """The layer of an operation, ``""`` for those that say nothing on their own (waits on the device)."""
    kind, name = kind.lower(), operation.lower()
    if kind in ("oncpu", "runq"):
        return kind
    if device == "Host" or not device:
        return "write" if name in ("write", "pwrite64", "writev", "sendto") else ""
    if "memset" in name:
        return "memset"
    if kind.startswith("gpu_memcpy"):
        return next((copy for copy in _COPIES if kind.endswith(copy)), "")
    if kind == "gpu_comm" or any(word in name for word in _COLLECTIVES):
        return "collective"
    if not kind.startswith("gpu"):
        return ""
    return "gemm" if any(word in name for word in _MATRIX) else "kernel"
