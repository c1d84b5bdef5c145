"""What a forked copy of a watch does first: let go of everything of the watch's, and stand aside."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Sequence

from latencyprism.recorder.idle import step_aside


def part_from_watch(keep: Sequence[int], nice: int) -> None:
    """Call in the copy, before anything else that takes time. Of the descriptors above 2 only ``keep`` stay
    open; ``nice`` as in ``step_aside``."""
    gc.disable()
    # Probes and locks of the watcher must end with the watcher, not with its copy, which may be kept
    # waiting once it is lowered: so before that.
    first = 3
    for kept in sorted(fd for fd in keep if fd > 2):
        os.closerange(first, kept)
        first = kept + 1
    os.closerange(first, 1 << 16)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXCPU, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    # A session of its own: Ctrl-C at the watcher is the watcher's to act on. And at once a low one: an
    # engine's steps were longer while this packed.
    os.setsid()
    step_aside(nice)
