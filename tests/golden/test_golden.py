"""Bytes pinned once: what the bundled checkpoint becomes, on every machine and in every version.

A change here means that artifacts made before and after differ. That needs a reason and a new
version, not just a new digest. Rounded to nearest: calibrated weights depend on the machine's BLAS.
"""

import hashlib
from pathlib import Path

import pytest

from rounding import nearest
from zaya_convert.convert import execute
from zaya_convert.models import open_model
from zaya_convert.plan import make_plan

SOURCE = "5d513b7dbbefb68057ec8dc036d0b6628fcc0b5414cd898afcaf569bbe7ec071"
WEIGHTS = {
    "compressed-tensors": "4de495c77861d2b0f6ffe19500d8845cc2c776030df11b672a28c924b2ba4823",
    "auto-round": "4ba276287c33788ccdd263e9b7b59263fcec9ad15d3699a58f1038f04e212498",
    "dense": "0b3096983ead88b8cbbd3fa355eeb532db26811834b126eae5200394fcc51425",
}


@pytest.mark.parametrize("packing", WEIGHTS)
def test_int4_of_the_bundled_checkpoint(packing: str, tmp_path: Path) -> None:
    result = execute(make_plan(open_model(None), nearest(4), packing), tmp_path / "out")
    assert result.source_digest == SOURCE
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == WEIGHTS[packing]


def test_the_torch_reference_gives_the_same_bytes() -> None:
    """Without the native library, on one matrix of each kind (the reference is slow)."""
    from zaya_quant import affine, native
    from zaya_quant.methods import rtn

    if not native.available()[0]:
        pytest.skip("the native library is not built: the test above ran the reference")
    source = open_model(None)
    seen = set()
    for key in source.infos:
        rule = nearest(4).rule_for(key)
        if rule and key.part not in seen:
            seen.add(key.part)
            weight = source.read_float(key)
            fast, slow = rtn.quantize(weight, rule.spec), affine.quantize_affine(weight, rule.spec)
            assert fast.codes.equal(slow.codes)
            assert fast.scales.equal(slow.scales)
    assert len(seen) == 8
