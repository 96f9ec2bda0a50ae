"""The auto-round packing in stock transformers with the auto-round package (an opt-in peer).

pip install auto-round && pytest tests/parity/test_auto_round.py
"""

from pathlib import Path

import pytest
import torch

from zaya_convert.convert import execute
from zaya_convert.models import BUNDLED, open_model
from zaya_convert.plan import make_plan
from zaya_convert.recipe import adjusted, load
from zaya_convert.runtime.model import Model
from zaya_quant.metrics import kl_divergence

pytest.importorskip("auto_round", reason="the auto-round package is not installed")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("recipe", ["int4", "int8", "int4-small"])
def test_loads_and_agrees_within_bf16_noise(recipe: str, tmp_path: Path) -> None:
    nearest = adjusted(load(recipe), method="rtn")
    execute(make_plan(open_model(None), nearest, "auto-round"), tmp_path / "a")
    artifact = open_model(str(tmp_path / "a"))
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for layer in range(artifact.config.layers):
        # transformers resets the skip expert's bias at load, whatever the file holds
        key = next(
            k for k in artifact.infos if k.layer == layer and k.part.endswith("balancing_biases")
        )
        gate = theirs.model.layers[layer].mlp.gate
        gate.balancing_biases.copy_(artifact.read_float(key))
    ids = torch.arange(3, 259).reshape(2, 128) % 500
    with torch.no_grad():
        logits = theirs(ids).logits.float().flatten(0, 1)
    exact = Model(artifact).forward(ids).logits.flatten(0, 1)
    rounded = Model(artifact, torch.bfloat16).forward(ids).logits.flatten(0, 1)
    noise = float(kl_divergence(exact, rounded).mean())
    assert float(kl_divergence(exact, logits).mean()) < 3 * noise + 1e-4, BUNDLED
