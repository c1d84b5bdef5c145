"""What the demonstration prints while it plays."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from latencyprism.demo.acts import Play, Progress

TITLES = {
    "learn": "warming up: the watch learns how long a step takes",
    "normal": "act 1 of 3, normal load: no alert is due",
    "surge": "act 2 of 3, longer prompts and more clients: steps take longer, still no alert is due",
    "fault": "act 3 of 3, another process takes most of the engine's core: an alert is due",
    "verdict": "writing the capture and looking for the cause",
}


class Screen:
    """One line that changes on a terminal; one line an act elsewhere."""

    def __init__(self, stream: TextIO = sys.stderr, quiet: bool = False) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._quiet = quiet
        self._act = ""

    def say(self, text: str) -> None:
        if not self._quiet:
            self._clear()
            self._stream.write(text + "\n")
            self._stream.flush()

    def show(self, progress: Progress) -> None:
        if progress.act != self._act:
            self._act = progress.act
            self.say(TITLES[progress.act])
        if self._live and not self._quiet:
            self._clear()
            self._stream.write(_line(progress))
            self._stream.flush()

    def _clear(self) -> None:
        if self._live:
            self._stream.write("\r\x1b[K")


def _line(progress: Progress) -> str:
    step = f"{progress.step_ms:7.2f}" if progress.step_ms is not None else "      -"
    expected = f"{progress.expected_ms:7.2f}" if progress.expected_ms is not None else "      -"
    return (
        f"  {progress.seconds:4.0f}/{progress.of_s:.0f} s   {progress.steps:6d} steps   "
        f"last step {step} ms, expected {expected} ms   alerts {progress.pages}"
    )


def verdict_text(play: Play) -> list[str]:
    """The end of the story in a few lines."""
    lines = []
    pages = play.during("fault")
    if pages:
        first = pages[0]
        lines.append(
            f"ALERT  step {first.step}: {first.observed_ms:.1f} ms, expected {first.expected_ms:.1f} ms "
            f"(+{first.excess:.0%}), said {first.delay_ms:.1f} ms after the step ended"
        )
    verdict = main_verdict(play)
    if verdict is not None:
        lines.append(f"CAUSE  {verdict['cause']} (probability {verdict['probability']:.2f})")
        lines += [f"       {entry['text']}" for entry in verdict["evidence"][:6]]
    return lines


def main_verdict(play: Play) -> dict[str, Any] | None:
    """The verdict of the capture that the fault's alert began; None if there is none."""
    mine = {alert.id for alert in play.during("fault")}
    for capture in play.verdicts:
        if capture.alert is not None and capture.alert.id in mine and capture.result:
            verdict = capture.result.get("verdict")
            if isinstance(verdict, dict):
                return verdict
    return None
