"""What of the ahead-of-time builds can be checked without triton: the budget, reading listings."""

import json
from dataclasses import replace

import pytest

import compile_kernels
from compile_kernels import BUDGET, TARGETS, USUAL, Built, forms, violations

GOOD = Built("gfx1100", "form", "many", 100, 0, 65536, 2, 4, 1000)


def test_every_target_has_a_limit_with_its_source() -> None:
    limits = json.loads(BUDGET.read_text(encoding="utf-8"))["shared_bytes"]
    assert set(limits) == set(TARGETS)
    assert all(limit["limit"] >= 64 * 1024 and limit["source"] for limit in limits.values())
    assert set(USUAL) <= set(TARGETS)
    assert len({form.label for form in forms()}) == len(list(forms())) == 24


@pytest.mark.parametrize(
    ("change", "what"),
    [({"spills": 1}, "1 spills"), ({"shared": 65537}, "65537 bytes"),
     ({"vector_loads": 0}, "16-byte"), ({"matrix": 0}, "matrix instructions")],
)  # fmt: skip
def test_the_budget_can_be_exceeded(change: dict[str, int], what: str) -> None:
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))
    assert not violations(GOOD, budget)
    (found,) = violations(replace(GOOD, **change), budget)
    assert what in found


def test_an_amd_listing() -> None:
    code = """
        buffer_load_b128 v[0:3], v4, s[0:3], 0 offen
        global_load_dwordx4 v[0:3], v4, s[0:1]
        global_load_b64 v[0:1], v4, s[0:1]
        v_wmma_f32_16x16x16_bf16 v[0:7], v[8:15], v[16:23], v[0:7]
        s_endpgm
    .sgpr_spill_count: 2
    .vgpr_count:     101
    .vgpr_spill_count: 3
    """
    assert compile_kernels._amd(code) == {
        "registers": 101, "spills": 5, "vector_loads": 2, "matrix": 1, "instructions": 5,
    }  # fmt: skip
    with pytest.raises(ValueError, match="vgpr"):
        compile_kernels._amd("")
