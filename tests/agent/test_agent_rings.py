"""Threads that write, each into a ring of its own; loss counted; a record is whole or not taken."""

from __future__ import annotations

import mmap
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latencyprism.agent.probe import monitor
from latencyprism.agent.probe.lane import Lane
from latencyprism.errors import TargetRefused
from latencyprism.records import ring

SCRIPT = """
class Loop:
    def step(self, x):
        return x
def turns(threads, n):
    barrier = threading.Barrier(threads)
    def run(k):
        loop = Loop()
        barrier.wait()
        for i in range(n): loop.step(k * 1000000 + i)
        barrier.wait()
    them = [threading.Thread(target=run, args=(k,)) for k in range(threads)]
    [t.start() for t in them]; [t.join() for t in them]
"""
READER = """
def reader(probe, config):
    def leave(state, args, result, start, end):
        probe.emit(9, (args[1], args[1] * 2, args[1] * 3))
    probe.observe(sys.modules["__main__"].Loop, "step", None, leave)
    return []
"""


@pytest.mark.attach_safety
def test_every_thread_has_a_ring(start, python, monkeypatch) -> None:
    target = start(SCRIPT, python)
    session = target.attach(monkeypatch, READER)
    target.ask("turns(4, 200)")
    by_ring: dict[int, list[int]] = {}
    for record in session.read():
        assert record.words[:3] == (record.words[0], record.words[0] * 2, record.words[0] * 3)
        by_ring.setdefault(record.ring, []).append(record.words[0])
    assert session.live, session.health()
    assert len(by_ring) == 4 and session.ring.lost == 0
    for values in by_ring.values():
        assert values == [values[0] // 1000000 * 1000000 + n for n in range(200)]
    threads = {session.ring.header(ring.H_THREADS + n) for n in by_ring}
    assert len(threads) == 4 and 0 not in threads
    # The rings of threads that have ended are used again; they go on where they were.
    target.ask("turns(8, 50)")
    assert sum(1 for _ in session.read()) == 400 and session.health()["unringed"] == 0


@pytest.mark.attach_safety
def test_more_threads_than_rings_are_counted(start, monkeypatch) -> None:
    target = start(SCRIPT)
    session = target.attach(monkeypatch, READER)
    target.ask("turns(11, 30)")
    assert sum(1 for _ in session.read()) == 8 * 30
    assert session.health()["unringed"] == 3 * 30 and session.health()["errors"] == 0


@pytest.fixture
def small(tmp_path, request):
    """A folder with room for as many bytes as asked for."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.attach_safety
@pytest.mark.parametrize("small", ["300k"], indirect=True)
def test_no_room_for_a_second_ring_is_counted_and_kills_nobody(start, python, monkeypatch, small) -> None:
    monkeypatch.setattr("latencyprism.agent.session.shared_folder", lambda pid: (small, str(small)))
    target = start(SCRIPT, python)
    session = target.attach(monkeypatch, READER)
    with (small / "fill").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    target.ask("turns(3, 20)")
    assert sum(1 for _ in session.read()) == 20
    assert session.health()["unringed"] == 40 and session.health()["errors"] == 0


@pytest.mark.attach_safety
@pytest.mark.parametrize("small", ["64k"], indirect=True)
def test_no_room_at_all_is_refused_before_anything_is_touched(start, monkeypatch, small) -> None:
    monkeypatch.setattr("latencyprism.agent.session.shared_folder", lambda pid: (small, str(small)))
    target = start(SCRIPT)
    with pytest.raises(TargetRefused, match="no room"):
        target.attach(monkeypatch, READER)
    assert list(small.iterdir()) == []


@pytest.mark.attach_safety
def test_a_record_inside_a_record_is_counted(start, monkeypatch) -> None:
    """As when a signal handler calls an observed method while the probe writes."""
    target = start(SCRIPT + "loop = Loop()\n")
    session = target.attach(monkeypatch, READER)
    lane = "sys.modules['_latencyprism_probe'].lanes[threading.get_ident()]"
    target.ask(f"[loop.step(1), setattr({lane}, 'busy', True), loop.step(2), setattr({lane}, 'busy', False)]")
    target.ask("loop.step(3)")
    assert [record.words[0] for record in session.read()] == [1, 3]
    assert session.health()["nested"] == 1


def test_writer_at_full_speed_is_never_misread(tmp_path: Path) -> None:
    """A small ring, a writer that never waits: what is taken is right, all else is counted."""
    path = tmp_path / "r"
    for checked in (False, True):
        path.unlink(missing_ok=True)
        ring.create_ring(str(path), 8, 1, checked=checked)
        reader = ring.RingReader(str(path))
        script = (
            "import sys, mmap\nfrom latencyprism.agent.probe.lane import Lane\n"
            f"f = open({str(path)!r}, 'r+b'); m = mmap.mmap(f.fileno(), 0); w = memoryview(m).cast('q')\n"
            "lane = Lane(m, w, 0)\nfor i in range(60000): lane.put(9, (i, i * 3, -i, i + 7))\n"
        )
        writer = subprocess.Popen([sys.executable, "-c", script])
        taken, last = 0, -1
        while writer.poll() is None or reader.pending():
            for record in reader.read():
                value = record.words[0]
                assert record.kind == 9 and record.words[1:4] == (value * 3, -value, value + 7)
                assert value > last
                taken, last = taken + 1, value
        assert writer.returncode == 0 and taken + reader.lost == 60000 and taken > 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_checked_ring_survives_stores_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    """What another processor may see of a record whose words arrive one by one, in any order, head
    included."""
    rng = random.Random(seed)
    path = tmp_path_factory.mktemp("order") / "r"
    ring.create_ring(str(path), 2, 1, checked=True)
    with path.open("r+b") as file:
        visible = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
    image = mmap.mmap(-1, len(visible) * 8)
    image[:] = bytes(visible)
    words = memoryview(image).cast("q")
    lane, reader = Lane(image, words, 0), ring.RingReader(str(path))
    taken, written = [], []
    for turn in range(12):
        written.append([rng.randrange(-(2**60), 2**60) for _ in range(rng.randrange(1, 9))])
        lane.put(9, written[-1])
        stores = [at for at in range(len(words)) if words[at] != visible[at]]
        rng.shuffle(stores)
        for at in stores:
            visible[at] = words[at]
            if rng.random() < 0.05:
                taken += [(turn, record.words) for record in reader.read()]
        taken += [(turn, record.words) for record in reader.read()]
    for _, payload in taken:
        assert list(payload) in [row + [0] * (ring.MAX_PAYLOAD_WORDS - len(row)) for row in written]
    assert len(taken) + reader.lost == 12


def test_a_sweep_leaves_calls_that_began_meanwhile(monkeypatch) -> None:
    """One began after the frames were looked at, one took the place of a frame that ended."""
    ended, fresh, reused = (None, (), 1), (None, (), 2), (None, (), 3)
    hook = SimpleNamespace(open={10: ended, 20: ended}, code=None, sweep_at_ns=0)

    def frames():
        hook.open.update({20: reused, 30: fresh})
        return {}

    monkeypatch.setattr(monitor, "sys", SimpleNamespace(_current_frames=frames))
    monitor.sweep(hook, 0)
    assert hook.open == {20: reused, 30: fresh}
