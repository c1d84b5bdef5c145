"""``slo``, and what ``watch`` and ``bench`` are told about objectives: what is refused, in a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

GOOD = 'period = "1h"\nttft_p99 = "< 2 s"\n[[objective]]\nport = 8001\ntenant = "gold"\ntpot = "< 50 ms"\n'


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "latencyprism", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "slo.toml"
    path.write_text(GOOD)
    return str(path)


def test_check_tells_what_a_file_means(file: str) -> None:
    done = run("slo", "check", file)
    assert done.returncode == 0 and "ttft_p99 < 2 s, budget 1.000% of 1 h" in done.stdout
    rows = json.loads(run("slo", "check", file, "--json").stdout)["objectives"]
    assert [(row["objective"], row["tenant"], row["limit_ms"]) for row in rows] == [
        ("ttft_p99", None, 2000.0), ("tpot_p99@8001", "gold", 50.0),
    ]  # fmt: skip
    assert [window["burn"] for window in rows[0]["windows"]] == [14.4, 6.0, 1.0]


def test_rules_are_printed(file: str) -> None:
    done = run("slo", "rules", file)
    assert done.returncode == 0 and done.stdout.count("alert: LatencyPrismBudgetBurn") == 6 - 2
    assert 'tenant: "gold"' in done.stdout


@pytest.mark.parametrize("text", ["", "ttft = 'soon'", "a = [", "ttft_p100 = '< 1 s'", "\x00"])
def test_nonsense_is_a_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    for what in ("check", "rules"):
        done = run("slo", what, str(path))
        assert done.returncode == 2 and "bad.toml" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("watch", "--guard", "shape"), "needs objectives"),
        (("watch", "--dry-run"), "needs objectives"),
        (("watch", "--slo", "{file}", "--dry-run"), "no guard was asked for"),
        (("watch", "--slo", "{file}", "--guard-port", "8080"), "no guard was asked for"),
        (("watch", "--slo", "{file}", "--guard", "explode"), "actions are"),
        (("watch", "--slo", "{file}", "--guard", ""), "actions are"),
        (("watch", "--slo", "{file}", "--guard", "ready", "--guard-port", "70000"), "from 1 to 65535"),
        (("watch", "--slo", "{file}", "--guard", "ready", "--neighbour", "/x"), "for --guard shield"),
        (("watch", "--slo", "/nonexistent"), "cannot read"),
        (("slo", "check", "/nonexistent"), "cannot read"),
        (("slo", "polish", "{file}"), "invalid choice"),
        (("bench", "forecast", "--load", "7"), "from .1 to 2"),
        (("bench", "forecast", "-d", "1s"), "from 10 s"),
        (("bench", "forecast", "--trace", "azure"), "needs the folder"),
        (("bench", "forecast", "--traces", "/nonexistent"), "cannot read"),
        (("bench", "guard", "--pairs", "0"), "from 1 to 50"),
        (("bench", "guard", "-d", "1s"), "from 10 s"),
        (("bench", "guard", "-o", "plot.pdf"), "is an SVG"),
        (("bench", "guard", "-o", "/nonexistent/plot.svg"), "cannot write"),
        (("bench", "guard", "-o", "{file}"), "is an SVG"),
    ],
)
def test_bad_arguments_are_a_sentence(arguments: tuple[str, ...], said: str, file: str) -> None:
    done = run(*(argument.format(file=file) for argument in arguments))
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_plot_does_not_replace_a_file(tmp_path: Path) -> None:
    path = tmp_path / "plot.svg"
    path.write_text("mine")
    done = run("bench", "guard", "-o", str(path))
    assert done.returncode == 2 and path.read_text() == "mine"


def test_a_trace_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "azure_2023_conv.csv.gz").write_bytes(b"no gzip")
    done = run("bench", "forecast", "--traces", str(tmp_path), "--simulated", "--trace", "azure")
    assert done.returncode == 2 and "azure_2023_conv" in done.stderr


def test_the_forecast_runs_on_a_simulated_engine() -> None:
    done = run("bench", "forecast", "--simulated", "-d", "20s", "--json")
    found = json.loads(done.stdout)["traces"]["synthetic"]
    assert done.returncode == 0 and found["requests"] > 40
    assert {"one_second_ahead", "any_time_before", "limit_ms"} <= set(found["tpot"])
