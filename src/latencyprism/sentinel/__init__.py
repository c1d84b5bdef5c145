"""Wires attach, timeline, baseline, detector, recorder and diagnosis for one machine."""
