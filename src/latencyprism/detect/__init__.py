"""Tests on the residual of a step, alert levels, incidents."""

from latencyprism.detect.detector import Detector
from latencyprism.detect.firing import Firing
from latencyprism.detect.settings import Level, Settings

__all__ = ["Detector", "Firing", "Level", "Settings"]
