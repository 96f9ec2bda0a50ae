"""What our exporter writes, in stock transformers: the same codes give the same model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nano import Nano
from zaya_convert import oracle
from zaya_convert.convert import execute
from zaya_convert.models import open_model
from zaya_convert.plan import make_plan
from zaya_convert.recipe import Recipe, Rule
from zaya_convert.runtime.model import Model
from zaya_quant.metrics import kl_divergence

for package in ("transformers", "compressed_tensors"):
    pytest.importorskip(package, reason="the oracle needs the extra: pip install '.[oracle]'")

RECIPES = {
    "int4 experts, int8 attention": (Rule("experts", 4, 32), Rule("attention", 8, 32)),
    "int4 everywhere": (Rule("experts", 4, 32), Rule("attention", 4, 32)),
    "int8 experts, float attention": (Rule("experts", 8, 32),),
    "int4 per channel": (Rule("experts", 4, -1), Rule("attention", 8, 64)),
}


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float().flatten(0, 1)


@pytest.mark.parametrize("rules", RECIPES.values(), ids=RECIPES)
def test_compressed_tensors_within_bf16_noise(
    rules: tuple[Rule, ...], nano: Nano, tmp_path: Path
) -> None:
    source = open_model(str(nano("hybrid", skip_bias=0.1)))
    plan = make_plan(source, Recipe("test", "", rules), "compressed-tensors")
    execute(plan, tmp_path / "a")
    artifact = open_model(str(tmp_path / "a"))
    ids = torch.arange(2, 82)[None] % artifact.config.vocab_rows
    theirs = _logits(oracle.load_artifact_in_transformers(tmp_path / "a"), ids)
    exact = Model(artifact).forward(ids).logits.flatten(0, 1)
    rounded = Model(artifact, torch.bfloat16).forward(ids).logits.flatten(0, 1)
    noise = float(kl_divergence(exact, rounded).median())
    assert noise > 0
    # Medians, since one token routed otherwise by a rounding error outweighs all the others.
    assert float(kl_divergence(exact, theirs).median()) < 4 * noise


def test_dense_twin_is_the_artifact_exactly(nano: Nano, tmp_path: Path) -> None:
    source = open_model(str(nano("hybrid", skip_bias=0.1)))
    recipe = Recipe("test", "", RECIPES["int4 experts, int8 attention"])
    execute(make_plan(source, recipe, "compressed-tensors"), tmp_path / "a")
    execute(make_plan(open_model(str(tmp_path / "a")), None, "dense"), tmp_path / "dense")
    ids = torch.arange(2, 82)[None]
    ours = Model(open_model(str(tmp_path / "dense"))).forward(ids).logits.flatten(0, 1)
    theirs = _logits(oracle.load_oracle(tmp_path / "dense"), ids)
    # Outlier channels and large temperatures: against float64, transformers itself is 4e-4 off.
    assert float((ours - theirs).abs().max()) <= 1e-3
