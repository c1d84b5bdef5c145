from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.agent.operator_ring import OperatorRecords
from latencyprism.agent.record_spool import RecordSpool


def rows(count: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + 4 * count, dtype=np.int64).reshape(-1, 4)


@given(st.lists(st.integers(0, 50), max_size=20))
def test_what_was_appended_comes_back_in_order(sizes: list[int]) -> None:
    spool = RecordSpool(Path("/tmp"))
    try:
        made = [rows(size, first=1000 * n) for n, size in enumerate(sizes)]
        for array in made:
            spool.append(array)
        assert len(spool) == len(made)
        for _ in range(2):
            assert all((seen == array).all() for seen, array in zip(spool, made, strict=True))
    finally:
        spool.close()


def test_it_has_no_name_and_a_copy_of_the_process_reads_on(tmp_path: Path) -> None:
    spool = RecordSpool(tmp_path)
    spool.append(rows(3))
    assert not list(tmp_path.iterdir())
    pid = os.fork()
    if pid == 0:
        os._exit(int(sum(array.sum() for array in spool)))
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == rows(3).sum()
    spool.close()
    spool.close()
    assert len(spool) == 0


def test_a_folder_that_takes_no_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        RecordSpool(tmp_path / "none")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)


def test_records_for_which_there_is_no_room_count_as_lost_and_the_others_stay_whole(tmp_path: Path) -> None:
    seen = OperatorRecords(1, chunks=RecordSpool(tmp_path))
    with largest_file(32 * 15):
        for number in range(3):
            seen.keep(rows(10, first=100 * number))
    assert seen.lost == 20 and "large" in seen.refused
    kept = list(seen.chunks)
    assert len(kept) == 1 and (kept[0] == rows(10)).all()
