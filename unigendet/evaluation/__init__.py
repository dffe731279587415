"""Evaluation: ``detection`` and ``generation`` metrics, the ``results`` of a run and their ``report``."""
