"""Triton bodies of the ops: one source for CUDA and ROCm. Importing this imports no triton.

``layout`` repacks weights, ``device`` holds the kernels, ``configs`` their tiles, ``launch`` the
bodies that stand in the table.
"""
