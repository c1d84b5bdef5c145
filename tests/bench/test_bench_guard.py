"""What ``bench guard`` makes of what its clients saw, and its plot."""

from __future__ import annotations

import random
import xml.etree.ElementTree as ElementTree

import pytest

from latencyprism.bench import guarding
from latencyprism.bench.guard_plot import Block, svg
from latencyprism.bench.traces import synthetic
from latencyprism.lab.generate import Request
from latencyprism.lab.outcome import GAP, Result

np = pytest.importorskip("numpy")
S = 1_000_000_000


def answer(number: int, at_s: float, tpot_ms: float, *, prompt: int = 16, outcome: str = "ok") -> Request:
    due = int(at_s * S)
    first = due + S // 10
    end = first + int(tpot_ms * 1e6 * 9)
    return Request(number, due, due, prompt, 10, first, end, prompt, 10, 0, outcome)


def result(answers: list[Request]) -> Result:
    return Result("x", 0, 60 * S, answers, np.zeros(0, dtype=GAP))


def test_arrivals_are_the_same_for_a_seed_and_have_bursts() -> None:
    plan = guarding.arrivals(60.0, 3)
    assert plan == guarding.arrivals(60.0, 3) != guarding.arrivals(60.0, 4)
    assert [a.at_s for a in plan] == sorted(a.at_s for a in plan)
    long = [a for a in plan if a.prompt >= guarding.LONG_PROMPT]
    assert len(long) % guarding.BURST == 0 and len(long) >= 25
    assert not [a for a in guarding.arrivals(60.0, 3, bursts=False) if a.prompt >= guarding.LONG_PROMPT]


def test_what_lies_in_the_lead_in_does_not_count() -> None:
    lead = [answer(n, n, 500.0) for n in range(12)]
    counted = [answer(n, 13 + n, 10.0) for n in range(9)] + [answer(9, 40, 99.0, prompt=1500)]
    failed = [answer(10, 41, 99.0, outcome="failed")]
    found = guarding.score(result(lead + counted + failed), 20.0)
    assert (found["requests"], found["ok"], found["violations"], found["judged"]) == (11, 10, 1, 10)
    assert found["violated_share"] == 0.1 and found["ttft_long_ms_p50"] == 100.0


def test_no_answer_at_all_is_no_figure() -> None:
    found = guarding.score(result([]), 20.0)
    assert found["violated_share"] is None and found["tokens_per_s"] is None
    empty = guarding.compare({"without": [found], "with": [found]})
    assert empty["violations_cut"] is None and empty["throughput_lost"] is None


def test_blocks_are_compared_all_together() -> None:
    def block(violations: int, rate: float) -> dict[str, object]:
        return {"violations": violations, "judged": 100, "tokens_per_s": rate}

    found = guarding.compare(
        {"without": [block(40, 1000), block(20, 1000)], "with": [block(6, 970), block(0, 970)]}
    )
    assert found["violations_cut"] == 0.9 and found["throughput_lost"] == 0.03
    assert (found["attainment_without"], found["attainment_with"]) == (0.7, 0.97)


def test_the_plot_is_well_formed_and_shows_every_answer() -> None:
    rng = random.Random(1)
    points = [(n * S, rng.uniform(5, 90)) for n in range(100)]
    blocks = [
        Block(False, points, []),
        Block(
            True, [(at + 110 * S, ms) for at, ms in points], [(115 * S, 95), (150 * S, 64), (180 * S, None)]
        ),
    ]
    drawing = ElementTree.fromstring(svg(blocks, 40.0))
    circles = [one for one in drawing.iter() if one.tag.endswith("circle")]
    assert len(circles) == 200
    red = [one for one in circles if one.get("fill") == "#c53030"]
    assert len(red) == 2 * sum(ms > 40.0 for _, ms in points)
    words = [one.text for one in drawing.iter() if one.tag.endswith("text")]
    assert "95" in words and "64" in words


@pytest.mark.parametrize("blocks", [[], [Block(True, [], [])], [Block(True, [(5, 0.0)], [(5, 16)])]])
def test_a_plot_of_next_to_nothing_is_a_plot(blocks: list[Block]) -> None:
    assert ElementTree.fromstring(svg(blocks, 1e-3)).tag.endswith("svg")


def test_synthetic_arrivals_are_bursty_and_in_order() -> None:
    found = synthetic(2000, 1)
    gaps = np.diff([a.at_s for a in found])
    assert (gaps >= 0).all() and gaps.std() > 1.1 * gaps.mean()
    assert all(a.prompt >= 8 and a.output >= 4 for a in found)
