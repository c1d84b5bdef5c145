"""Objectives and the guard along with a watch: made-up replicas, and a real vLLM whose knobs are turned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from latencyprism.agent.knobs import LEASE_S, KnobOrders, KnobState
from latencyprism.detect import Detector
from latencyprism.engines.discovery import discover
from latencyprism.lab.load import Load
from latencyprism.lab.profiles import Length, Profile
from latencyprism.lab.serve import Server
from latencyprism.records import Request, Step, Window, ring
from latencyprism.sentinel import slo_watch
from latencyprism.sentinel.guard_watch import GuardOptions, GuardWatch, not_to_be_shaped
from latencyprism.sentinel.replica_watch import ReplicaWatch
from latencyprism.sentinel.server_names import ServerNames
from latencyprism.sentinel.slo_watch import SloWatch
from latencyprism.sentinel.targets import attach
from latencyprism.slo.objectives import parse_objectives
from latencyprism.timeline.python_source import PythonSource

S = 1_000_000_000
TEXT = "period = '1h'\ntpot_p95 = '< 20 ms'\nttft_p95 = '< 1 s'\n"


class Clock:
    def __init__(self) -> None:
        self.now = 1000 * S

    def __call__(self) -> int:
        return self.now


def watch_of(pid: int = 4242) -> ReplicaWatch:
    replica = SimpleNamespace(
        engine="vllm", engine_pid=pid, number=0, pids=(pid,), members=(), roles=lambda: {pid: "EngineCore"}
    )
    return cast(
        ReplicaWatch,
        SimpleNamespace(
            replica=replica, attachment=SimpleNamespace(source=None), expected=[], last_step=None,
            detector=SimpleNamespace(model=None),
        ),
    )  # fmt: skip


class Along:
    """Objectives and guard of one made-up replica, with what they told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, text: str = TEXT, **options: Any) -> None:
        self.clock = Clock()
        monkeypatch.setattr(slo_watch, "server_names", lambda _: ServerNames(frozenset({"tiny"}), 8000))
        monkeypatch.setattr(slo_watch.time, "monotonic_ns", self.clock)
        self.events: list[dict[str, Any]] = []
        self.slo = SloWatch(parse_objectives(text))
        self.guard = None
        if options:
            options["actions"] = frozenset(options["actions"])
            self.guard = GuardWatch(self.slo, GuardOptions(**options))
        self.watch = watch_of()
        for one in self.members:
            one.emit = lambda kind, **values: self.events.append({"event": kind, **values})
            one.attached(self.watch)
        self.number = 0

    @property
    def members(self) -> list[Any]:
        return [self.slo] if self.guard is None else [self.slo, self.guard]

    def pass_by(self, seconds: float, tpot_ms: float, per_s: int = 10) -> list[Any]:
        raised = []
        for _ in range(int(seconds * per_s)):
            self.clock.now += S // per_s
            self.number += 1
            start = self.clock.now - 10_000_000
            step = Step("vllm", 0, 0, self.number, start, self.clock.now, None, 4, 1, 3, 100, 3, 0, 900, 5000)
            ended = Request("vllm", 0, self.number, start, ttft_ns=S // 10, tpot_ns=int(tpot_ms * 1e6))
            for one in self.members:
                one.window(self.watch, Window(steps=[step], requests=[ended]), [])
            for one in self.members:
                raised += one.tick(self.clock.now)
        return raised

    def told(self, event: str, **values: Any) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event and values.items() <= e.items()]

    def ready(self) -> int:
        assert self.guard is not None and self.guard.endpoint is not None
        try:
            url = f"http://127.0.0.1:{self.guard.endpoint.port}/ready"
            with urllib.request.urlopen(url, timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as refused:
            refused.close()
            return refused.code

    def close(self) -> None:
        for one in self.members:
            one.detached(self.watch)
            one.close()


@pytest.mark.parametrize(
    ("engine", "titles", "said"),
    [
        ("vllm", ["VLLM::EngineCore", "VLLM::Worker_TP0"], ""),
        ("sglang", ["sglang::scheduler"], ""),
        ("sglang", ["sglang::scheduler_DP1"], ""),
        ("sglang", ["sglang::scheduler_TP0", "sglang::scheduler_TP1"], "one rank"),
        ("sglang", ["sglang::scheduler_DP1_TP1_EP1"], "one rank"),  # the others are on another machine
        ("sglang", ["sglang::scheduler_ATTN_TP1"], "one rank"),
        ("transformers", ["python"], "vLLM or SGLang"),
    ],
)
def test_which_engines_may_be_shaped(engine: str, titles: list[str], said: str) -> None:
    members = [SimpleNamespace(role="engine", process=SimpleNamespace(cmdline=[title])) for title in titles]
    members.append(SimpleNamespace(role="api", process=SimpleNamespace(cmdline=["x_TP0"])))
    text = not_to_be_shaped(cast(Any, SimpleNamespace(engine=engine, members=members)))
    assert (said in text) if said else text == ""


def test_objectives_by_route_are_left_out_where_no_route_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    text = TEXT + "[[objective]]\nroute = '/v1/completions'\ntpot_p95 = '< 5 ms'\n"
    by_vllm = Along(monkeypatch, text)
    assert len(by_vllm.slo.served[4242].accounts) == 3
    assert [one.route for one in by_vllm.slo.served[4242].foretold] == [None, None]
    along = Along(monkeypatch, text)
    other = watch_of(4343)
    other.replica.engine = "transformers"  # type: ignore[misc]
    along.slo.attached(other)
    assert [a.objective.route for a in along.slo.served[4343].accounts] == [None, None]
    (said,) = [event["text"] for event in along.events if event["event"] == "notice"]
    assert "tpot_p95@/v1/completions" in said and "a port of its own" in said


def test_a_burning_budget_pages_once_with_words(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Along(monkeypatch)
    assert here.pass_by(30, 10.0) == []
    alerts = [raised.alert for raised in here.pass_by(10, 50.0)]
    assert [alert.kind for alert in alerts] == ["slo"] * len(alerts) and 1 <= len(alerts) <= 3
    page = next(alert for alert in alerts if alert.level == "page")
    assert "tpot_p95 < 20 ms" in page.where and "burn rate" in page.where
    assert page.expected_ms == 20.0 and page.observed_ms >= 10.0
    rows = {row["objective"]: row for row in here.slo.describe(here.clock.now)}
    assert rows["tpot_p95"]["burning"] and not rows["ttft_p95"]["burning"]
    assert rows["tpot_p95"]["requests"] == 400


def test_an_engine_that_starts_again_goes_on_with_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Along(monkeypatch)
    here.pass_by(10, 50.0)
    here.slo.detached(here.watch)
    assert here.slo.describe(here.clock.now) == []
    here.watch = watch_of(4343)
    here.slo.attached(here.watch)
    assert {row["violations"] for row in here.slo.describe(here.clock.now)} == {0, 100}


def test_no_objective_for_this_server_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Along(monkeypatch, "[[objective]]\nport = 9999\nttft = '< 1 s'")
    assert here.pass_by(5, 50.0) == [] and here.slo.describe(0) == []


def test_a_tenant_is_known_by_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    gold = "[[objective]]\nport = 8000\ntenant = 'gold'\ntpot = '< 20 ms'\n"
    other = "[[objective]]\nport = 9999\ntenant = 'bronze'\ntpot = '< 1 ms'\n"
    here = Along(monkeypatch, gold + other)
    here.pass_by(5, 10.0)
    assert [(row["objective"], row["violations"]) for row in here.slo.describe(0)] == [("tpot_p99@8000", 0)]


def test_requests_that_are_never_seen_to_end_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Along(monkeypatch)
    for number in range(200):
        here.clock.now += S
        step = Step("vllm", 0, 0, number, here.clock.now - 10, here.clock.now)
        here.slo.window(here.watch, Window(steps=[step]), [])
        here.slo.tick(here.clock.now)
    assert len(here.told("notice")) == 1 and "not judged" in here.told("notice")[0]["text"]


def test_notify_and_readiness_with_their_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Along(monkeypatch, actions=("notify", "ready"))
    try:
        here.pass_by(30, 10.0)
        assert here.ready() == 200
        here.pass_by(10, 50.0)
        assert here.ready() == 503
        here.pass_by(60, 10.0)
        assert here.ready() == 200
        states = [event["state"] for event in here.told("guard", action="notify")]
        assert states == ["on", "taken back"]
        gone, back = here.told("guard", action="ready")[1:]
        assert gone["ready"] is False and set(gone["estimate"]) == {"requests", "waiting", "violating"}
        assert back["ready"] is True
        effect = here.told("guard_effect", action="ready")[-1]
        assert 0 < effect["before"]["violating"] < 1 and effect["after"]["requests"] > 50
        assert effect["before"]["mixed_step_ms"] == 10.0
    finally:
        here.close()


def test_dry_run_tells_and_does_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    group = tmp_path / "noisy"
    group.mkdir()
    (group / "cpu.max").write_text("max 100000")
    here = Along(monkeypatch, actions=("ready", "shield"), neighbours=(group,), dry_run=True)
    try:
        here.pass_by(20, 50.0)
        time.sleep(0.3)
        here.pass_by(1, 50.0)
        assert here.ready() == 200
        assert {e["state"] for e in here.told("guard", action="shield")} == {"dry run"}
        assert here.told("guard", action="ready", state="dry run")
        assert "would set" in here.told("guard", action="shield")[0]["text"]
        assert not here.told("guard_effect")
    finally:
        here.close()
    assert (group / "cpu.max").read_text() == "max 100000"


def test_shield_confines_the_named_neighbour_and_lets_it_go(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpu.max").write_text("max 100000")
    here = Along(monkeypatch, actions=("shield",), neighbours=(tmp_path,))
    try:
        here.pass_by(20, 50.0)
        deadline = time.monotonic() + 10
        while not here.told("guard", action="shield") and time.monotonic() < deadline:
            time.sleep(0.1)
            here.pass_by(1, 50.0)
        here.pass_by(15, 10.0)
        assert (tmp_path / "cpu.max").read_text() == "25000 100000"
        assert here.told("guard", action="shield", state="on")[0]["estimate"]["cpus"] == 0.25
        assert here.told("guard_effect", action="shield")[-1]["after"]["requests"] > 0
    finally:
        here.close()
    assert (tmp_path / "cpu.max").read_text() == "max 100000"
    assert here.told("guard", action="shield", state="taken back")


def test_a_shield_that_cannot_be_had_is_told_and_the_watch_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Along(monkeypatch, actions=("shield", "notify"), neighbours=(Path("/nonexistent"),))
    try:
        here.pass_by(20, 50.0)
        time.sleep(0.3)
        here.pass_by(1, 50.0)
        refused = here.told("guard", action="shield")
        assert [event["state"] for event in refused] == ["refused"] and "no control group" in refused[0][
            "text"
        ]
    finally:
        here.close()


def test_shaping_without_what_it_needs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Along(monkeypatch, "period = '1h'\nttft_p95 = '< 1 s'", actions=("shape",))
    assert here.told("guard", action="shape", state="refused")
    here.pass_by(5, 50.0)
    here.close()


# -- a real vLLM -------------------------------------------------------------------------------------

BUSY = Profile(
    "busy", clients=3, prompt=Length(40, 0.2, 8, 100), output=Length(60, 0.2, 20, 100), think_ms=0.0
)


@pytest.fixture
def steps_go_on(vllm_server: Server) -> Iterator[Server]:
    with Load(vllm_server, BUSY.but(duration_s=200.0)):
        time.sleep(0.5)
        yield vllm_server


def wait_for(orders: KnobOrders, tokens: int | None, seconds: float = 5.0) -> KnobState:
    deadline = time.monotonic() + seconds
    while (state := orders.state()).tokens != tokens and time.monotonic() < deadline:
        time.sleep(0.02)
    return state


def knobs_now(server: Server) -> tuple[int | None, int | None]:
    """(tokens, sequences) as a fresh attachment finds them: what they were when it took hold of them."""
    attachment = attach(discover(server.pid)[0])
    try:
        assert isinstance(attachment.source, PythonSource)
        orders = KnobOrders(attachment.source.engine_session)
        orders.order()  # nothing is asked for: only noted
        deadline = time.monotonic() + 5
        while orders.state().tokens_was is None and time.monotonic() < deadline:
            attachment.source.renew()
            attachment.source.poll()
            time.sleep(0.05)
        state = orders.state()
        return state.tokens_was, state.sequences_was
    finally:
        attachment.close()


@pytest.mark.engine
@pytest.mark.root
@pytest.mark.attach_safety
def test_knobs_of_a_live_vllm_are_turned_and_go_back(steps_go_on: Server) -> None:
    before = knobs_now(steps_go_on)
    assert before == (steps_go_on.options.batch_tokens, steps_go_on.options.slots)
    attachment = attach(discover(steps_go_on.pid)[0])
    try:
        source = attachment.source
        assert isinstance(source, PythonSource)
        orders = KnobOrders(source.engine_session)
        orders.order(tokens=64, sequences=2, room=16)
        state = wait_for(orders, 80)
        assert (state.tokens, state.tokens_was) == (80, before[0])
        assert state.sequences is not None and 2 <= state.sequences < before[1]
        deadline = time.monotonic() + 4  # requests come and go: more want to run than may
        while time.monotonic() < deadline:
            source.renew()
            orders.renew()
            time.sleep(0.2)
        orders.order(tokens=1)  # bounded: those that run keep their tokens
        assert 16 < (wait_for(orders, 17 + 2).tokens or 0) < 64
        orders.release()
        assert wait_for(orders, before[0]).tokens == before[0]
        orders.order(tokens=64)
        assert wait_for(orders, 64).tokens == 64
        source.renew()
        time.sleep(LEASE_S + 0.5)  # nobody renews the order
        assert wait_for(orders, before[0]).tokens == before[0]
        orders.renew()
        assert wait_for(orders, 64).tokens == 64
    finally:
        attachment.close()
    assert knobs_now(steps_go_on) == before


HOLDER = """
import sys, time
from latencyprism.agent.knobs import KnobOrders
from latencyprism.detect import Detector
from latencyprism.engines.discovery import discover
from latencyprism.sentinel.targets import attach
source = attach(discover(int(sys.argv[1]))[0]).source
orders = KnobOrders(source.engine_session)
orders.order(tokens=64)
while True:
    source.renew()
    orders.renew()
    if orders.state().tokens == 64:
        print("turned", flush=True)
    time.sleep(0.2)
"""


@pytest.mark.engine
@pytest.mark.root
@pytest.mark.attach_safety
def test_a_killed_watch_leaves_the_knobs_as_they_were(steps_go_on: Server) -> None:
    before = knobs_now(steps_go_on)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(steps_go_on.pid)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "turned\n"
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(10)
        holder.stdout.close()
    time.sleep(3.5)  # the lease of the probe
    assert knobs_now(steps_go_on) == before


def comes(file: Path, text: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (there := text in file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return there


def guarded(server: Server, tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """Events of a watch with a guard while long prompts come in beside short ones; ended by SIGTERM once it
    has shaped."""
    file = tmp_path / "slo.toml"
    file.write_text('period = "1h"\ntpot_p95 = "< 6 ms"\n')
    long = Profile("long", clients=2, prompt=Length(900, 0.1, 600, 1200), output=Length(4), think_ms=500.0)
    told = tmp_path / f"told{len(list(tmp_path.iterdir()))}"
    with told.open("w") as stdout, Load(server, long.but(duration_s=90.0)):
        process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "latencyprism", "watch", "--json", "--no-capture",
             "-p", str(server.pid), "--budget", "5%", "--slo", str(file), "--guard", "shape,ready,notify",
             *arguments],
            stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=tempfile.gettempdir(),
        )  # fmt: skip
        if not comes(told, '"event": "attached"', 40.0):
            process.send_signal(signal.SIGABRT)  # it tells where it stands
            pytest.fail(f"no word of the watch:\n{process.communicate(timeout=30)[1]}")
        comes(told, '"action": "shape"', 50.0)
        time.sleep(8.0)  # so that there is an effect to be measured
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and err == ""
    out = told.read_text()
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.engine
@pytest.mark.root
@pytest.mark.attach_safety
def test_the_guard_shapes_a_live_vllm_and_takes_it_back(steps_go_on: Server, tmp_path: Path) -> None:
    before = knobs_now(steps_go_on)
    tried = guarded(steps_go_on, tmp_path, "--dry-run")
    shaped = [e for e in tried if e["event"] == "guard" and e["action"] == "shape"]
    assert shaped and {e["state"] for e in shaped} == {"dry run"}
    assert not [e for e in tried if e["event"] == "guard_effect"]
    assert knobs_now(steps_go_on) == before
    events = guarded(steps_go_on, tmp_path)
    shaped = [e for e in events if e["event"] == "guard" and e["action"] == "shape"]
    assert shaped, events
    assert shaped[0]["state"] == "on" and shaped[0]["tokens"] < before[0]
    assert shaped[0]["estimate"]["step_ms"] < shaped[0]["estimate"]["step_ms_before"]
    assert shaped[-1]["state"] == "taken back"
    effects = [e for e in events if e["event"] == "guard_effect" and e["action"] == "shape"]
    assert effects and effects[-1]["after"]["steps"] > 0 and effects[-1]["before"]["steps"] > 0
    assert [e for e in events if e["event"] == "forecast"]
    assert knobs_now(steps_go_on) == before


def test_the_guard_shapes_sglang_by_its_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No request of it is followed: full steps say that prompts wait, and its decodes that somebody does."""
    words = [0] * 64
    header = SimpleNamespace(
        header=words.__getitem__, set_header=words.__setitem__, readings_off=list, lost=0
    )
    source = object.__new__(PythonSource)
    source._engine_pid = 4242
    source._sessions = {4242: cast(Any, SimpleNamespace(ring=header))}
    source.requests = cast(Any, SimpleNamespace(under_way=list))
    along = Along(monkeypatch, "period = '1h'\ntpot_p95 = '< 50 ms'", actions=("shape",))
    detector = Detector()
    title = SimpleNamespace(role="engine", process=SimpleNamespace(cmdline=["sglang::scheduler"]))
    watch = along.watch
    watch.replica.engine, watch.replica.members = "sglang", (title,)  # type: ignore[misc,assignment]
    watch.attachment.source, watch.detector = source, detector
    for member in along.members:
        member.attached(watch)
    assert not [e for e in along.events if e["event"] == "guard" and e.get("state") == "refused"][1:]
    at = time.monotonic_ns() - 100 * S
    for number in range(400):
        prefill = 0 if number % 4 else 1016 if number % 8 else 200
        took = int((10.0 + 0.4 * prefill) * 1e6)
        step = Step("sglang", 0, 0, number, at, at + took, None, 8 + (prefill > 0), int(prefill > 0), 8,
                    prefill, 8, 0, 8000, prefill * 600, running=8, waiting=2)  # fmt: skip
        at += took + 100_000
        detector.observe(step)
        for member in along.members:
            member.window(watch, Window([step]), [])
    told = [event for event in along.events if event["event"] == "guard" and event["state"] == "on"]
    assert told and 16 < told[0]["tokens"] < 512 and told[0]["tokens_whole"] == 1024
    assert told[0]["estimate"]["step_ms"] < 0.6 * told[0]["estimate"]["step_ms_before"]
    assert words[ring.H_KNOB_TOKENS] == told[-1]["tokens"]
