"""Control groups are changed within bounds and put back, whatever becomes of whoever changed them."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from latencyprism.errors import BadInput, PrismError
from latencyprism.host.cgroup import find_cpu_mount
from latencyprism.slo import shield as shield_module
from latencyprism.slo.shield import RAISE, Change, Shield, confine, group_of, raise_weight

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def wait_for(what: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.02)
    return what()


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of its own with a CPU controller, removed afterwards."""
    mount = find_cpu_mount()
    if mount is None:
        pytest.skip("no control group for CPU time here")
    folder = Path(mount.directory) / f"lprism-test-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error.strerror}")
    try:
        if not any((folder / name).exists() for name in ("cpu.shares", "cpu.weight")):
            pytest.skip("no control group with a CPU controller can be made")
        yield folder
    finally:
        folder.rmdir()


@pytest.fixture
def member(group: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(SLEEP)
    (group / "cgroup.procs").write_text(str(process.pid))
    yield process
    process.kill()
    process.wait()
    assert wait_for(lambda: not (group / "cgroup.procs").read_text())


def said(path: Path) -> str:
    return path.read_text().strip()


@pytest.mark.root
def test_weight_of_a_real_group_is_raised_and_put_back(group: Path, member: subprocess.Popen[bytes]) -> None:
    change = raise_weight(member.pid)
    before = said(change.path)
    assert change.path.parent == group and int(change.after) == RAISE * int(before)
    assert change.estimate["share"] > change.estimate["share_before"]  # type: ignore[operator]
    shield = Shield()
    shield.make(change)
    shield.make(change)
    assert said(change.path) == change.after and len(shield.made) == 1
    shield.close()
    assert said(change.path) == before
    shield.close()


@pytest.mark.root
def test_a_real_neighbour_is_confined_and_let_go(group: Path) -> None:
    change = confine(group, [os.getpid()])
    before = said(change.path)
    shield = Shield()
    shield.make(change)
    assert said(change.path) == change.after != before
    again = confine(group)
    assert again.before == again.after  # nothing is left to take
    shield.make(again)
    assert shield.made == [change]
    shield.close()
    assert said(change.path) == before


@pytest.mark.root
def test_the_engines_own_group_is_not_confined(group: Path, member: subprocess.Popen[bytes]) -> None:
    inner = group / "inner"
    inner.mkdir()
    try:
        (inner / "cgroup.procs").write_text(str(member.pid))
        for folder in (group, inner):
            with pytest.raises(BadInput, match="of the engine is in it"):
                confine(folder, [member.pid])
        (group / "cgroup.procs").write_text(str(member.pid))
        assert confine(inner, [member.pid]).after
    finally:
        inner.rmdir()


HOLDER = """
import sys, time
from pathlib import Path
from latencyprism.slo.shield import Shield, confine
shield = Shield()
shield.make(confine(Path(sys.argv[1])))
print(shield._keeper.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.root
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_holder_leaves_nothing_changed(group: Path, number: int) -> None:
    file = next(group / name for name in ("cpu.max", "cpu.cfs_quota_us") if (group / name).exists())
    before = said(file)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(group)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    keeper = int(holder.stdout.readline())
    assert said(file) != before
    os.kill(holder.pid, number)
    holder.wait(10)
    holder.stdout.close()
    assert wait_for(lambda: said(file) == before)
    assert wait_for(lambda: not Path(f"/proc/{keeper}").exists())


def change_of(path: Path, before: str = "100", after: str = "400") -> Change:
    path.write_text(before)
    return Change(path, before, after, "a change", {})


def test_a_holder_that_hangs_loses_its_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shield_module, "LEASE_S", 0.8)
    file = tmp_path / "cpu.shares"
    shield = Shield()
    shield.make(change_of(file))
    for _ in range(6):
        time.sleep(0.2)
        assert shield.renew() and said(file) == "400"
    assert wait_for(lambda: said(file) == "100")
    assert wait_for(lambda: not shield.renew())
    with pytest.raises(PrismError, match="has ended"):
        shield.make(change_of(tmp_path / "cpu.weight"))
    assert said(tmp_path / "cpu.weight") == "100"
    shield.close()


def test_what_somebody_else_wrote_meanwhile_stays(tmp_path: Path) -> None:
    file = tmp_path / "cpu.shares"
    shield = Shield()
    shield.make(change_of(file))
    file.write_text("777")
    shield.close()
    assert said(file) == "777"


def test_a_file_is_changed_once(tmp_path: Path) -> None:
    """A replica that is started again in its group does not get the sixteenfold."""
    file = tmp_path / "cpu.shares"
    shield = Shield()
    shield.make(change_of(file))
    shield.make(Change(file, "400", "1600", "", {}))
    assert said(file) == "400" and len(shield.made) == 1
    shield.close()
    assert said(file) == "100"


def test_few_changes_are_made(tmp_path: Path) -> None:
    shield = Shield()
    for n in range(8):
        shield.make(change_of(tmp_path / str(n)))
    with pytest.raises(PrismError, match="no more changes"):
        shield.make(change_of(tmp_path / "8"))
    shield.close()
    assert {said(file) for file in tmp_path.iterdir()} == {"100"}


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    shield = Shield()
    with pytest.raises(PrismError, match="cannot write"):
        shield.make(Change(tmp_path / "absent" / "cpu.shares", "1", "2", "", {}))
    assert shield.made == []
    shield.close()


def test_quota_of_version_two(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("max 100000\n")
    change = confine(tmp_path)
    assert (change.before, change.after) == ("max 100000", "25000 100000")
    (tmp_path / "cpu.max").write_text("20000 100000\n")
    assert confine(tmp_path).after == "20000 100000"  # never more than it had


@pytest.mark.parametrize(
    "folder", ["/proc", "relative/folder", "/sys/fs/cgroup/../../../etc", "/nonexistent"]
)
def test_what_is_no_group_is_told(folder: str) -> None:
    with pytest.raises(BadInput, match="is no control group"):
        confine(Path(folder))


@pytest.mark.parametrize("text", ["", "nonsense", "nan 100000", "-5 100000"])
def test_a_quota_that_makes_no_sense_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "cpu.max").write_text(text)
    with pytest.raises(PrismError):
        confine(tmp_path)


def test_the_root_group_and_a_process_that_is_gone_are_told() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with pytest.raises(PrismError, match="cannot shield"):
        group_of(ended.pid)
