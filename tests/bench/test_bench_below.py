"""The benchmarks of the kernel probes: their arguments."""

from __future__ import annotations

import pytest

from latencyprism.cli.main import main


@pytest.mark.parametrize(
    "arguments",
    [
        ["bpf", "--rate", "1"],
        ["bpf", "--kills", "-1"],
        ["bpf", "-d", "10m"],
        ["attribution", "--rounds", "0"],
        ["below", "--pairs", "0"],
    ],
)
def test_nonsense_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err
