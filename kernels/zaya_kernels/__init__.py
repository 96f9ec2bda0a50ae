"""Kernels: one list of ops, several bodies for each, the reference always among them.

``table`` says which body runs where and why; ``reference`` is the oracle of every other body.
"""
