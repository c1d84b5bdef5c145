"""latency = f(workload), learned online: what a step should have taken, given what it had to do."""

from latencyprism.baseline.expectation import Expectation
from latencyprism.baseline.step_time import StepTime
from latencyprism.baseline.work import Work, decode_width, work_of

__all__ = ["Expectation", "StepTime", "Work", "decode_width", "work_of"]
