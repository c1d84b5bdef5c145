"""Engines that no pack knows, in four shapes: for the search of anchors to be measured and tested on.

Runs as a program of its own, on any Python, with the standard library alone: ``made_up_engine.py SHAPE FILE
[LOAD]``. A step burns processor time according to its batch. FILE receives one line of 16 bytes for each
step: its end (CLOCK_MONOTONIC) and its duration, nanoseconds, little-endian. LOAD (default 1) is the share of
the time in which requests come.
"""

import asyncio
import queue
import random
import struct
import sys
import threading
import time

LINE = struct.Struct("<qq")
ROUNDS_PER_REQUEST = 8000
LAYERS = 4


def attend(rounds):
    total = 0
    for number in range(rounds):
        total += number * number
    return total


class Model:
    """Some layers, each of which costs time by the size of the batch."""

    def __init__(self, scale):
        self.scale = scale

    def layer(self, batch):
        return attend(int(ROUNDS_PER_REQUEST * self.scale * (2 + len(batch))))

    def forward(self, batch):
        return sum(self.layer(batch) for _ in range(LAYERS))


class Planner:
    """Requests that wait and requests that run."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.running = []
        self.arrived = queue.SimpleQueue()

    def admit(self):
        while not self.arrived.empty() and len(self.running) < 8:
            self.running.append(self.arrived.get())

    def plan(self):
        self.admit()
        attend(ROUNDS_PER_REQUEST)
        return list(self.running)

    def finish(self, batch):
        attend(ROUNDS_PER_REQUEST // 2)
        for request in batch:
            request["left"] -= 1
        self.running = [request for request in self.running if request["left"] > 0]

    def new_request(self):
        return {"left": self.random.randint(8, 40)}


class Engine:
    """What all shapes share: a planner, a model, and the record of steps."""

    def __init__(self, path, load):
        self.planner = Planner(1)
        self.model = Model(1.0)
        self.load = load
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 - for as long as it runs

    def note(self, start, end):
        self.file.write(LINE.pack(end, end - start))

    def refill(self):
        """A closed loop of clients: whoever got an answer asks again."""
        while len(self.planner.running) + self.planner.arrived.qsize() < 4:
            self.planner.arrived.put(self.planner.new_request())

    def rest(self, took):
        return took / self.load - took if self.load < 1 else 0.0


class PlainEngine(Engine):
    def one_iteration(self):
        batch = self.planner.plan()
        self.model.forward(batch)
        self.planner.finish(batch)

    def serve(self):
        while True:
            self.refill()
            start = time.monotonic_ns()
            self.one_iteration()
            end = time.monotonic_ns()
            self.note(start, end)
            if self.load < 1:
                time.sleep(self.rest((end - start) / 1e9))


class ThreadedEngine(Engine):
    """The loop runs in a thread and waits for work on a queue; the main thread feeds it."""

    def __init__(self, path, load):
        super().__init__(path, load)
        self.inbox = queue.Queue()

    def take_requests(self):
        while not self.planner.running and self.planner.arrived.empty():
            self.planner.arrived.put(self.inbox.get())
        while not self.inbox.empty():
            self.planner.arrived.put(self.inbox.get())

    def run_step(self):
        start = time.monotonic_ns()
        batch = self.planner.plan()
        self.model.forward(batch)
        self.planner.finish(batch)
        self.note(start, time.monotonic_ns())

    def turn(self):
        self.take_requests()
        self.run_step()

    def loop(self):
        while True:
            self.turn()

    def serve(self):
        threading.Thread(target=self.loop, daemon=True).start()
        while True:
            if self.inbox.qsize() + len(self.planner.running) < 4:
                self.inbox.put(self.planner.new_request())
            time.sleep(0.002 / self.load)


class PollingEngine(Engine):
    """The loop turns whether there is work or not, and waits a little in a turn without."""

    def __init__(self, path, load):
        super().__init__(path, load)
        self.woken = threading.Event()

    def work(self):
        batch = self.planner.plan()
        self.model.forward(batch)
        self.planner.finish(batch)

    def turn(self):
        self.planner.admit()
        if not self.planner.running:
            self.woken.wait(timeout=0.02)
            self.woken.clear()
            return
        start = time.monotonic_ns()
        self.work()
        self.note(start, time.monotonic_ns())

    def loop(self):
        while True:
            self.turn()

    def serve(self):
        threading.Thread(target=self.loop, daemon=True).start()
        while True:
            self.refill()
            self.woken.set()
            busy = time.monotonic() + 0.3
            while self.load == 1 or time.monotonic() < busy:
                self.refill()
                time.sleep(0.003)
            time.sleep(0.3 / self.load - 0.3)


class AsyncEngine(Engine):
    """One event loop: requests arrive in tasks, steps are awaited coroutines."""

    async def execute(self, batch):
        await asyncio.sleep(0)
        return self.model.forward(batch)

    async def step(self):
        batch = self.planner.plan()
        await self.execute(batch)
        self.planner.finish(batch)

    async def run_engine(self):
        while True:
            if not self.planner.running and self.planner.arrived.empty():
                await asyncio.sleep(0.001)
                continue
            start = time.monotonic_ns()
            await self.step()
            end = time.monotonic_ns()
            self.note(start, end)
            if self.load < 1:
                await asyncio.sleep(self.rest((end - start) / 1e9))

    async def client(self):
        while True:
            self.refill()
            await asyncio.sleep(0.003)

    async def main(self):
        await asyncio.gather(self.run_engine(), self.client())

    def serve(self):
        asyncio.run(self.main())


SHAPES = {"plain": PlainEngine, "thread": ThreadedEngine, "polling": PollingEngine, "asyncio": AsyncEngine}


def main():
    shape, path = sys.argv[1:3]
    engine = SHAPES[shape](path, float(sys.argv[3]) if len(sys.argv) > 3 else 1.0)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    engine.serve()


if __name__ == "__main__":
    main()
