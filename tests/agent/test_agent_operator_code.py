"""The native callbacks, called in a process of their own: a wrong byte ends that one alone."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the code is for x86-64")

HEAD = """
import ctypes, json, mmap, struct, threading, time
import numpy as np
from latencyprism.agent import operator_code as code
from latencyprism.agent.operator_ring import RING_BYTES

removed = []
remove = ctypes.CFUNCTYPE(None, ctypes.c_uint64)(removed.append)
ring_map = mmap.mmap(-1, RING_BYTES)
ring = ctypes.addressof(ctypes.c_char.from_buffer(ring_map))
words = (ctypes.c_int64 * 8).from_address(ring)
text, places = code.assemble(0xA0, 0xC0)
text = text.replace(code.RING_MARK, struct.pack("<Q", ring))
text = text.replace(code.REMOVE_MARK, struct.pack("<Q", ctypes.cast(remove, ctypes.c_void_p).value))
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(text)
base = ctypes.addressof(ctypes.c_char.from_buffer(page))
start = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p)(base + places["start"])
end = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(base + places["end"])
counter = ctypes.CFUNCTYPE(ctypes.c_uint64)(base + places["counter"])
pointer = ctypes.CFUNCTYPE(ctypes.c_uint64)(base + places["pointer"])
take = ctypes.CFUNCTYPE(ctypes.c_uint64)(base + places["take"])

def function(schema, by_schema=1):
    made = ctypes.create_string_buffer(256)
    struct.pack_into("<Q", made, 0xA0, schema)
    made[0xC0] = by_schema
    return made

def arm(limit=10**9, deadline=2**63 - 1, handle=77):
    words[0], words[1], words[2], words[3], words[4] = code.STATE_ARMED, deadline, 0, limit, handle

def call(made):
    result = ctypes.c_uint64(123)
    assert start(ctypes.addressof(result), ctypes.addressof(made)) == ctypes.addressof(result)
    assert result.value == 0, "no context is handed back"

def records(count):
    return np.frombuffer(ring_map[4096 : 4096 + 32 * count], "<i8").reshape(-1, 4).tolist()
"""


def run(body: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", HEAD + body], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_start_and_its_end_are_two_whole_records() -> None:
    seen = run(
        "arm(); before = counter(); call(function(0xABCDEF)); end(0, 0); call(function(5, by_schema=0))\n"
        "print(json.dumps([before, counter(), pointer(), words[2], words[0], removed, records(4)]))"
    )
    before, after, pointer, head, state, removed, (start, end, by_string, none) = seen
    assert head == 3 and state == 1 and removed == []
    assert [start[1:], end[1:]] == [[0xABCDEF, pointer, 1], [0, pointer | 1, 2]]
    assert by_string[1] == 0 and by_string[3] == 3 and none == [0, 0, 0, 0]
    assert before <= start[0] <= end[0] <= after


def test_past_the_deadline_it_takes_itself_away_once_and_writes_nothing() -> None:
    seen = run(
        "arm(deadline=1)\nfor _ in range(3):\n call(function(9)); end(0, 0)\n"
        "print(json.dumps([removed, words[0], words[2], words[4], words[5] > 0, records(2), take()]))"
    )
    assert seen == [[77], 2, 0, 0, True, [[0] * 4] * 2, 0]


def test_at_the_limit_it_takes_itself_away_and_what_is_under_way_writes_nothing_more() -> None:
    seen = run(
        "arm(limit=3)\nfor _ in range(4):\n call(function(9))\nfor _ in range(4):\n end(0, 0)\n"
        "print(json.dumps([removed, words[0], [r[3] for r in records(6)]]))"
    )
    assert seen == [[77], 2, [1, 2, 3, 0, 0, 0]]


def test_a_handle_that_was_taken_is_not_removed_again() -> None:
    seen = run("arm(); taken = take(); words[1] = 0; call(function(1)); print(json.dumps([taken, removed]))")
    assert seen == [77, []]


def test_many_threads_write_records_of_their_own_and_one_removes() -> None:
    seen = run(
        "arm(limit=40_000)\n"
        "all_there = threading.Barrier(4)\n"
        "def work(n):\n made = function(n); all_there.wait()\n"
        " for _ in range(7000):\n  call(made); end(0, 0)\n all_there.wait()\n"
        "threads = [threading.Thread(target=work, args=(n + 1,)) for n in range(4)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "rows = np.array(records(40_000))\n"
        "owners = {}\n"
        "for _, schema, thread, _ in rows.tolist():\n"
        " if schema: owners.setdefault(schema, set()).add(thread)\n"
        "print(json.dumps([removed, bool((rows[:, 3] == np.arange(1, 40_001)).all()),"
        " [len(o) for o in owners.values()], len(set.union(*owners.values()))]))"
    )
    assert seen == [[77], True, [1, 1, 1, 1], 4]


def test_the_ring_wraps() -> None:
    seen = run(
        "arm(); words[2] = code.SLOTS - 1; made = function(3)\ncall(made); call(made)\n"
        "print(json.dumps([records(1)[0][3] - code.SLOTS, words[2] - code.SLOTS]))"
    )
    assert seen == [1, 1]
