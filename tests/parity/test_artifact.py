"""Packed folders in stock transformers, through our loader: written by hand, not by our exporter.

What is pinned here is the reader: which ``quantization_config`` it decodes right, and that our
loader notices when it does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from parity.random_models import BASE, write_checkpoint
from zaya_convert import oracle
from zaya_convert.checkpoint import open_source
from zaya_convert.errors import InputError
from zaya_convert.layout import PART_BY_NAME, TensorKey
from zaya_convert.models import open_model
from zaya_convert.runtime.model import Model
from zaya_quant.pack import pack_int32
from zaya_quant.qtensor import QuantTensor
from zaya_quant.spec import QuantSpec

for package in ("transformers", "compressed_tensors"):
    pytest.importorskip(package, reason="the oracle needs the extra: pip install '.[oracle]'")

EXPERTS, ATTENTION = r"re:.*mlp\.experts\..*", r"re:.*self_attn\..*"
INT4 = QuantSpec(4, 32)
INT8 = QuantSpec(8, 32)


def quantize(weight: Tensor, spec: QuantSpec) -> QuantTensor:
    """Nearest codes; every other group gets a negative scale, as an MSE search may choose."""
    grouped = weight.float().unflatten(1, (-1, spec.group_length(weight.shape[1])))
    scales = grouped.abs().amax(-1) / spec.qmax
    scales[:, ::2] *= -1
    kept = scales.to(getattr(torch, spec.scale_dtype))
    codes = (grouped / kept.float()[..., None]).round().clamp(spec.qmin, spec.qmax)
    return QuantTensor(codes.flatten(1).to(torch.int8), kept, None, spec)


def write_packed(
    folder: Path, specs: Mapping[str, QuantSpec], targets: Mapping[str, list[str]]
) -> Path:
    """A pack-quantized folder; ``specs`` and ``targets`` by role."""
    source = open_source(write_checkpoint(folder / "source", BASE, seed=3, dtype=torch.bfloat16))
    arrays: dict[str, Tensor] = {}
    for key in source.infos:
        value = source.read_float(key)
        spec = specs.get(PART_BY_NAME[key.part].role) if value.ndim == 2 else None
        if spec is None:
            arrays[str(key)] = value.clone()
            continue
        packed = quantize(value, spec)
        arrays[f"{key.module}.weight_packed"] = pack_int32(packed.codes, spec.bits)
        arrays[f"{key.module}.weight_scale"] = packed.scales
        arrays[f"{key.module}.weight_shape"] = torch.tensor(packed.shape)
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", r"re:.*mlp\.gate\..*"],
        "config_groups": {
            f"group_{i}": config_group(specs[role], targets[role]) for i, role in enumerate(specs)
        },
    }
    config = BASE.to_transformers() | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_group(spec: QuantSpec, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": spec.bits, "type": "int", "symmetric": True, "strategy": "group",
        "group_size": spec.group_size, "dynamic": False,
    }  # fmt: skip
    return {"targets": targets, "format": "pack-quantized", "weights": weights}


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16"])
def test_mixed_bits_load_right(tmp_path: Path, scale_dtype: str) -> None:
    specs = {
        "attention": QuantSpec(8, 32, scale_dtype=scale_dtype),
        "expert": QuantSpec(4, 32, scale_dtype=scale_dtype),
    }
    write_packed(tmp_path, specs, {"attention": [ATTENTION], "expert": [EXPERTS]})
    model: Any = oracle.load_artifact_in_transformers(tmp_path)
    artifact = open_model(str(tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # What is left is rounding: transformers multiplies codes in the dtype of their scales.
    with torch.no_grad():
        for key, info in artifact.infos.items():
            if info.spec is None:
                continue
            value, place = artifact.read_float(key, torch.bfloat16), matrix(model, key)
            assert float((place - value).float().norm() / value.float().norm()) < 0.003
            place.copy_(value)
    # With those values made ours, the two agree like any bf16 pair.
    ids = torch.arange(4, 104)[None]
    with torch.no_grad():
        theirs = model(ids).logits.float()
    ours = Model(artifact, torch.bfloat16).forward(ids).logits
    assert float((theirs - ours).abs().mean()) <= 0.002


def matrix(model: Any, key: TensorKey) -> Tensor:
    """Where transformers keeps a matrix."""
    module = model.model.layers[key.layer]
    if key.expert < 0:
        return module.get_parameter(key.part).data
    if "down_proj" in key.part:
        return module.mlp.experts.down_proj.data[key.expert]
    width, fused = BASE.expert_width, module.mlp.experts.gate_up_proj.data[key.expert]
    return fused[:width] if "gate_proj" in key.part else fused[width:]


def test_one_group_for_all_linear_modules(tmp_path: Path) -> None:
    specs = {"expert": INT4}
    write_packed(tmp_path, specs, {"expert": ["Linear"]})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["ignore"].append(ATTENTION)
    (tmp_path / "config.json").write_text(json.dumps(config))
    oracle.load_artifact_in_transformers(tmp_path)


def test_module_names_as_targets_are_decoded_wrongly_and_noticed(tmp_path: Path) -> None:
    names = ["model.layers.0.mlp.experts.0.gate_proj"]
    write_packed(
        tmp_path,
        {"attention": INT8, "expert": INT4},
        {"attention": ["model.layers.0.self_attn.o_proj"], "expert": names},
    )
    with pytest.raises(InputError, match=r"experts\.0\.gate_proj\.weight differs by"):
        oracle.load_artifact_in_transformers(tmp_path)


def test_a_missing_expert_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_packed(tmp_path, {"expert": INT4}, {"expert": [EXPERTS]})
    artifact = open_model(str(tmp_path))
    # transformers on its own would fill layer 1 at random: with a warning, and no more.
    from safetensors.torch import load_file

    arrays = load_file(tmp_path / "model.safetensors")
    kept = {name: a for name, a in arrays.items() if "layers.1.mlp.experts" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(oracle, "open_model", lambda _: artifact)
    with pytest.raises(InputError, match=r"missing key model\.layers\.1\.mlp\.experts"):
        oracle.load_artifact_in_transformers(tmp_path)
