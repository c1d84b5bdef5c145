"""Objectives, forecast and burn rate."""
