"""The weight of a session where the kernel groups by sessions, and where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from latencyprism.host.session_weight import session_nice


@pytest.mark.parametrize(
    ("enabled", "own", "nice"),
    [
        ("1\n", "/autogroup-3560 nice 19\n", 19),
        ("1\n", "/autogroup-7 nice -5\n", -5),
        ("0\n", "/autogroup-3560 nice 19\n", None),
        ("1\n", "something else\n", None),
        (None, "/autogroup-3560 nice 19\n", None),
        ("1\n", None, None),
    ],
)
def test_what_the_kernel_says(tmp_path: Path, enabled: str | None, own: str | None, nice: int | None) -> None:
    for name, text in (("enabled", enabled), ("own", own)):
        if text is not None:
            (tmp_path / name).write_text(text)
    assert session_nice(str(tmp_path / "enabled"), str(tmp_path / "own")) == nice
