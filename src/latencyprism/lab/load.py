"""Load on a lab server from a process of its own.

>>> with Load(server, profile("mixed").but(duration_s=10)) as load:
...     load.wait()
>>> load.result().summary()

The same from a shell: ``python -m latencyprism.lab.load --engine vllm --port 8000 --model tiny --profile
decode``.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import numpy as np

from latencyprism.errors import BadInput, PrismError
from latencyprism.lab.generate import Generator, Target
from latencyprism.lab.install import ENGINES
from latencyprism.lab.outcome import GAP, Result, read
from latencyprism.lab.profiles import PROFILES, Length, Profile, profile
from latencyprism.lab.serve import Server


class Load:
    """A load generator process. It ends by itself where the profile says so, by ``stop``, or with its
    starter."""

    def __init__(
        self, server: Server, profile: Profile, *, timeout_s: float = 60.0, drain_s: float = 20.0
    ) -> None:
        self._target = Target(server.engine, server.port, server.model)
        self._profile, self._timeout_s, self._drain_s = profile, timeout_s, drain_s
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._result: Result | None = None

    @property
    def pid(self) -> int:
        return self._running().pid

    def start(self) -> Load:
        if self._process is not None:
            raise PrismError("this load was started already")
        self._folder = tempfile.TemporaryDirectory(prefix="latencyprism-load-")
        order = {
            "target": asdict(self._target),
            "profile": asdict(self._profile),
            "timeout_s": self._timeout_s,
            "drain_s": self._drain_s,
        }
        # The order goes through a file and standard input stays open: its end, also by our death, stops the
        # load.
        (Path(self._folder.name) / "order.json").write_text(json.dumps(order))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "latencyprism.lab.load", "--order", self._folder.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        return self

    def wait(self, timeout_s: float | None = None) -> None:
        """Until it has ended by itself; raises PrismError where that takes longer than ``timeout_s``."""
        try:
            self._running().wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise PrismError("the load did not end", f"in {timeout_s} s") from None

    def stop(self) -> None:
        """Send nothing more, let what is in flight finish (``drain_s``), and end. Harmless twice."""
        process = self._process
        if process is None:
            return
        if process.stdin and not process.stdin.closed:
            process.stdin.close()
        try:
            process.wait(self._drain_s + 10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def result(self) -> Result:
        """What it measured; stops it first where it still runs."""
        if self._result is None:
            process = self._running()
            self.stop()
            assert process.stderr is not None and self._folder is not None
            said = process.stderr.read().decode("utf-8", "replace").strip()
            process.stderr.close()
            if process.returncode != 0:
                raise PrismError("the load generator failed", said[-400:])
            folder = Path(self._folder.name)
            self._result = read(folder / "result.json", folder / "gaps.bin")
            self._folder.cleanup()
        return self._result

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise PrismError("this load was not started")
        return self._process

    def __enter__(self) -> Load:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def run(target: Target, profile: Profile, *, timeout_s: float, drain_s: float, until_eof: bool) -> Result:
    """Generate load in this process until the profile ends, SIGINT, SIGTERM or (``until_eof``) the end of
    stdin."""
    stop = [False]

    def on_signal(_number: int, _frame: object) -> None:
        stop[0] = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    def stopping() -> bool:
        if until_eof and select.select([0], [], [], 0)[0] and not os.read(0, 64):
            stop[0] = True
        return stop[0]

    generator = Generator(target, profile, stopping, timeout_s=timeout_s, drain_s=drain_s)
    began, ended = generator.run()
    gaps = np.frombuffer(generator.gaps.tobytes(), dtype=GAP)
    return Result(profile.name, began, ended, generator.requests, gaps)


def _obey(folder: Path) -> None:
    order = json.loads((folder / "order.json").read_text())
    fields = order["profile"]
    wanted = Profile(**{**fields, "prompt": Length(**fields["prompt"]), "output": Length(**fields["output"])})
    result = run(
        Target(**order["target"]),
        wanted,
        timeout_s=order["timeout_s"],
        drain_s=order["drain_s"],
        until_eof=True,
    )
    result.write(folder / "result.json", folder / "gaps.bin")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m latencyprism.lab.load", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--order", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--engine", choices=ENGINES, default="vllm")
    parser.add_argument("--port", type=int, help="port of the server on 127.0.0.1")
    parser.add_argument("--model", default="tiny", help="the name by which the server knows its model")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="mixed")
    parser.add_argument("--clients", type=int)
    parser.add_argument("--rate", type=float, help="requests a second, open loop")
    parser.add_argument("--requests", type=int)
    parser.add_argument("--duration", type=float, help="seconds (10 where no number of requests is given)")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output", type=Path, help="JSON file; the summary alone is printed without it")
    parser.add_argument("--gaps", type=Path, help="binary file of every arrival (with --output)")
    options = parser.parse_args(arguments)
    try:
        if options.order:
            _obey(options.order)
            return 0
        if options.port is None:
            raise BadInput("--port is missing")
        changes = {name: getattr(options, name) for name in ("clients", "rate", "requests", "seed")}
        wanted = profile(options.profile).but(
            **{name: value for name, value in changes.items() if value is not None}
        )
        if options.duration or wanted.requests is None:
            wanted = wanted.but(duration_s=options.duration or 10.0)
        target = Target(options.engine, options.port, options.model)
        result = run(target, wanted, timeout_s=60.0, drain_s=20.0, until_eof=False)
        if options.output:
            result.write(options.output, options.gaps)
        sys.stdout.write(json.dumps(result.summary(), indent=2) + "\n")
        return 1 if result.failures else 0
    except PrismError as failure:
        sys.stderr.write(f"{failure}\n")
        return failure.exit_code


if __name__ == "__main__":
    sys.exit(main())
