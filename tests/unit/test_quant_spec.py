"""QuantSpec, QuantTensor and the metrics: what they accept, and literal values."""

import json
import math
import subprocess
import sys

import pytest
import torch

from zaya_quant.metrics import kl_divergence, perplexity_from_nll, sqnr_db, top1_agreement
from zaya_quant.qtensor import QuantTensor
from zaya_quant.spec import QuantSpec


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, 32), "bits is 7; allowed: 2, 3, 4, 5, 6, 8"),
        ((True, 32), "bits is True"),
        ((4.0, 32), r"bits is 4\.0"),
        ((4, 0), "group_size is 0"),
        ((4, 40), "group_size is 40"),
        ((4, -32), "group_size is -32"),
        ((4, 32, 1), "symmetric is 1"),
        ((4, 32, True, "float64"), "scale_dtype is 'float64'"),
    ],
)
def test_invalid_specs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(*arguments)


def test_ranges_groups_and_sizes():
    assert (QuantSpec(4, 32).qmin, QuantSpec(4, 32).qmax) == (-8, 7)
    assert (QuantSpec(4, 32, False).qmin, QuantSpec(4, 32, False).qmax) == (0, 15)
    assert QuantSpec(4, 32).groups(65) == 3
    assert QuantSpec(4, -1).groups(65) == 1
    assert QuantSpec(4, 32).bits_per_weight(8, 64) == 4.5
    assert QuantSpec(8, 128, scale_dtype="float32").bits_per_weight(8, 256) == 8.25
    assert QuantSpec(4, 32, symmetric=False).bits_per_weight(8, 64) == 4.625
    assert QuantSpec(4, -1).bits_per_weight(8, 64) == 4.25


def test_dict_round_trip():
    spec = QuantSpec(3, 64, False, "bfloat16")
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert QuantSpec.from_dict({"bits": 4, "group_size": 32}) == QuantSpec(4, 32)
    with pytest.raises(ValueError, match=r"unknown keys \['grp'\]"):
        QuantSpec.from_dict({"bits": 4, "group_size": 32, "grp": 1})
    with pytest.raises(ValueError, match=r"missing keys \['group_size'\]"):
        QuantSpec.from_dict({"bits": 4})


def test_spec_and_the_table_of_methods_import_no_torch():
    code = "import sys, zaya_quant.spec, zaya_quant.methods; print('torch' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert answer.stdout.strip() == "False"


def test_dequantize_literal_values():
    codes = torch.tensor([[-8, 7, 1, 0, 2]], dtype=torch.int8)
    padded = torch.nn.functional.pad(codes, (0, 13))
    found = QuantTensor(padded, torch.tensor([[0.5, -2.0]]).half(), None, QuantSpec(4, 16))
    assert found.dequantize()[0, :5].tolist() == [-4.0, 3.5, 0.5, 0.0, 1.0]
    assert found.shape == (1, 18)
    assert found.dequantize(torch.bfloat16).dtype == torch.bfloat16
    shifted = QuantTensor(
        torch.tensor([[0, 15, 3]], dtype=torch.uint8),
        torch.tensor([[0.25]]),
        torch.tensor([[3]], dtype=torch.uint8),
        QuantSpec(4, -1, False, "float32"),
    )
    assert shifted.dequantize().tolist() == [[-0.75, 3.0, 0.0]]


def test_inconsistent_tensors_are_refused():
    codes, spec = torch.zeros(2, 40, dtype=torch.int8), QuantSpec(4, 32)
    scales = torch.zeros(2, 2, dtype=torch.float16)
    QuantTensor(codes, scales, None, spec).validate_codes()
    with pytest.raises(ValueError, match=r"scales has shape \(2, 1\); expected \(2, 2\)"):
        QuantTensor(codes, scales[:, :1], None, spec)
    with pytest.raises(ValueError, match="scales has dtype"):
        QuantTensor(codes, scales.float(), None, spec)
    with pytest.raises(ValueError, match="codes has dtype"):
        QuantTensor(codes.to(torch.uint8), scales, None, spec)
    with pytest.raises(ValueError, match="zeros given"):
        QuantTensor(codes, scales, codes, spec)
    with pytest.raises(ValueError, match="zeros missing"):
        QuantTensor(codes.to(torch.uint8), scales, None, QuantSpec(4, 32, False))
    with pytest.raises(ValueError, match=r"codes span 0\.\.8"):
        QuantTensor(codes.index_fill(1, torch.tensor([3]), 8), scales, None, spec).validate_codes()


def test_sqnr():
    reference = torch.tensor([3.0, 4.0])
    assert sqnr_db(reference, torch.tensor([3.0, 4.5])) == pytest.approx(20.0)  # 25 / 0.25
    assert sqnr_db(reference, reference) == math.inf
    assert sqnr_db(torch.zeros(2), reference) == -math.inf
    with pytest.raises(ValueError, match="shapes differ"):
        sqnr_db(reference, reference[:1])


def test_kl_divergence():
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]], dtype=torch.float64)
    # 0.5 ln 2 - 0.25 ln 2; a constant added to all logits changes nothing.
    found = kl_divergence(p.log()[None] + 100, q.log()[None] - 50)
    assert float(found) == pytest.approx(0.25 * math.log(2), rel=1e-6)
    same = torch.randn(5, 100, generator=torch.Generator().manual_seed(0)) * 50
    assert torch.equal(kl_divergence(same, same), torch.zeros(5, dtype=torch.float64))
    masked = torch.tensor([[0.0, 0.0, -math.inf]])
    assert float(kl_divergence(masked, masked)) == 0.0
    assert float(kl_divergence(torch.zeros(1, 3), masked)) == math.inf
    extreme = kl_divergence(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]))
    assert float(extreme) == pytest.approx(1e4)


def test_top1_and_perplexity():
    left, right = torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]
    assert top1_agreement(left, right) == 0.5
    assert perplexity_from_nll(torch.full((7,), math.log(12.0))) == pytest.approx(12.0)
    for empty in (
        lambda: top1_agreement(left[:0], right[:0]),
        lambda: perplexity_from_nll(left[0:0]),
    ):
        with pytest.raises(ValueError, match="no "):
            empty()
