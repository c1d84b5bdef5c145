from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from latencyprism.errors import BadInput
from latencyprism.faces.report import write_report
from latencyprism.recorder import Capture, read_capture
from latencyprism.records import Alert, Counter, Evidence, Ranked, Step, Verdict

GOLDEN = Path(__file__).parents[1] / "recorder" / "golden.pftrace"
HOSTILE = "</title><script>alert(1)</script>\x1b[31m\"'"


class Page(HTMLParser):
    """Checks that tags are balanced and notes what a browser would fetch or run."""

    void = frozenset({"meta", "br", "line", "rect", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page_of(path: Path) -> tuple[Page, str]:
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    return page, text


def test_a_report_says_what_happened_and_fetches_nothing(tmp_path: Path) -> None:
    capture = read_capture(GOLDEN)
    size = write_report(tmp_path / "r.html", capture, capture_path="here/a.pftrace")
    page, text = page_of(tmp_path / "r.html")
    assert size == (tmp_path / "r.html").stat().st_size < 200_000
    words = " ".join(page.text)
    for said in (
        "Another process takes CPU time from the engine (cpu.neighbour, 87%).",
        "vllm replica 0: steps became slower than their workload explains since step 15",
        "where 12.0 ms was expected (+101%)",
        "expected for the same work",
        "The Worker waited 38 % of a step for a CPU.",
        "psi_cpu_share",
        "here/a.pftrace",
        "accelerator telemetry: no device found",
        "ready, waiting for a CPU",
    ):
        assert said in words, said
    assert page.fetched == [] and "script" not in page.tags
    assert not re.search(r"url\(|@import|nan|inf\b", text)


def test_acts_are_shaded_and_named(tmp_path: Path) -> None:
    capture = read_capture(GOLDEN)
    start, end = capture.steps[0].start_ns, capture.steps[-1].end_ns
    acts = [("Healthy", start, start + 10**8), ("Fault <b>", start + 10**8, end)]
    write_report(tmp_path / "r.html", capture, title="Three acts", acts=acts)
    page, text = page_of(tmp_path / "r.html")
    assert "Three acts" in page.text and "Fault <b>" in page.text
    assert 'class="act-bad"' in text


def hostile() -> Capture:
    alert = Alert(
        HOSTILE,
        HOSTILE,
        HOSTILE,
        HOSTILE,
        0,
        0,
        2,
        1,
        HOSTILE,
        5.0,
        1.0,
        4.0,
        where=HOSTILE,
        terms={HOSTILE: 1.0},
    )
    steps = [Step(HOSTILE[:16], 0, n, n, n * 10, n * 10 + 5, running=n) for n in range(6)]
    return Capture(
        meta={"engine": HOSTILE, "host": [HOSTILE], HOSTILE: {HOSTILE: HOSTILE}},
        steps=steps,
        counters=[Counter((HOSTILE,), HOSTILE, n, n * 1.0, HOSTILE) for n in range(9)],
        alerts=[alert],
        verdict=Verdict(HOSTILE, 0.5, [Ranked(HOSTILE, 0.5)], [Evidence(HOSTILE, None, 1.0, HOSTILE)]),
        notices=[HOSTILE],
    )


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    acts = [(HOSTILE, 0, 9)]
    write_report(tmp_path / "r.html", hostile(), title=HOSTILE, acts=acts, capture_path=HOSTILE)
    page, text = page_of(tmp_path / "r.html")
    assert "script" not in page.tags and "\x1b" not in text


@pytest.mark.parametrize(
    "capture",
    [
        Capture(),
        Capture(steps=[Step("e", 0, 0, 1, 5, 5)]),
        Capture(steps=[Step("e", 0, 0, 1, 5, -5), Step("e", 0, 0, 2, 2**62, -(2**62))]),
        Capture(counters=[Counter((), "", 0, float("nan")), Counter((), "x", 0, 1e300)]),
        Capture(steps=[Step("e", 0, 0, 1, 5, 9)], expected_ms=[float("nan")]),
    ],
)
def test_captures_with_little_or_odd_in_them_still_give_a_page(tmp_path: Path, capture: Capture) -> None:
    write_report(tmp_path / "r.html", capture)
    page, _ = page_of(tmp_path / "r.html")
    assert "No alert was raised" in page.text


def test_a_report_that_cannot_be_written_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot write the report"):
        write_report(tmp_path, Capture())
