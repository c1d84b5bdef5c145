"""The command as a stranger meets it: errors are sentences with an exit code, never tracebacks."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latencyprism.cli.main import VERBS
from latencyprism.cli.options import share_ppm


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "latencyprism", *arguments],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environ},
    )  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    done = run(verb, "--help")
    assert done.returncode == 0 and verb in done.stdout and len(done.stdout) > 200


def test_help_and_version() -> None:
    assert all(verb in run("--help").stdout for verb in VERBS)
    assert run("--version").stdout.startswith("latencyprism ")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("wach",), 2),
        (("watch", "-p", "abc"), 2),
        (("watch", "-p", "-5"), 2),
        (("watch", "-p", "99999999999999999999"), 2),
        (("watch", "-d", "forever"), 2),
        (("watch", "--webhook", "ftp://x"), 2),
        (("watch", "-p", "4194000"), 3),
        (("check", "-p", "4194000"), 3),
        (("detach", "-p", "4194000"), 3),
        (("record", "-p", "4194000"), 3),
        (("explain", "/nonexistent"), 2),
        (("replay", "/nonexistent"), 2),
        (("watch", "-p", str(os.getpid())), 3),
        (("bench", "overhead", "--pairs", "0"), 2),
    ],
)
def test_bad_input_is_one_sentence_and_a_code(arguments: tuple[str, ...], code: int, tmp_path: Path) -> None:
    done = run(*arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.strip()


def test_packs_are_listed_with_their_versions() -> None:
    rows = json.loads(run("check", "--packs", "--json").stdout)["packs"]
    assert {row["engine"] for row in rows} == {"vllm", "sglang", "transformers", "tgi", "llama.cpp"}
    assert all((row["from"] and row["below"]) or row["builds"] for row in rows)
    assert {row["engine"] for row in rows if row["verified"]} == {
        "vllm",
        "sglang",
        "transformers",
        "llama.cpp",
    }
    lines = run("check", "--packs").stdout.splitlines()
    assert len(lines) == len(rows)
    assert sum("not run" in line for line in lines) == sum(not row["verified"] for row in rows)


def test_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m latencyprism check --packs | head -c 5",
        shell=True, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr


def reading(pipe: Path) -> int:
    """A descriptor for writing into ``pipe``, as soon as somebody reads."""
    until = time.monotonic() + 30
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.05)


def signalled(process: subprocess.Popen[str], number: int) -> tuple[str, str]:
    """Asked again, as a person would: a signal that comes in the moment before a system call that waits is
    seen by the interpreter after it alone."""
    for _ in range(10):
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=3)
    raise AssertionError("it does not end")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_verb_in_order(number: int, code: int, tmp_path: Path) -> None:
    """Waiting for a pipe that nobody writes into: the same way out as from an attach that waits."""
    pipe = tmp_path / "steps.csv"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [sys.executable, "-m", "latencyprism", "replay", str(pipe)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Where the tests run in the background, SIGINT is ignored, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    keeper = reading(pipe)
    try:
        out, err = signalled(process, number)
    finally:
        os.close(keeper)
    assert (process.returncode, out, err) == (code, "", "")


@pytest.mark.parametrize(("text", "ppm"), [("0.3", 3_000), ("5%", 50_000), ("50 %", 500_000), ("0.01%", 100)])
def test_a_share_is_read_as_parts_per_million(text: str, ppm: int) -> None:
    assert share_ppm(text) == ppm


@pytest.mark.parametrize("text", ["", "%", "-1", "0", "0.001", "51", "1e1", "nan", "5%%", "٥"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no share"):
        share_ppm(text)
