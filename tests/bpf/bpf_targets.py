"""Processes to probe, and a prober to kill."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

from latencyprism.attach.maps import Mapping, open_mapped, read_maps

# Answers "N" lines: calls wctob N times through ctypes, then says so.
_CALLER = """
import ctypes, sys
call = ctypes.CDLL(None).wctob
print("ready", flush=True)
for line in sys.stdin:
    for _ in range(int(line)):
        call(65)
    print("done", flush=True)
"""


@dataclass
class Caller:
    """A Python process that calls a function of the C library when told to."""

    process: subprocess.Popen[str]

    @property
    def pid(self) -> int:
        return self.process.pid

    def library(self) -> Mapping:
        return next(
            m
            for m in read_maps(self.pid)
            if os.path.basename(m.path).startswith("libc.so") and "x" in m.perms
        )

    def open_library(self) -> int:
        return open_mapped(self.pid, self.library())

    def call(self, times: int) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{times}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


def start_caller() -> Caller:
    process = subprocess.Popen(
        [sys.executable, "-c", _CALLER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    return Caller(process)
