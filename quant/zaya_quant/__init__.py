"""Numerics of zaya-convert: pure functions of tensors.

Import the modules: ``spec`` (no torch), ``qtensor``, ``affine``, ``pack``, ``methods``,
``metrics``, ``native``.
"""
