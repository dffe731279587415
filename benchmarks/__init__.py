"""Measured results: what records a run as evidence, and ``results/``, what was recorded."""
