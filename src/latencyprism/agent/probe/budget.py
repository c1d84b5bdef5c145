"""What the probe costs, against what it may: the dearest optional readings go first, all of it last.

Every hook measures the time of its reader's functions, and a fixed price per call is added for what lies
outside of these (``PRICE_WRAPPER_NS``, ``PRICE_MONITOR_NS``). Judged over windows of steps, two in a row, so
that neither a cold start nor one pause counts. Several threads may write; a window is judged by one of them,
and none waits for another.
"""

# [cut
from latencyprism.agent.probe.prelude import allocate_lock, get_ident, now_ns, os
from latencyprism.records.ring import (
    H_BUDGET_PPM,
    H_READINGS_OFF,
    H_SHARE_PPM,
    NAMES_BYTES,
    NAMES_OFFSET,
    STATE_OVER_BUDGET,
)

# cut]

WINDOW_STEPS, WINDOW_NS = 128, 100_000_000
"""A window has at least so many steps, and lasts at least so long: one pause of a callback must not decide
about very short steps."""
FLOOR_NS = 40_000
"""Never too dear below this much a step, however short the steps: tiny models would otherwise not be
watched. Twice what the probe is meant to take, since a processor shared with others doubles it."""
HARD_LIMIT_PPM = 50_000
"""Above this share of the step time, with every optional reading gone, the probe removes itself."""
PRICE_WRAPPER_NS, PRICE_MONITOR_NS = 250, 450
"""Of one observed call, beyond what is measured between its own time stamps."""
HARD_WINDOWS = 4
"""Windows in a row above the hard limit that end the watch: to be blind is worse than to cost too much for a
second or two."""
SLOW_NS, HOPELESS_NS = 20_000_000, 100_000_000
STALLS_PART, STALLS_TIMES, STALLS_FLOOR_NS = 20, 8, 50_000
"""A call that takes ``STALLS_TIMES`` the mean of the window before, and ``STALLS_FLOOR_NS``, is a stall.
Stalls count in full where they are more than one call in ``STALLS_PART``."""
WORTH_PART = 20
"""A reading is dropped only if it is more than one part in so many of the cost: the rest would not help."""
READINGS_LIMIT = 62


class Reading:
    """One optional value or hook. A reader asks ``on`` before it reads and adds what that took to
    ``cost_ns``."""

    __slots__ = ("bit", "cost_ns", "hooks", "name", "on", "seen_cost_ns", "window_ns")

    def __init__(self, name, bit):
        self.name, self.bit = name, bit
        self.on = True
        self.cost_ns = self.seen_cost_ns = self.window_ns = 0
        self.hooks = []


class Budget:
    """Keeps the account. ``busy`` and ``judge`` are called by the probe; the outcome is told through the
    ring: the bit of each dropped reading in H_READINGS_OFF, the last window's share in H_SHARE_PPM, and a
    message."""

    def __init__(self, probe):
        self.probe = probe
        self.readings = {}
        self.steps = self.busy_ns = self.last_end_ns = self.over = self.over_hard = 0
        self.told = False
        self.seen_woke_ns = 0
        self.scheduled = (0, 0, 0)
        self.since_ns = now_ns()
        self.stepless = True
        self.judging = allocate_lock()

    def reading(self, name):
        """The handle of an optional reading; the same for the same name. Its bit is its place in order of
        asking."""
        reading = self.readings.get(name)
        if reading is None:
            reading = self.readings[name] = Reading(name, min(len(self.readings), READINGS_LIMIT - 1))
            raw = "\n".join(self.readings).encode()[: NAMES_BYTES - 1] + b"\0"
            self.probe.map[NAMES_OFFSET : NAMES_OFFSET + len(raw)] = raw
        return reading

    def busy(self, start_ns, end_ns):
        """A step was recorded. Steps in flight together count once."""
        self.stepless = False
        last = self.last_end_ns
        if end_ns > last:
            self.busy_ns += end_ns - (start_ns if start_ns > last else last)
            self.last_end_ns = end_ns
        self.steps += 1
        if self.steps >= WINDOW_STEPS:
            self.judge()

    def many(self, steps, busy_ns):
        """``busy`` for some steps at once; ``busy_ns``: without what they overlap."""
        self.stepless = False
        self.busy_ns += busy_ns
        self.steps += steps
        if self.steps >= WINDOW_STEPS:
            self.judge()

    def record(self):
        """A record that is no step, in a process that has none (one that only serves the API): its budget is
        of the time that passes, and the floor is per record."""
        self.steps += 1
        if self.steps >= WINDOW_STEPS:
            self.judge()

    def judge(self):
        """Judge the window that is full, unless another thread does, or has done so since this one looked."""
        if not self.judging.acquire(False):
            return
        try:
            if self.steps >= WINDOW_STEPS and now_ns() - self.since_ns >= WINDOW_NS:
                self.judge_window()
        finally:
            self.judging.release()

    def judge_window(self):
        steps, busy_ns, since_ns = self.steps, self.busy_ns, self.since_ns
        self.steps = self.busy_ns = 0
        self.since_ns = now_ns()
        spent = self.close_window()
        # What other threads wrote meanwhile may be in what was spent.
        steps += self.steps
        busy_ns = now_ns() - since_ns if self.stepless else busy_ns + self.busy_ns
        spent = int(spent * self.share_on_processor())
        words = self.probe.words
        share = spent * 1_000_000 // max(busy_ns, 1)
        words[H_SHARE_PPM] = share
        allowed = max(busy_ns * words[H_BUDGET_PPM] // 1_000_000, FLOOR_NS * steps)
        if spent <= allowed:
            self.over = self.over_hard = 0
            return
        self.over_hard = self.over_hard + 1 if share > HARD_LIMIT_PPM else 0
        self.over += 1
        if self.over < 2:
            return
        self.over = 0
        dropped, total = [], spent
        for reading in sorted(self.readings.values(), key=lambda reading: -reading.window_ns):
            if spent > allowed and reading.on and reading.window_ns * WORTH_PART > total:
                spent -= reading.window_ns
                self.drop(reading)
                dropped.append(reading.name)
        if dropped:
            self.probe.say(
                "over budget (%.2f %% of the step time, %.0f us a step), no longer read: %s"
                % (share / 1e4, total / steps / 1e3, ", ".join(dropped))
            )
        elif share > HARD_LIMIT_PPM and self.over_hard >= HARD_WINDOWS:
            self.probe.say("over budget: %.1f %% of the step time with nothing left to drop" % (share / 1e4))
            self.probe.remove(STATE_OVER_BUDGET)
        elif not self.told and share <= HARD_LIMIT_PPM:
            self.told = True
            self.probe.say("over budget: %.2f %% of the step time, nothing optional is left" % (share / 1e4))

    def share_on_processor(self):
        """Of the time in which this thread could run, the share in which it did, since the last call.

        What the probe measures is time that passes; where processors are taken, most of it is not the
        probe's but somebody else's, and it must not leave just then."""
        thread, ran_ns, waited_ns = get_ident(), 0, 0
        try:
            fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
            try:
                ran_ns, waited_ns = map(int, os.read(fd, 64).split()[:2])
            finally:
                os.close(fd)
        except (OSError, ValueError):
            pass  # not told by this kernel: what passes counts in full
        before, self.scheduled = self.scheduled, (thread, ran_ns, waited_ns)
        ran_ns, waited_ns = ran_ns - before[1], waited_ns - before[2]
        if before[0] != thread or ran_ns <= 0 or waited_ns <= 0:
            return 1.0
        return ran_ns / (ran_ns + waited_ns)

    def close_window(self):
        """The probe's own time in the window that ends, ns; that of each reading in its ``window_ns``."""
        spent = 0
        for reading in self.readings.values():
            reading.window_ns = reading.cost_ns - reading.seen_cost_ns
            reading.seen_cost_ns = reading.cost_ns
        for hook in self.probe.hooks:
            calls, cost = hook.calls - hook.seen_calls, hook.cost_ns - hook.seen_cost_ns
            hook.seen_calls, hook.seen_cost_ns = hook.calls, hook.cost_ns
            stalls, stalled_ns = hook.stalls - hook.seen_stalls, hook.stalled_ns - hook.seen_stalled_ns
            hook.seen_stalls, hook.seen_stalled_ns = hook.stalls, hook.stalled_ns
            # Rare stalls are somebody else's doing, mostly: they count as the longest that a call may take.
            cost += stalled_ns if stalls * STALLS_PART > calls else stalls * hook.limit_ns
            if calls:
                hook.limit_ns = min(max(STALLS_FLOOR_NS, STALLS_TIMES * cost // calls), SLOW_NS)
            if hook.asked:
                continue
            cost += calls * (PRICE_WRAPPER_NS if hook.code is None else PRICE_MONITOR_NS)
            spent += cost
            if hook.reading is not None:
                hook.reading.window_ns += cost
        woke_ns, self.seen_woke_ns = self.probe.woke_ns - self.seen_woke_ns, self.probe.woke_ns
        return max(spent - woke_ns, 0)

    def drop(self, reading):
        """For as long as this attach lasts."""
        reading.on = False
        for hook in reading.hooks:
            hook.remove()
        self.probe.words[H_READINGS_OFF] |= 1 << reading.bit

    def stalled(self, hook, spent_ns, began_ns):
        """One call of a reader's function took long. Mostly that is the collector, another thread that had
        the GIL, or another process that had the processor, and is left out of the account. If it is the value
        that takes its time, it does so again at once: then what reads it goes."""
        probe = self.probe
        hook.cost_ns -= spent_ns
        if probe.gc_end_ns > began_ns:
            spent_ns -= probe.gc_last_ns
        hook.stalls += 1
        hook.stalled_ns += max(spent_ns, 0)
        probe.stalled_ns += max(spent_ns, 0)
        if spent_ns < SLOW_NS:
            return
        hook.slow_at = [*hook.slow_at[-2:], hook.calls]
        in_a_row = 2 if spent_ns >= HOPELESS_NS else 3
        if sum(hook.calls - at < in_a_row for at in hook.slow_at) < in_a_row:
            return
        probe.count_error()
        probe.say("%s took %d ms to read, again" % (hook.label, spent_ns // 1_000_000))
        used = {
            reading: reading.cost_ns - reading.seen_cost_ns
            for reading in self.readings.values()
            if reading.on
        }
        dearest = max(used, key=used.__getitem__, default=None)
        if hook.reading is not None:
            self.drop(hook.reading)
        elif dearest is not None and 2 * used[dearest] > spent_ns:
            self.drop(dearest)  # it is that value, not the rest of what the hook does
        elif hook.asked:
            hook.remove()
        else:
            probe.remove(STATE_OVER_BUDGET)
