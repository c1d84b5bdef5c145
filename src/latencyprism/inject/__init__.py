"""The anomaly toolkit: disturbances bounded in time, undone whatever happens, checked for effect."""

from latencyprism.inject.catalogue import CATALOGUE, start
from latencyprism.inject.injection import Effect, Injection, Interval

__all__ = ["CATALOGUE", "Effect", "Injection", "Interval", "start"]
