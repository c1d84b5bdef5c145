"""Tests on the residual of a step, alert levels, incidents."""
