"""A running engine's own source compared with the pack: none of it is imported, nothing in it is touched."""

from __future__ import annotations

from pathlib import Path

from latencyprism.engines.discovery import Replica, distribution_at
from latencyprism.engines.packs import PYTHON_ENGINES, load_pack
from latencyprism.engines.signatures import folder_source, lacking, places_of, read_classes


def missing_in(replica: Replica) -> list[str] | None:
    """What the pack's range for this version needs and the source of the very installation that runs does not
    have, in words. None where there is no pack, no version in its ranges, or no source to read."""
    if replica.engine not in PYTHON_ENGINES or replica.version is None:
        return None
    pack = load_pack(replica.engine)
    names = tuple(name.replace("-", "_") for name in pack.distributions)
    found = distribution_at(replica.engine_pid, names)
    if found is None or not pack.covers(replica.version):
        return None
    entry = pack.choose(replica.version)[0]
    classes = read_classes(folder_source(Path(found[0])), places_of(entry))
    return lacking(entry, classes) if classes else None


def in_words(missing: list[str], limit: int = 4) -> str:
    """One sentence of it."""
    if not missing:
        return "its own source has all that the pack reads"
    more = f" and {len(missing) - limit} more" if len(missing) > limit else ""
    return f"its own source lacks {', '.join(missing[:limit])}{more}"
