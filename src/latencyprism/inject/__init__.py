"""The anomaly toolkit: bounded, reversible faults."""
