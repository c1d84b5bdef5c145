"""Probe packs: what to hook in each engine and how to read a step from it, as data with version ranges."""
