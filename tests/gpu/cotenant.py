"""Another tenant of the same device: lines ``sm 5``, ``hbm 5``, ``pcie 5`` on standard input make it busy for
so many seconds. Answers ``begin`` and ``end`` with CLOCK_MONOTONIC times. Plain allocations; the device's
settings are left alone. Ends when standard input closes."""

from __future__ import annotations

import json
import sys
import time

import torch

LONGEST_S = 30.0


def say(event: str, **more: object) -> None:
    sys.stdout.write(json.dumps({"event": event, "time_ns": time.monotonic_ns(), **more}) + "\n")
    sys.stdout.flush()


def prepare(kind: str) -> tuple[object, float]:
    """(one round of work, its bytes or operations)."""
    if kind == "sm":
        left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(left)
        return lambda: torch.matmul(left, right, out=out), 2 * 8192.0**3
    size = 2 << 30 if kind == "hbm" else 256 << 20
    device = torch.empty(size, dtype=torch.uint8, device="cuda")
    if kind == "hbm":
        other = torch.empty_like(device)
        return lambda: other.copy_(device), 2.0 * size
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def both_ways() -> None:
        device.copy_(host, non_blocking=True)
        host.copy_(device, non_blocking=True)

    return both_ways, 2.0 * size


def burn(kind: str, seconds: float) -> None:
    action, amount = prepare(kind)
    action()
    torch.cuda.synchronize()
    say("begin", kind=kind)
    until = time.monotonic() + min(seconds, LONGEST_S)
    rounds = 0
    start = time.monotonic()
    while time.monotonic() < until:
        # A few rounds queued, so that the device never waits for this process, and an end that is near.
        for _ in range(4):
            action()
            rounds += 1
        torch.cuda.synchronize()
    spent = time.monotonic() - start
    say("end", kind=kind, rounds=rounds, per_s=amount * rounds / spent)


def main() -> None:
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    say("ready")
    for line in sys.stdin:
        words = line.split()
        if not words or words[0] == "stop":
            break
        burn(words[0], float(words[1]))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
