from __future__ import annotations

import zlib
from collections import Counter as Tally
from pathlib import Path
from typing import Any

import pytest
import recorder_trace_processor
from hypothesis import given
from hypothesis import strategies as st
from recorder_samples import REALTIME_NS, START_NS, incident, requests_of

from latencyprism.recorder import Capture, write_capture
from latencyprism.recorder.tracks import Slice, TrackBook, nest
from latencyprism.recorder.wire import varint
from latencyprism.records import STEP_COLUMNS, Alert, Counter, Span, Step

trace_pb2 = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2")

GOLDEN = Path(__file__).with_name("golden.pftrace")
NOT_HERE = recorder_trace_processor.missing()


def packets(path: Path) -> list[Any]:
    trace = trace_pb2.Trace()
    assert trace.ParseFromString(path.read_bytes()) == path.stat().st_size
    found: list[Any] = []
    for packet in trace.packet:
        if packet.HasField("compressed_packets"):
            inner = trace_pb2.Trace()
            plain = zlib.decompress(packet.compressed_packets)
            assert inner.ParseFromString(plain) == len(plain)
            found += inner.packet
        else:
            found.append(packet)
    return found


def tracks_of(all_packets: list[Any]) -> dict[int, Any]:
    return {
        p.track_descriptor.uuid: p.track_descriptor for p in all_packets if p.HasField("track_descriptor")
    }


def test_perfettos_own_classes_read_every_packet_of_a_capture() -> None:
    seen = packets(GOLDEN)
    first = seen[0]
    assert {c.clock_id: c.timestamp for c in first.clock_snapshot.clocks} == {3: START_NS, 1: REALTIME_NS}
    assert first.clock_snapshot.primary_trace_clock == 3
    assert first.trace_packet_defaults.timestamp_clock_id == 3
    assert first.sequence_flags == 1
    tracks = tracks_of(seen)
    names: dict[int, str] = {}
    for packet in seen[1:]:
        for name in packet.interned_data.event_names:
            names[name.iid] = name.name
        if packet.HasField("track_event"):
            assert packet.track_event.track_uuid in tracks, "a track is described before its first event"
            assert packet.trusted_packet_sequence_id == 1 and packet.sequence_flags == 2
            if packet.track_event.name_iid:
                assert packet.track_event.name_iid in names, "a name is interned before or where it is used"
    ours = [p for p in seen if not p.ListFields()]
    assert len(ours) >= 6, "our blocks are packets without any field that Perfetto knows"


def test_slices_nest_and_are_as_many_as_the_records() -> None:
    capture = incident(30, 15)
    seen = packets(GOLDEN)
    tracks = tracks_of(seen)
    depth: Tally[int] = Tally()
    begun: Tally[str] = Tally()
    last: dict[int, int] = {}
    for packet in seen:
        event = packet.track_event
        if not packet.HasField("track_event") or event.type not in (1, 2):
            continue
        assert packet.timestamp >= last.get(event.track_uuid, 0), "time never goes back on a track"
        last[event.track_uuid] = packet.timestamp
        track = tracks[event.track_uuid]
        depth[event.track_uuid] += 1 if event.type == 1 else -1
        assert depth[event.track_uuid] >= 0
        if event.type == 1:
            begun[track.name or track.thread.thread_name] += 1
    assert set(depth.values()) == {0}
    assert begun == {
        "steps": len(capture.steps),
        "phases": 4 * len(capture.steps),
        "MainThread": len(capture.spans),
    }


def test_a_step_slice_carries_every_column_that_was_seen_and_no_other() -> None:
    capture = incident(30, 15)
    names: dict[int, str] = {}
    told = []
    for packet in packets(GOLDEN):
        names.update((n.iid, n.name) for n in packet.interned_data.debug_annotation_names)
        if packet.track_event.type == 1:
            values = {}
            for entry in packet.track_event.debug_annotations:
                values[names[entry.name_iid]] = getattr(entry, entry.WhichOneof("value"))
            if "phase" in values:
                told.append(values)
    for step, values in zip(capture.steps, told):
        seen = {n: v for n, v in step._asdict().items() if v is not None and n not in ("start_ns", "end_ns")}
        values.pop("expected_ms")
        assert values == seen
    assert len(told) == len(capture.steps) and set(told[0]) < set(STEP_COLUMNS)


def test_counters_have_units_and_alerts_are_instants(tmp_path: Path) -> None:
    seen = packets(GOLDEN)
    units = {
        t.name: t.counter.unit_name or t.counter.unit
        for t in tracks_of(seen).values()
        if t.HasField("counter")
    }
    assert units["free_bytes"] == 3 and units["runqueue_ns"] == 1
    assert units["psi_cpu_share"] == "share" and units["step time"] == "ms" and units["running"] == 2
    instants = [p for p in seen if p.track_event.type == 3]
    alerted = incident(30, 15).steps[21]
    assert [p.timestamp for p in instants] == [
        incident(30, 15).steps[15].start_ns,
        alerted.end_ns + 1_800_000,
    ]


@given(
    st.lists(st.tuples(st.integers(-5, 40), st.integers(-3, 15)), max_size=40),
)
def test_any_slices_are_laid_so_that_they_nest(times: list[tuple[int, int]]) -> None:
    book = TrackBook()
    uuid = book.track(("Worker 7", "MainThread 7"))
    slices = [Slice(uuid, str(i), start, start + length) for i, (start, length) in enumerate(times)]
    drawn: dict[str, tuple[int, int]] = {}
    for _, events in nest(slices, book):
        opened: list[tuple[str, int]] = []
        for time_ns, begun in events:
            if begun is not None:
                opened.append((begun.name, time_ns))
            else:
                name, start = opened.pop()
                drawn[name] = (start, time_ns)
        assert not opened
        assert [t for t, _ in events] == sorted(t for t, _ in events)
    assert drawn == {str(i): (s, s + max(n, 0)) for i, (s, n) in enumerate(times)}


@given(st.integers(0, 2**64 - 1))
def test_varints_are_those_of_protobuf(value: int) -> None:
    from google.protobuf.internal import encoder

    out: list[bytes] = []
    encoder._VarintEncoder()(out.append, value)  # type: ignore[attr-defined]
    assert varint(value) == b"".join(out)


def test_odd_records_are_drawn_without_breaking_the_trace(tmp_path: Path) -> None:
    step = Step("v\x00\xff", -1, 2**40, -5, -100, -200, waiting=2**62, kv_usage=float("nan"))
    odd = Capture(
        steps=[step, step],
        spans=[
            Span((), "", 5, 1),
            Span(("a", "b", "c 9"), "\ud800", 0, 2**62, None, (("k", -1), ("k", 1e300))),
        ],
        counters=[Counter((), "", -5, float("inf"), ""), Counter(("p 1",), "x", 2**62, 2.0**80)],
        alerts=[Alert("i", "k", "l", "e", 0, 0, 1, 1, "no time", 1.0, 1.0, 0.0)],
    )
    path = tmp_path / "odd.pftrace"
    write_capture(path, odd)
    assert len(packets(path)) > 10


@pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE)
def test_the_trace_processor_counts_the_same_slices_on_every_track() -> None:
    capture = incident(30, 15)
    with recorder_trace_processor.opened(GOLDEN) as processor:
        by_track = processor.query(
            """
            select coalesce(thread.name, track.name) as name, coalesce(process.pid, 0) as pid,
              count(*) as slices, max(depth) as depth, min(slice.ts) as first
            from slice join track on slice.track_id = track.id
            left join thread_track on thread_track.id = track.id
            left join thread using (utid) left join process using (upid)
            group by 1, 2
            """
        )
        found = {row.name: (row.pid, row.slices, row.depth, row.first) for row in by_track}
        start = START_NS
        assert found["steps"] == (0, len(capture.steps), 0, start)
        assert found["phases"][1:3] == (4 * len(capture.steps), 0)
        assert found["MainThread"][:3] == (815, len(capture.spans), 2)
        assert found["alerts"][1] == 2
        counted = processor.query(
            "select name, unit, count(*) as n from counter join counter_track on track_id = counter_track.id"
            " group by 1, 2"
        )
        readings = {row.name: (row.unit, row.n) for row in counted}
        assert readings["psi_cpu_share"] == ("share", 6)
        assert readings["step time"] == ("ms", len(capture.steps))
        annotated = processor.query(
            "select extract_arg(arg_set_id, 'debug.context_tokens') as tokens from slice"
            " where name like '% step' order by ts"
        )
        assert [row.tokens for row in annotated] == [step.context_tokens for step in capture.steps]
        wall = processor.query(f"select abs_time_str({start}) as at")
        assert next(iter(wall)).at.startswith("2026-09-21T14:13:20.000")
        faults = processor.query(
            "select name from stats where value != 0 and severity in ('error', 'data_loss')"
        )
        assert [row.name for row in faults] == []


@pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE)
def test_flows_lead_from_a_request_to_its_steps_and_from_a_step_to_its_calls(tmp_path: Path) -> None:
    capture = incident(60)
    capture.requests = requests_of(capture.steps)
    write_capture(tmp_path / "a.pftrace", capture)
    with recorder_trace_processor.opened(tmp_path / "a.pftrace") as processor:
        rows = processor.query(
            """
            select a.name as source, b.name as sink, extract_arg(b.arg_set_id, 'debug.step') as step,
              extract_arg(a.arg_set_id, 'debug.step') as came_from
            from flow join slice a on flow.slice_out = a.id join slice b on flow.slice_in = b.id
            """
        )
        found = [(row.source, row.sink, row.came_from, row.step) for row in rows]
        held = [request for request in capture.requests if request.arrival_ns is not None]
        assert len(held) == 4
        for request in held:
            name = f"request {request.request:016x}"
            assert [step for source, _, _, step in found if source == name] == [request.first_step]
            assert [
                step for _, _, before, step in found if before == request.first_token_step and step != before
            ] == [request.last_step]
        calls = [(before, step) for _, sink, before, step in found if sink == "execute_model"]
        assert calls == [(step.step, step.step) for step in capture.steps]
        nested = processor.query(
            "select s.name as name, p.name as parent, s.dur as dur from slice s"
            " join slice p on s.parent_id = p.id where p.name like 'request %' order by s.ts"
        )
        phases = [(row.name, row.parent, row.dur) for row in nested]
        assert [phase for phase, *_ in phases].count("decode and output") == 4
        assert ("queue", f"request {held[0].request:016x}", held[0].queue_ns) in phases
        annotated = processor.query(
            "select extract_arg(arg_set_id, 'debug.finish_reason') as why, extract_arg(arg_set_id,"
            " 'debug.prompt_tokens') as tokens from slice where name like 'request %'"
        )
        assert {(row.why, row.tokens) for row in annotated} == {("stop", 100)}
        faults = processor.query(
            "select name from stats where value != 0 and severity in ('error', 'data_loss')"
        )
        assert [row.name for row in faults] == []


def test_what_is_drawn_takes_a_fraction_of_its_plain_size(tmp_path: Path) -> None:
    capture = incident(300, 150)
    size = write_capture(tmp_path / "a.pftrace", capture)
    drawn = sum(len(packet.SerializeToString()) for packet in packets(tmp_path / "a.pftrace"))
    assert size < 0.6 * drawn
    assert sum(p.HasField("track_event") for p in packets(tmp_path / "a.pftrace")) > 10 * 300
