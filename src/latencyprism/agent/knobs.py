"""Orders to the probe's knobs (``probe/knobs.py``): bounded, on a lease of their own, taken back."""

from __future__ import annotations

import time
from typing import NamedTuple

from latencyprism.agent.session import ProbeSession
from latencyprism.records import ring

LEASE_S = 2.0


class KnobState(NamedTuple):
    """None where no order was ever carried out. ``done``: number of the last order that was; negative: that
    order was refused."""

    tokens: int | None
    tokens_was: int | None
    sequences: int | None
    sequences_was: int | None
    done: int
    prompt: int | None = None
    """Tokens a step that one long prompt gets now; None: as many as there are."""


class KnobOrders:
    """Of one session. An order holds for ``LEASE_S`` after it was given or renewed."""

    def __init__(self, session: ProbeSession) -> None:
        self._session = session
        self._number = 0
        self._held = False

    def order(self, *, tokens: int | None = None, sequences: int | None = None, room: int = 0) -> int:
        """At most so many tokens a step, sequences at once (None: as it was). ``room``: so many tokens more,
        which long prompts leave to others, where the engine can limit them. The same again is harmless.
        Its number, which ``state`` tells as ``done`` once it was carried out, with the next step."""
        for value in (tokens, sequences):
            if value is not None and not 0 < value < 1 << 31:
                raise ValueError(f"{value} is no order")
        header = self._session.ring
        header.set_header(ring.H_KNOB_TOKENS, tokens or 0)
        header.set_header(ring.H_KNOB_SEQUENCES, sequences or 0)
        header.set_header(ring.H_KNOB_ROOM, max(room, 0) if tokens else 0)
        self._held = True
        self._give()
        return self._number

    def renew(self) -> None:
        """Given anew where its lease had run out meanwhile; nothing where none is given or it was refused."""
        if not self._held or self.refused:
            return
        if self._session.ring.header(ring.H_KNOB_ORDER) == self._number:
            self._extend()
        else:
            self._give()

    def _give(self) -> None:
        self._extend()
        self._number += 1
        self._session.ring.set_header(ring.H_KNOB_ORDER, self._number)

    def _extend(self) -> None:
        self._session.ring.set_header(ring.H_KNOB_UNTIL_NS, time.monotonic_ns() + int(LEASE_S * 1e9))

    def release(self) -> None:
        """Back to what it was, with the next step."""
        self._held = False
        self._session.ring.set_header(ring.H_KNOB_UNTIL_NS, 0)

    @property
    def refused(self) -> bool:
        """The last order was dropped: the probe's notices say why."""
        return bool(self._number) and self._session.ring.header(ring.H_KNOB_DONE) == -self._number

    def state(self) -> KnobState:
        header = self._session.ring.header
        done = header(ring.H_KNOB_DONE)
        words = (
            ring.H_KNOB_TOKENS_NOW,
            ring.H_KNOB_TOKENS_WAS,
            ring.H_KNOB_SEQUENCES_NOW,
            ring.H_KNOB_SEQUENCES_WAS,
        )
        tokens, tokens_was, sequences, sequences_was = (header(word) or None for word in words)
        prompt = header(ring.H_KNOB_PROMPT_NOW) or None
        return KnobState(tokens, tokens_was, sequences, sequences_was, done, prompt)
