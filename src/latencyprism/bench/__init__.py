"""Benchmarks on real engines: fidelity, overhead, alert delay, false alarms. Ratios within one run."""
