"""Everything that is checked about this project, in one command: ``make test``.

``run_tests.py [--lint-only] [--fast] [PYTEST_ARGUMENTS...]``; --fast leaves out what starts a real engine.
Exits with 1 where a check or a test failed, or where a test was skipped although this machine has what it
needs: what can be had here is found by trying it, and handed to tests/conftest.py as LATENCYPRISM_REQUIRE.
pytest comes last, so that its summary is the last line. Up to AGAIN failed tests are run once more,
alone, and named if they pass then.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import debian_packages

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
AGAIN = 5
"""Many tests watch real engines on a machine that others use, too: one in some hundred can meet a second in
which it has no processor. More than a few failures are no such seconds."""
LAST_FAILED = ROOT / ".pytest_cache" / "v" / "cache" / "lastfailed"
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--lint-only", action="store_true", help="format, lint, types and import layers alone"
    )
    parser.add_argument("--fast", action="store_true", help="leave out what starts a real engine")
    options, pytest_arguments = parser.parse_known_args()
    failed = [] if options.fast and not options.lint_only else lint()
    if options.lint_only:
        say(f"failed: {', '.join(failed)}" if failed else "all checks passed")
        return 1 if failed else 0
    left = debian_packages.ensure()
    if left:
        say(f"missing, their tests will be skipped: apt-get install {' '.join(left)}")
    required = [name for name, there in (("root", can_ptrace()), ("bpf", can_bpf())) if there]
    if not options.fast and engines():
        required.append("engine")
    say(f"tests that need these must run: {', '.join(required) or 'none'}")
    LAST_FAILED.unlink(missing_ok=True)
    status = pytest(required, options.fast, pytest_arguments, failed)
    if status == 1:
        status = once_more(required, pytest_arguments)
    return 1 if failed else status


def once_more(required: list[str], arguments: list[str]) -> int:
    """The tests that failed, if they are few. 1: some fail again, or they were too many."""
    again = sorted(json.loads(LAST_FAILED.read_text())) if LAST_FAILED.is_file() else []
    if not 0 < len(again) <= AGAIN:
        return 1
    say(f"{len(again)} failed, once more: {' '.join(again)}")
    status = pytest(required, False, [*arguments, "--last-failed"], [])
    if status == 0:
        say(f"FAILED AT FIRST, passed when run once more: {' '.join(again)}")
    return status


def lint() -> list[str]:
    """Names of the checks that failed; each prints its own findings."""
    places = [name for name in ("src", "tests", "scripts") if (ROOT / name).is_dir()]
    checks = {
        "ruff format": [str(BIN / "ruff"), "format", "--check", "--quiet", *places],
        "ruff check": [str(BIN / "ruff"), "check", "--quiet", *places],
        "mypy": [str(BIN / "mypy")],
        "import layers": [str(BIN / "lint-imports"), "--no-cache"],
    }
    failed = []
    for name, command in checks.items():
        began = time.monotonic()
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        say(f"{name}: {'ok' if result.returncode == 0 else 'FAILED'} ({time.monotonic() - began:.0f} s)")
        if result.returncode != 0:
            print((result.stdout + result.stderr).rstrip(), flush=True)
            failed.append(name)
    return failed


def engines() -> bool:
    """Install the engines one after the other; true where at least the smallest can be had."""
    from latencyprism.lab.install import ENGINES, EngineUnavailable, ensure

    there = []
    for engine in ENGINES:
        try:
            ensure(engine)
        except EngineUnavailable as missing:
            say(f"{engine}: {missing.reason}; its tests will be skipped")
        else:
            there.append(engine)
    return "llama.cpp" in there


def can_ptrace() -> bool:
    """Whether we are root and may seize a process of our own."""
    if os.geteuid() != 0:
        return False
    seize, detach = 0x4206, 17
    child = subprocess.Popen(["sleep", "60"])
    try:
        # A seized process that is killed needs no detaching; PTRACE_DETACH would want it stopped first.
        _libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        return bool(_libc.ptrace(seize, child.pid, None, None) == 0)
    finally:
        _libc.ptrace(detach, child.pid, None, None)
        child.kill()
        child.wait()


def can_bpf() -> bool:
    """Whether bpf(2) makes a map here, the kernel has its types at hand, and uprobes exist."""
    number = {"x86_64": 321, "aarch64": 280}.get(platform.machine())
    if number is None or not Path("/sys/kernel/btf/vmlinux").is_file():
        return False
    if not Path("/sys/bus/event_source/devices/uprobe/type").is_file():
        return False
    array_of_four_bytes = struct.pack("<5I", 2, 4, 4, 1, 0).ljust(128, b"\0")
    attribute = ctypes.create_string_buffer(array_of_four_bytes, 128)
    descriptor = _libc.syscall(number, 0, attribute, len(array_of_four_bytes))
    if descriptor < 0:
        return False
    os.close(descriptor)
    mount_tracefs()
    return True


def mount_tracefs() -> None:
    """Tracepoints are named there; not every machine has it mounted."""
    place = Path("/sys/kernel/tracing")
    if place.is_dir() and not (place / "events").is_dir():
        command = ["mount", "-t", "tracefs", "tracefs", str(place)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            say(f"tracefs could not be mounted: {result.stderr.strip()}")


def pytest(required: list[str], fast: bool, arguments: list[str], failed: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", *(["-m", "not engine"] if fast else []), *arguments]
    environ = {**os.environ, "LATENCYPRISM_REQUIRE": ",".join(required)}
    if failed:
        say(f"failed before the tests: {', '.join(failed)}; this run ends with an error")
    # In a session of its own, as the engines are: where the scheduler takes sessions for groups, one of low
    # weight waits for seconds beside an engine that spins, and that is all that its tests would show.
    process = subprocess.Popen(command, cwd=ROOT, env=environ, start_new_session=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: process.send_signal(signal.SIGINT))
    return process.wait()


def say(text: str) -> None:
    print(f"-- {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
