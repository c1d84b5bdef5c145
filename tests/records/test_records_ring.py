"""The ring's reader against a writer that keeps its rules, and against files that are no rings."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.records import ring


class Writer:
    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self.words = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")
        self.count = 0

    def put(self, value: int) -> None:
        at = ring.HEADER_BYTES // 8 + (self.count % self.words[ring.H_SLOTS]) * ring.SLOT_WORDS
        self.words[at] = 2 * self.count + 1
        self.words[at + 1] = ring.KIND_SPAN
        for offset in range(ring.MAX_PAYLOAD_WORDS):
            self.words[at + 2 + offset] = value
        self.words[at] = 2 * self.count + 2
        self.count += 1
        self.words[ring.H_HEADS] = self.count


@given(bursts=st.lists(st.integers(0, 40), max_size=12))
def test_nothing_invented_and_all_lost_counted(
    tmp_path_factory: pytest.TempPathFactory, bursts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("ring") / "r"
    ring.create_ring(str(path), 16, 5)
    writer, reader = Writer(path), ring.RingReader(str(path))
    seen: list[int] = []
    written = 0
    for burst in bursts:
        for _ in range(burst):
            writer.put(written)
            written += 1
        for record in reader.read():
            assert len(set(record.words)) == 1
            seen.append(record.words[0])
    assert len(seen) + reader.lost == written
    assert seen == sorted(set(seen))
    assert reader.lost == sum(max(0, burst - 16) for burst in bursts)


def test_record_being_written_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "r"
    ring.create_ring(str(path), 4, 5)
    writer, reader = Writer(path), ring.RingReader(str(path))
    for value in range(3):
        writer.put(value)
    at = ring.HEADER_BYTES // 8 + 1 * ring.SLOT_WORDS
    writer.words[at] = 2 * 5 + 1  # the writer came round and is in the middle of record 5
    assert [record.words[0] for record in reader.read()] == [0, 2]
    assert (reader.lost, reader.torn) == (1, 1)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 5000, b"x" * 5000, struct.pack("<qqq", ring.MAGIC, 1 << 40, 1) + b"\0" * 5000]
)
def test_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r"
    path.write_bytes(content)
    with pytest.raises((ring.RingError, ValueError)):
        ring.RingReader(str(path))


def test_ring_is_never_made_over_something(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        ring.create_ring(str(path), 16, 1)
    assert not (tmp_path / "elsewhere").exists()


def test_message_of_the_target_is_made_harmless(tmp_path: Path) -> None:
    path = tmp_path / "r"
    ring.create_ring(str(path), 16, 1)
    with path.open("r+b") as file:
        file.seek(ring.MESSAGE_OFFSET)
        file.write(b"a\x1b[31mb\xff\nc\0hidden")
    assert ring.RingReader(str(path)).message() == "a[31mb\ufffdc"
