"""Texts that run inside a target for the length of one capture. Standard library of Python 3.9, and the
framework that is already there."""
