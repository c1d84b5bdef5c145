"""A TCP proxy on loopback that passes everything on later: ``python -E -s -S proxy.py SPEC``, a JSON object.

``host``, ``port``: where to; ``delay_ns``: of each way, between ``from_ns`` and ``to_ns`` (CLOCK_MONOTONIC),
none before and after; ``until_ns``: when to end. It ends then, when standard input closes, or when its parent
is gone; connections through it end with it. One JSON line with the port that it listens on, one at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import sys
import time
from typing import Any

from bounds import say

Spec = dict[str, Any]
PIECE_BYTES = 64 << 10
MOST_QUEUED = 256
LOOK_S = 0.01


class Proxy:
    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.pieces = self.bytes = self.delayed = self.delay_ns = self.connections = 0
        self.tasks: set[asyncio.Task[None]] = set()

    def delay_at(self, now_ns: int) -> int:
        return int(self.spec["delay_ns"]) if self.spec["from_ns"] <= now_ns < self.spec["to_ns"] else 0

    async def take(self, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[int, int, bytes]]) -> None:
        data = b"first"
        while data:
            try:
                data = await reader.read(PIECE_BYTES)
            except OSError:
                data = b""
            now_ns = time.monotonic_ns()
            await queue.put((now_ns, now_ns + self.delay_at(now_ns), data))

    async def give(self, queue: asyncio.Queue[tuple[int, int, bytes]], writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while True:
                came_ns, due_ns, data = await queue.get()
                left_ns = due_ns - time.monotonic_ns()
                if left_ns > 0:
                    await asyncio.sleep(left_ns / 1e9)
                if not data:
                    if writer.can_write_eof():
                        writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()
                self.pieces += 1
                self.bytes += len(data)
                if due_ns > came_ns:
                    self.delayed += 1
                    self.delay_ns += time.monotonic_ns() - came_ns

    async def way(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[tuple[int, int, bytes]] = asyncio.Queue(MOST_QUEUED)
        taking = asyncio.ensure_future(self.take(reader, queue))
        try:
            await self.give(queue, writer)
        finally:
            taking.cancel()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            there, here = await asyncio.open_connection(self.spec["host"], self.spec["port"])
        except OSError:
            writer.close()
            return
        await asyncio.gather(self.way(reader, here), self.way(there, writer))
        here.close()
        writer.close()

    async def run(self) -> None:
        parent = os.getppid()
        server = await asyncio.start_server(self.serve, "127.0.0.1", self.spec.get("listen", 0))
        say(port=server.sockets[0].getsockname()[1])
        while time.monotonic_ns() < self.spec["until_ns"] and os.getppid() == parent:
            # Nothing is ever written to it: readable means closed.
            if select.select([0], [], [], 0)[0]:
                break
            await asyncio.sleep(LOOK_S)
        server.close()


def main() -> None:
    spec = json.loads(sys.argv[1])
    proxy = Proxy(spec)
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(proxy.run())
    except OSError as error:
        say(error=error.strerror or str(error))
    say(
        begun_ns=spec["from_ns"],
        ended_ns=min(time.monotonic_ns(), spec["to_ns"]),
        connections=proxy.connections,
        pieces=proxy.pieces,
        bytes=proxy.bytes,
        delayed=proxy.delayed,
        delay_ns=proxy.delay_ns,
    )
    os._exit(0)


if __name__ == "__main__":
    main()
