"""What changed, and why: fault signatures, the localiser, evidence in words."""

from latencyprism.diagnose.beginning import begun_ns
from latencyprism.diagnose.localiser import localise
from latencyprism.diagnose.location import where

__all__ = ["begun_ns", "localise", "where"]
