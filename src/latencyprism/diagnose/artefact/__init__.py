"""Folders of per-cycle operation tables and counters, as the LatencyPrism paper's artefact has them: read,
and diagnosed by cost per call."""

from latencyprism.diagnose.artefact.judge import judge
from latencyprism.diagnose.artefact.tables import Folder, read_folder

__all__ = ["Folder", "judge", "read_folder"]
