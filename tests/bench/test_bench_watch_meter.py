"""What the watch cost is told by time and by step, and what others burnt is not what we burnt."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from latencyprism.bench.watch_meter import Meter, per_step
from latencyprism.lab.serve import descendants

BURN = "import time\nend = time.process_time() + 0.6\nwhile time.process_time() < end: pass\n"


class Watch:
    def __init__(self) -> None:
        self.spent_s = 1.0

    def cpu_s(self) -> float:
        return self.spent_s

    def rss_mb(self) -> float:
        return 80.0


def test_cost_by_step() -> None:
    assert per_step(0.02, 6000, 60.0) == {"steps_per_s": 100.0, "watcher_us_per_step": 200.0}
    assert per_step(0.02, None, 60.0)["watcher_us_per_step"] is None
    assert per_step(0.02, 0, 60.0)["steps_per_s"] is None


def test_share_of_the_watch() -> None:
    watch = Watch()
    meter = Meter(watch)
    time.sleep(0.5)
    watch.spent_s += 0.1
    told = meter.read()
    assert 0.05 < told["watcher_cpu_share"] <= 0.2 and told["watcher_rss_mb"] == 80.0
    assert 0.0 <= told["others_cpu_share"] <= 1.0 and 0.0 <= told["steal_share"] <= 1.0


def test_what_children_burn_is_ours_also_after_their_end() -> None:
    meter = Meter(Watch())
    own_s = meter._own_s
    child = subprocess.Popen([sys.executable, "-c", BURN])
    assert {os.getpid(), child.pid} <= set(descendants(os.getpid()))
    child.wait(30)
    again = Meter(Watch())
    assert again._own_s - own_s >= 0.55
