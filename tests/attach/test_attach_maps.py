"""Memory maps and the files behind them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latencyprism.attach.maps import open_mapped, parse_maps, read_maps
from latencyprism.errors import TargetRefused


def test_own_map_has_this_libc() -> None:
    address = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p).value
    assert address is not None
    (hit,) = [one for one in read_maps(os.getpid()) if one.start <= address < one.end]
    assert "x" in hit.perms and "libc" in hit.path
    descriptor = open_mapped(os.getpid(), hit)
    assert os.pread(descriptor, 4, 0) == b"\x7fELF"
    os.close(descriptor)


def test_lines() -> None:
    raw = (
        b"00400000-00401000 r-xp 00000000 fd:01 77                         /opt/a b/lib\\012x.so (deleted)\n"
        b"7ffc0000-7ffd0000 rw-p 00000000 00:00 0                          [stack]\n"
        b"7fff0000-7fff1000 rw-p 00000000 00:00 0 \n"
        b"junk\n0002-0001 rw-p 0 00:00 0\n"
    )
    first, stack, nameless = parse_maps(raw)
    assert (first.path, first.deleted, first.inode) == ("/opt/a b/lib\nx.so", True, 77)
    assert (stack.path, stack.perms) == ("[stack]", "rw-p")
    assert nameless.path == ""


@given(st.binary(max_size=400))
def test_any_bytes_are_parsed_or_left_out(raw: bytes) -> None:
    for mapping in parse_maps(raw):
        assert 0 <= mapping.start < mapping.end


MAPPING = (
    "import mmap, sys, time\nf=open(sys.argv[1],'rb')\nm=mmap.mmap(f.fileno(),4096,access=mmap.ACCESS_READ)\n"
    "print('ready',flush=True)\ntime.sleep(30)\n"
)


def test_deleted_and_replaced_file_is_the_mapped_one_or_refused(tmp_path) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(b"old" + bytes(4093))
    process = subprocess.Popen([sys.executable, "-c", MAPPING, str(path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        path.unlink()
        path.write_bytes(b"new" + bytes(4093))
        (hit,) = [one for one in read_maps(process.pid) if one.path == str(path)]
        assert hit.deleted
        try:
            descriptor = open_mapped(process.pid, hit)
        except TargetRefused as refused:
            assert "replaced" in refused.why
        else:
            assert os.pread(descriptor, 3, 0) == b"old"
            os.close(descriptor)
    finally:
        process.kill()
        process.communicate()


def test_gone_process() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    time.sleep(0.05)
    with pytest.raises(TargetRefused):
        read_maps(process.pid)
