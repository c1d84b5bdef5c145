"""The flight recorder, when to capture, and the capture: one file that Perfetto opens and we read back."""

from latencyprism.recorder.capture import Capture, read_capture, write_capture, write_raw
from latencyprism.recorder.flight import FlightRecorder
from latencyprism.recorder.trigger import Decision, WhenToCapture

__all__ = [
    "Capture", "Decision", "FlightRecorder", "WhenToCapture",
    "read_capture", "write_capture", "write_raw",
]  # fmt: skip
