"""How the probe begins in a process: once, or not at all."""

# [cut
from latencyprism.agent.probe.core import Probe
from latencyprism.agent.probe.prelude import KEY, now_ns, sys
from latencyprism.records.ring import (
    H_LEASE_NS,
    H_STATE,
    STATE_EMPTY,
    STATE_EXPIRED,
    STATE_FAILED,
    STATE_LIVE,
)

# cut]


def start(config, reader):
    """Install ``reader`` unless another watcher holds this process; tell the outcome through the ring."""
    present = sys.modules.get(KEY)
    if present is not None and getattr(present, "nonce", None) == config["nonce"]:
        return  # the same command came twice
    probe = Probe(config)
    if (
        probe.words[H_STATE] != STATE_EMPTY
    ):  # a copy of the command that was queued and runs after all is over
        return probe.let_go()
    try:
        if present is not None:
            if present.alive and now_ns() < present.words[H_LEASE_NS]:
                raise RuntimeError("watched already")
            present.remove(STATE_EXPIRED)
        probe.begin(config.get("monitoring", True))
        missing = [*reader(probe, config), *probe.refused]
        if not probe.hooks:
            raise RuntimeError("nothing to hook: " + ", ".join(missing))
        if missing:
            probe.say("not found: " + ", ".join(missing))
        sys.modules[KEY] = probe
        probe.words[H_STATE] = STATE_LIVE
    except Exception as error:
        probe.say(str(error) if isinstance(error, RuntimeError) else type(error).__name__)
        probe.remove(STATE_FAILED)
