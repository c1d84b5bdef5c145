"""Which process or phase of a step holds its excess: told from the step record alone, at once."""

from __future__ import annotations

from latencyprism.records import Step

PHASES = ("schedule_ns", "execute_ns", "sample_ns", "update_ns")
_RATE = 0.02  # weight of a new step in the running shares: about the last 50


class PhaseShares:
    """Running share of each phase in the duration of a normal step, by kind of step."""

    def __init__(self) -> None:
        self._shares: dict[tuple[str | None, str], float] = {}

    def learn(self, step: Step) -> None:
        """Take in a step that raised no alarm."""
        duration = step.duration_ns
        if duration <= 0:
            return
        for name in PHASES:
            value = getattr(step, name)
            if value is not None:
                key = (step.phase, name)
                share = value / duration
                old = self._shares.get(key)
                self._shares[key] = share if old is None else old + _RATE * (share - old)

    def locate(self, step: Step, expected_ms: float, names: dict[str, str]) -> str | None:
        """The phase with the largest excess over its usual share of the expected time, as ``names`` calls it;
        None if the step has no phases or nothing is in excess. ``names`` maps phase columns to words."""
        best, most_ns = None, 0.0
        for name in PHASES:
            value = getattr(step, name)
            usual = self._shares.get((step.phase, name))
            if value is None or usual is None:
                continue
            excess_ns = value - usual * expected_ms * 1e6
            if excess_ns > most_ns:
                best, most_ns = name, excess_ns
        return None if best is None else names.get(best, best.removesuffix("_ns"))


def phase_names(engine: str, roles: dict[int, str]) -> dict[str, str]:
    """Words for the phases of an engine's step, with the PID of the process that does the work."""
    worker = next((f"{role} {pid}" for pid, role in roles.items() if role.startswith("Worker")), None)
    core = next((f"{role} {pid}" for pid, role in roles.items() if role in ("EngineCore", "engine")), engine)
    doing = worker or core
    if engine == "llama.cpp":
        return {
            "schedule_ns": f"{core}: batch preparation",
            "execute_ns": f"{core}: decode",
            "sample_ns": f"{core}: sampling",
            "update_ns": f"{core}: sampling and output",
        }
    return {
        "schedule_ns": f"{core}: schedule",
        "execute_ns": f"{doing}: execute_model",
        "sample_ns": f"{doing}: sample_tokens",
        "update_ns": f"{core}: update_from_output",
    }
