"""The only tolerances tests may use, under three names.

*exact*: bit for bit; ``torch.equal`` or ``==``, no number needed.
*kernel*: the same sum in another order; grows with the inner dimension.
*quality*: floors of the signal-to-quantization-noise ratio, by bits and group size.
"""

import torch

EXACT = {"rtol": 0.0, "atol": 0.0}

_UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def kernel(dtype: torch.dtype, inner: int) -> float:
    """Relative error of a dot product of ``inner`` terms, relative to sum |a||b|.

    gamma_n = n u / (1 - n u) bounds every summation order (Higham, Accuracy and Stability of
    Numerical Algorithms, 2002, section 3.1); accumulation is in float32, and the result is
    rounded once to ``dtype``.
    """
    terms = inner * _UNIT_ROUNDOFF[torch.float32]
    return terms / (1 - terms) + _UNIT_ROUNDOFF[dtype]


# dB on normal weights (std 0.02, seed 0, 1024 x 1024), fp16 scales, symmetric.  Beside each floor:
# what was measured, and what plain absmax rounding reaches.
QUALITY_SQNR_DB = {
    (2, 32): 9.4,  # 9.600, plain 3.636
    (2, 128): 8.6,  # 8.800, plain 2.301
    (3, 32): 15.6,  # 15.803, plain 12.899
    (3, 128): 14.4,  # 14.631, plain 11.246
    (4, 32): 21.6,  # 21.837, plain 20.259
    (4, 128): 20.1,  # 20.297, plain 18.607
    (5, 32): 27.8,  # 27.955, plain 26.882
    (5, 128): 25.9,  # 26.118, plain 25.225
    (6, 32): 34.0,  # 34.164, plain 33.193
    (6, 128): 31.9,  # 32.105, plain 31.528
    (8, 32): 46.4,  # 46.574, plain 45.437
    (8, 128): 44.1,  # 44.261, plain 43.773
}
# The same weights, asymmetric.
QUALITY_SQNR_DB_ASYMMETRIC = {
    (2, 32): 9.3,  # 9.535
    (3, 32): 15.7,  # 15.884
    (4, 32): 22.0,  # 22.200
    (4, 128): 20.2,  # 20.448
    (8, 32): 46.5,  # 46.683
}
# The same weights, ggml block types; beside each floor what was measured, and llama-quantize's.
QUALITY_SQNR_DB_BLOCKS = {
    "Q4_1": 23.0,  # 23.167, 22.123
    "Q5_1": 29.4,  # 29.597, 28.434
    "Q3_K": 16.7,  # 16.875, 16.435
    "Q4_K": 23.0,  # 23.144, 22.923
    "Q5_K": 29.2,  # 29.391, 28.851
    "Q6_K": 35.6,  # 35.746, 35.025
    "IQ4_NL": 22.6,  # 22.707, 22.373
    "IQ4_XS": 22.5,  # 22.658, 22.304
}
