"""Triton kernels and their launchers, imported as ``unigendet.kernels``.

A module of this package knows tensors and integers only: never ``unigendet.ops``, never the model.
"""
