"""The nouns that flow: Step, Request, Span, Counter, Alert, Verdict, and the layout of the shared ring."""

from latencyprism.records.alert import Alert
from latencyprism.records.request import FINISH_REASONS, REQUEST_COLUMNS, ROUTES, Request
from latencyprism.records.span import Counter, Span
from latencyprism.records.step import NULL, PHASES, STEP_COLUMNS, STEP_DTYPE, Step
from latencyprism.records.usual import Usual
from latencyprism.records.verdict import CAUSES, Evidence, Ranked, Verdict
from latencyprism.records.window import StepSource, Window

__all__ = [
    "CAUSES", "FINISH_REASONS", "NULL", "PHASES", "REQUEST_COLUMNS", "ROUTES", "STEP_COLUMNS", "STEP_DTYPE",
    "Alert", "Counter", "Evidence", "Ranked", "Request", "Span", "Step", "StepSource", "Usual", "Verdict",
    "Window",
]  # fmt: skip
