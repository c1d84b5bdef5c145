"""A load generator process that sends what a list of arrivals says, when it says so.

Started by ``Replayed``; reads its order from a file, ends with its standard input.
"""

from __future__ import annotations

import heapq
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random

from latencyprism.bench.traces import Arrival, Scale, prompt_of
from latencyprism.errors import PrismError
from latencyprism.lab.generate import Generator, Target
from latencyprism.lab.outcome import GAP, Result, read
from latencyprism.lab.profiles import Length, Profile
from latencyprism.lab.serve import Server


class _Listed(Profile):
    """Prompts and lengths from a list, one after the other."""

    def __init__(self, name: str, arrivals: Sequence[Arrival], scale: Scale, seed: int, clients: int) -> None:
        super().__init__(name, clients, Length(1), Length(1), rate=1.0, requests=len(arrivals), seed=seed)
        object.__setattr__(self, "_rest", enumerate(arrivals))
        object.__setattr__(self, "_scale", scale)

    def draw(self, rng: Random) -> tuple[list[int], int]:
        number, arrival = next(self._rest)  # type: ignore[attr-defined]
        return prompt_of(arrival, number, self._scale, self.seed), arrival.output  # type: ignore[attr-defined]


class _Timed(Generator):
    """Sends at the times of the list instead of at random ones."""

    def __init__(
        self, target: Target, profile: Profile, times_s: Sequence[float], stopping: Callable[[], bool]
    ) -> None:
        super().__init__(target, profile, stopping)
        self._times_s: Sequence[float] | None = times_s

    def _send_due(self) -> None:
        if self._times_s is not None:
            began = time.monotonic_ns()
            self._due = [began + int(at * 1e9) for at in self._times_s]
            self._times_s = None
        while self._due and self._due[0] <= time.monotonic_ns() and len(self._flights) < self.profile.clients:
            self._send(heapq.heappop(self._due))


class Replayed:
    """A replay under way; ``stop`` ends it early, ``result`` says what its clients saw."""

    def __init__(
        self, server: Server, name: str, arrivals: Sequence[Arrival], scale: Scale, *, seed: int = 0,
        clients: int = 256,
    ) -> None:  # fmt: skip
        self._folder = tempfile.TemporaryDirectory(prefix="latencyprism-replay-")
        order = {
            "target": asdict(Target(server.engine, server.port, server.model)), "name": name, "seed": seed,
            "clients": clients, "scale": asdict(scale), "arrivals": [list(a) for a in arrivals],
        }  # fmt: skip
        (Path(self._folder.name) / "order.json").write_text(json.dumps(order))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "latencyprism.bench.replayed", self._folder.name],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        """Send nothing more; what is in flight finishes."""
        if self._process.stdin and not self._process.stdin.closed:
            self._process.stdin.close()

    def stop(self) -> None:
        """``end``, and wait until it has."""
        self.end()
        try:
            self._process.wait(40)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def result(self) -> Result:
        self.stop()
        assert self._process.stderr is not None
        said = self._process.stderr.read().decode("utf-8", "replace").strip()
        self._process.stderr.close()
        if self._process.returncode != 0:
            raise PrismError("the replay failed", said[-400:])
        folder = Path(self._folder.name)
        found = read(folder / "result.json", folder / "gaps.bin")
        self._folder.cleanup()
        return found


def main(folder: Path) -> None:
    order = json.loads((folder / "order.json").read_text())
    arrivals = [
        Arrival(at, prompt, output, tuple(blocks)) for at, prompt, output, blocks in order["arrivals"]
    ]
    stop = [False]

    def stopping() -> bool:
        if select.select([0], [], [], 0)[0] and not os.read(0, 64):
            stop[0] = True
        return stop[0]

    import numpy as np

    profile = _Listed(order["name"], arrivals, Scale(**order["scale"]), order["seed"], order["clients"])
    generator = _Timed(Target(**order["target"]), profile, [a.at_s for a in arrivals], stopping)
    began, ended = generator.run()
    gaps = np.frombuffer(generator.gaps.tobytes(), dtype=GAP)
    result = Result(order["name"], began, ended, generator.requests, gaps)
    result.write(folder / "result.json", folder / "gaps.bin")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
