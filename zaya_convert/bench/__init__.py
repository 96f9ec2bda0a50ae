"""Speed: what ``zaya-convert bench`` and the scripts in ``benchmarks/`` measure.

Every figure stands beside a ceiling that was taken in the same minute, on the same machine: memory
bandwidth moves by a factor of two with what else a machine does.
"""
