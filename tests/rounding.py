"""Recipes for tests that are not about calibration: it takes long, and its bytes depend on the BLAS
library, so these round to nearest."""

from zaya_convert.recipe import Recipe, adjusted, for_bits

# For the command line, which reads options from the environment.
NEAREST = {"ZAYA_CONVERT_QUANTIZE_METHOD": "rtn"}


def nearest(bits: int) -> Recipe:
    """The recipe behind ``--bits``, rounding to nearest."""
    return adjusted(for_bits(bits), method="rtn")
