"""Objectives are read strictly; what makes no sense is told."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from latencyprism.errors import BadInput
from latencyprism.records import Request
from latencyprism.slo.objectives import parse_objectives, read_objectives
from latencyprism.slo.rules import prometheus_rules
from latencyprism.slo.windows import standard_windows

GOOD = """
period = "7d"
ttft_p99 = "< 2 s"
tpot_p95 = "< 50 ms"
itl = "<200ms"

[[objective]]
model = "llama-70b"
port = 8001
tenant = "gold"
period = "30d"
e2e_p999 = "< 1.5 min"
"""


def test_a_good_file_is_read() -> None:
    found = parse_objectives(GOOD)
    told = [(o.label, o.limit_ns, o.period_s) for o in found.objectives]
    assert told == [
        ("ttft_p99", 2_000_000_000, 7 * 86400.0),
        ("tpot_p95", 50_000_000, 7 * 86400.0),
        ("itl_p99", 200_000_000, 7 * 86400.0),
        ("e2e_p999@llama-70b:8001", 90_000_000_000, 30 * 86400.0),
    ]
    assert abs(found.objectives[3].budget - 0.001) < 1e-12
    assert len(found.for_server(frozenset({"llama-70b"}), 8001)) == 4
    assert len(found.for_server(frozenset({"llama-70b"}), 8002)) == 3
    assert len(found.for_server(frozenset(), None)) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no objective"),
        ("period = '30d'", "no objective"),
        ("ttft_p99 = 2", "is no limit"),
        ("ttft_p99 = '2 s'", "is no limit"),
        ("ttft_p99 = '> 2 s'", "is no limit"),
        ("ttft_p99 = '< 2 parsecs'", "is no limit"),
        ("ttft_p99 = '< nan s'", "from 1 us to 1 hour"),
        ("ttft_p99 = '< inf s'", "from 1 us to 1 hour"),
        ("ttft_p99 = '< -2 s'", "from 1 us to 1 hour"),
        ("ttft_p99 = '< 0 s'", "from 1 us to 1 hour"),
        ("ttft_p99 = '< two s'", "is no number"),
        ("ttft_p99 = '< 5000 min'", "from 1 us to 1 hour"),
        ("ttft_p100 = '< 2 s'", "no percentile"),
        ("ttft_p0 = '< 2 s'", "no percentile"),
        ("ttft_p5 = '< 2 s'", "no percentile"),
        ("ttft_p995555 = '< 2 s'", "no percentile"),
        ("tft_p99 = '< 2 s'", "unknown key"),
        ("[[objective]]\nroute = '/gold/v1'\nttft = '< 1 s'", "known: /v1/chat/completions, /v1/completions"),
        ("[[objective]]\nroute = ['/v1/completions']\nttft = '< 1 s'", "a port of its own"),
        ("[[objective]]\nroute = '/v1/completions'", "without an objective"),
        ("ttft_p99 = '< 2 s'\nttft = '< 3 s'", "two objectives"),
        ("ttft_p99 = '< 2 s'\nttft_p50 = '< 3 s'", "is below"),
        ("period = 30\nttft_p99 = '< 2 s'", "no length of time"),
        ("period = '2s'\nttft_p99 = '< 2 s'", "from a minute"),
        ("[objective]\nttft_p99 = '< 2 s'", "must be tables"),
        ("[[objective]]\nmodel = 'a'", "without an objective"),
        ("[[objective]]\ntenant = 'gold'\nttft = '< 1 s'", "without a port"),
        ("[[objective]]\nport = 70000\nttft = '< 1 s'", "port"),
        ("[[objective]]\nport = true\nttft = '< 1 s'", "port"),
        ("[[objective]]\nmodel = 'a b'\nttft = '< 1 s'", "model"),
        ("ttft_p99 = ", "cannot read"),
        ("ttft = '<1s'\n[[window]]\nlong='1h'\nburn=14.4\n[[window]]\nlong='1h'\nburn=6", "overlap"),
        ("ttft = '<1s'\n[[window]]\nlong='1h'\nburn=2\n[[window]]\nlong='6h'\nburn=6", "overlap"),
        ("ttft = '<1s'\n[[window]]\nlong='1h'\nshort='2h'\nburn=2", "shorter than the long"),
        ("ttft = '<1s'\n[[window]]\nlong='60d'\nburn=2", "longer than the period"),
        ("ttft = '<1s'\n[[window]]\nlong='1h'\nburn=nan", "burn"),
        ("ttft = '<1s'\n[[window]]\nlong='1h'\nburn=0", "burn"),
        ("ttft = '<1s'\n[[window]]\nlong='1h'\nburn=2\nlevel='loud'", "level"),
        ("ttft = '<1s'\n[[window]]\nlong='1h'\nburn=2\ncolour=1", "colour"),
        ("ttft_p50 = '<1s'\n[[window]]\nlong='1h'\nburn=14.4", "can ever fire"),
        ("ttft = '<1s'\nwindow = 3", "must be tables"),
    ],
)
def test_nonsense_is_told(text: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_objectives(text, "slo.toml")
    assert said in str(caught.value) and "slo.toml" in str(caught.value)


BY_ROUTE = """
ttft = "< 2 s"
[[objective]]
route = "/v1/chat/completions"
tenant = "people"
ttft = "< 1 s"
[[objective]]
route = "/v1/completions"
port = 8001
ttft = "< 30 s"
"""


def test_objectives_by_route_are_of_their_requests_alone() -> None:
    found = parse_objectives(BY_ROUTE)
    every, chat, batch = found.objectives
    assert [one.label for one in (every, chat, batch)] == [
        "ttft_p99", "ttft_p99@/v1/chat/completions", "ttft_p99@8001:/v1/completions",
    ]  # fmt: skip
    slow = Request("vllm", 0, 1, 0, ttft_ns=5_000_000_000, route="/v1/chat/completions")
    other, unknown = slow._replace(route="/v1/completions"), slow._replace(route=None)
    for request, judged in ((slow, chat), (other, batch)):
        assert [one.judge(request) is not None for one in (chat, batch)] == [judged is chat, judged is batch]
    chat_judged, batch_judged = chat.judge(slow), batch.judge(other)
    assert chat_judged is not None and chat_judged.violated
    assert batch_judged is not None and not batch_judged.violated
    assert chat.judge(unknown) is None and every.judge(unknown) is not None
    rules = prometheus_rules(found)
    assert "ttft_p99@/v1/chat/completions" in rules and 'tenant: "people"' in rules


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        read_objectives(tmp_path / "absent.toml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="UTF-8"):
        read_objectives(tmp_path / "binary")
    with pytest.raises(BadInput):
        read_objectives(tmp_path)


def test_many_keys_are_read_in_bounded_time() -> None:
    begun = time.monotonic()
    with pytest.raises(BadInput):
        parse_objectives("".join(f"[[objective]]\nport={n}\nttft='<1s'\n" for n in range(1, 2000)))
    assert time.monotonic() - begun < 5


def test_standard_windows_scale_with_the_period() -> None:
    month, hour = standard_windows(30 * 86400.0), standard_windows(3600.0)
    assert [(w.long_s, w.short_s, w.burn) for w in month] == [
        (3600, 300, 14.4), (21600, 1800, 6.0), (259200, 21600, 1.0),
    ]  # fmt: skip
    assert [w.long_s for w in hour] == [5.0, 30.0, 360.0]


def request(**values: object) -> Request:
    return Request("vllm", 0, 1, 0, **values)  # type: ignore[arg-type]


def test_what_was_not_observed_is_no_violation() -> None:
    ttft, tpot, itl, _ = parse_objectives(GOOD).objectives
    assert ttft.judge(request()) is None
    assert tpot.judge(request(output_tokens=1, ttft_ns=5)) is None
    judged = ttft.judge(request(ttft_ns=2_000_000_001))
    assert judged is not None and judged.violated
    judged = ttft.judge(request(ttft_ns=2_000_000_000))
    assert judged is not None and not judged.violated
    assert itl.judge(request(max_itl_ns=float("nan"))) is None
    assert ttft.judge(request(ttft_ns=-5)) is None


def test_who_gave_up_waiting_had_waited() -> None:
    ttft = parse_objectives(GOOD).objectives[0]
    gave_up = ttft.judge(request(e2e_ns=3_000_000_000, output_tokens=0, finish_reason="abort"))
    assert gave_up is not None and gave_up.violated and gave_up.value_ns is None
    assert ttft.judge(request(e2e_ns=1_000_000_000, output_tokens=0, finish_reason="abort")) is None


def test_rules_are_what_prometheus_reads() -> None:
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load(prometheus_rules(parse_objectives(GOOD)))
    rules = found["groups"][0]["rules"]
    records = {(r["record"], r["labels"]["objective"]) for r in rules if "record" in r}
    alerts = [r for r in rules if "alert" in r]
    assert len(records) == sum("record" in r for r in rules)
    assert len(alerts) == 12 and {r["labels"]["severity"] for r in alerts} == {"page", "ticket"}
    gold = [r for r in alerts if r["labels"].get("tenant") == "gold"]
    assert gold[0]["expr"] == (
        'latencyprism:slo_error_ratio:rate1h{objective="e2e_p999@llama-70b:8001"} > 0.0144 and '
        'latencyprism:slo_error_ratio:rate5m{objective="e2e_p999@llama-70b:8001"} > 0.0144'
    )
    for rule in alerts:  # what an alert reads, a rule records
        name = rule["expr"].split("{")[0]
        assert (name, rule["labels"]["objective"]) in records


def test_rules_of_a_short_period_stay_readable() -> None:
    yaml = pytest.importorskip("yaml")
    text = prometheus_rules(parse_objectives("period = '1h'\nttft = '< 1 s'"))
    spans = {r["record"] for r in yaml.safe_load(text)["groups"][0]["rules"] if "record" in r}
    assert spans == {"latencyprism:slo_error_ratio:rate1m", "latencyprism:slo_error_ratio:rate6m"}
