"""The named tolerances say what they claim."""

import torch

from tolerances import QUALITY_SQNR_DB, kernel


def test_kernel_tolerance_covers_a_reordered_dot_product():
    generator = torch.Generator().manual_seed(0)
    for inner in (1, 100, 4096):
        left, right = torch.randn(2, 64, inner, generator=generator)
        terms = left * right
        sequential = terms.cumsum(1, dtype=torch.float32)[:, -1]
        exact = (left.double() * right.double()).sum(1)
        allowed = kernel(torch.float32, inner) * terms.abs().double().sum(1)
        assert ((sequential - exact).abs() <= allowed).all()


def test_floors_rise_with_bits_and_fall_with_group_size():
    for (bits, group), floor in QUALITY_SQNR_DB.items():
        assert floor <= QUALITY_SQNR_DB[bits, 32]
        if (bits + 1, group) in QUALITY_SQNR_DB:
            assert floor < QUALITY_SQNR_DB[bits + 1, group]
