"""How long a step should have taken, and how sure of it the model is."""

from __future__ import annotations


class Expectation:
    """``ms``: expected duration. ``allowance``: log-ratio by which the truth may honestly lie above it
    because the workload is unfamiliar (0 at home, of order one where the model knows nothing)."""

    __slots__ = ("allowance", "attention_ms", "base_ms", "batch_ms", "cells_ms", "context_ms", "drift",
                 "known", "ms", "prefill_ms")  # fmt: skip

    def __init__(self) -> None:
        self.ms = 0.0
        self.allowance = 0.0
        self.known = False
        """Has this kind of work been seen often enough to be learned with caution only?"""
        self.drift = 0.0
        """Log offset for the machine's present speed that is contained in ``ms``."""
        self.base_ms = self.batch_ms = self.context_ms = 0.0
        self.prefill_ms = self.attention_ms = self.cells_ms = 0.0

    @property
    def terms(self) -> dict[str, float]:
        """The expectation in its parts, ms; they add up to ``ms``."""
        parts = {
            "base": self.base_ms,
            "batch": self.batch_ms,
            "context": self.context_ms,
            "prefill": self.prefill_ms,
            "attention": self.attention_ms,
            "cells": self.cells_ms,
        }
        parts["machine"] = self.ms - sum(parts.values())
        return {name: value for name, value in parts.items() if value}
