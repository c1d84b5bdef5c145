"""A busy stand-in for an engine, run by the interpreter under test: ``attach_target.py FOLDER``.

Its main thread goes through the calls of an engine step; three more threads work beside it. Every result is
compared with what it must be. In FOLDER: ``loop``, a shared file of 8-byte words that it writes (see
LOOP_*), the pipe ``wake``, and ``result.json`` at its end. Standard library alone; it imports beforehand
what any engine has imported.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import math
import mmap
import os
import socket
import sys
import threading
import time
import types
import zlib
from typing import Any

LOOP_COUNT, LOOP_END, LOOP_WRONG, LOOP_IDLE, LOOP_STAMPS = 0, 1, 2, 3, 8
"""Words of ``loop``: iterations done; set to 1 from outside to end it; wrong results so far; set to 1 from
outside to make it wait for a byte on the pipe ``wake`` before each turn; from word 8 on the time
(CLOCK_MONOTONIC ns) of the end of each iteration, the newest over the oldest."""
STAMPS = 1 << 20

TEXT = json.dumps({"a": [1, 2.5, "x", None] * 20, "b": {"c": list(range(50))}})
VALUE = json.loads(TEXT)
DATA = bytes(range(256)) * 64
PACKED = zlib.compress(DATA)


class Plain:
    """An object with the attributes given."""

    num_scheduled_tokens: dict[str, int]

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


def scheduled() -> Plain:
    """What a scheduler's output looks like: one prompt and three running requests."""
    return Plain(
        num_scheduled_tokens={"a": 40, "b": 1, "c": 1, "d": 1},
        total_num_scheduled_tokens=43,
        scheduled_new_reqs=[Plain(req_id="a", num_computed_tokens=16, prompt_token_ids=[0] * 56)],
        scheduled_cached_reqs=Plain(
            req_ids=["b", "c", "d"],
            resumed_req_ids=set(),
            num_computed_tokens=[100, 200, 50],
            num_output_tokens=[5, 9, 4],
        ),
        scheduled_spec_decode_tokens={},
        finished_req_ids=set(),
    )


def request(name: str) -> Plain:
    """What a scheduler keeps of a running request."""
    return Plain(
        request_id=name,
        arrival_time=0.0,
        num_prompt_tokens=56,
        num_computed_tokens=57,
        num_tokens=58,
        _output_token_ids=[1, 2],
        status="RUNNING",
    )


class Scheduler:
    def __init__(self) -> None:
        self.requests = {name: request(name) for name in "abcd"}
        self.running = list(self.requests.values())
        self.waiting: list[Plain] = []
        self.count = 0

    def schedule(self) -> Plain:
        self.count += 1
        if self.count % 64 == 0:
            self._preempt_request(self.running[3])
        return scheduled()

    def add_request(self, request: Plain) -> None:
        self.waiting.append(request)

    def _preempt_request(self, request: Plain) -> Plain:
        return request

    def get_grammar_bitmask(self, plan: Plain) -> object:
        return None

    def update_from_output(self, plan: Plain, output: Plain) -> int:
        if self.count % 50 == 0:
            raise LookupError("an error of the engine's own")
        return sum(plan.num_scheduled_tokens.values())


class Worker:
    def execute_model(self, plan: Plain) -> None:
        if json.loads(TEXT) != VALUE:
            raise ArithmeticError("json")

    def sample_tokens(self, grammar: object) -> Plain:
        return Plain(sampled_token_ids=[[], [1], [1], [2]], req_id_to_index={"a": 0, "b": 1, "c": 2, "d": 3})


def put_in_place() -> None:
    """The classes under the names by which an engine's are known."""
    for name, owner in (("vllm.v1.core.sched.scheduler", Scheduler), ("vllm.v1.worker.gpu_worker", Worker)):
        module = types.ModuleType(name)
        setattr(module, owner.__name__, owner)
        sys.modules[name] = module


def step(scheduler: Scheduler, worker: Worker) -> bool:
    """One turn of the loop; True when everything came out right."""
    plan = scheduler.schedule()
    worker.execute_model(plan)
    output = worker.sample_tokens(scheduler.get_grammar_bitmask(plan))
    try:
        return scheduler.update_from_output(plan, output) == 43 and scheduler.count % 50 != 0
    except LookupError:
        return scheduler.count % 50 == 0


def series() -> float:
    return math.fsum(math.sin(i) * math.sqrt(i) for i in range(200))


class Beside:
    """Threads that work and check while the main thread does."""

    def __init__(self, words: memoryview) -> None:
        self.ended = False
        self._words = words
        self.wrong: list[str] = []
        self.done = {"zlib": 0, "float": 0, "socket": 0}
        self._left, self._right = socket.socketpair()
        self._series = series()
        self._threads = [threading.Thread(target=self._run, args=(name,)) for name in self.done]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self.ended = True
        for thread in self._threads:
            thread.join()

    def _run(self, name: str) -> None:
        work = {"zlib": self._zlib, "float": lambda: series() == self._series, "socket": self._socket}[name]
        while not self.ended:
            try:
                if not work():
                    self.wrong.append(name)
            except Exception as error:  # noqa: BLE001  # whatever it is, it is a wrong result
                self.wrong.append(f"{name}: {error!r}")
            self.done[name] += 1
            while self._words[LOOP_IDLE] and not self.ended:
                time.sleep(0.05)

    def _zlib(self) -> bool:
        return zlib.decompress(PACKED) == DATA

    def _socket(self) -> bool:
        self._left.sendall(DATA[:4096])
        got = b""
        while len(got) < 4096:
            got += self._right.recv(4096 - len(got))
        return got == DATA[:4096]


def main(folder: str) -> None:
    put_in_place()
    hashlib.blake2b(b"").hexdigest()
    with open(os.path.join(folder, "loop"), "r+b") as file:
        words = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
    wake = os.open(os.path.join(folder, "wake"), os.O_RDWR)
    beside = Beside(words)
    beside.start()
    scheduler, worker = Scheduler(), Worker()
    parent, count, wrong = os.getppid(), 0, 0
    while not words[LOOP_END] and (count & 255 or os.getppid() == parent):
        if words[LOOP_IDLE]:
            os.read(wake, 1)
        try:
            right = step(scheduler, worker)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is a wrong result
            right = False
            beside.wrong.append(f"main: {error!r}")
        if not right:
            wrong += 1
            words[LOOP_WRONG] = wrong
        words[LOOP_STAMPS + count % STAMPS] = time.monotonic_ns()
        count += 1
        words[LOOP_COUNT] = count
    beside.stop()
    told = {
        "wrong": wrong + len(beside.wrong),
        "examples": beside.wrong[:5],
        "done": {"main": count, **beside.done},
        "garbage": len(gc.garbage),
        "errno": ctypes.get_errno(),
    }
    with open(os.path.join(folder, "result.json"), "w", encoding="utf-8") as out:
        json.dump(told, out)


if __name__ == "__main__":
    main(sys.argv[1])
