"""Evaluation: detection and generation metrics, and the report of a run."""
