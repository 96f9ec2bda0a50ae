"""The command line: one file per command, each parses, calls one function and prints a result.

These modules import click and light parts of the package only; what needs torch is imported when a
command runs, so that ``--help`` and shell completion answer at once.
"""
