"""``python -m latencyprism``."""

from latencyprism.cli.main import entry

entry()
