"""transformers as the independent reference, on floats.

Its habits make a plain ``from_pretrained`` unsafe here, so each is checked or undone:

* missing tensors are filled at random with a mere warning: any missing, unexpected or mismatched
  key is an error;
* a packed artifact is decoded with one scheme for all experts and one for everything else, picked
  by the look of ``config_groups``: every matrix is compared with our own reading of it;
* the last of ``balancing_biases`` (the skip expert's) is overwritten with -1.0 whatever the file
  holds: all of them are restored from the file.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zaya_convert.checkpoint import Checkpoint
from zaya_convert.errors import InputError, UsageError
from zaya_convert.layout import BALANCING_BIASES, PART_BY_NAME, TensorKey, stored
from zaya_convert.models import open_model

if TYPE_CHECKING:
    from transformers import ZayaForCausalLM

_ROUNDING = 0.01  # bf16 has 8 bits: 0.2 % is usual, a wrong scheme gives 50 % and more


def load_oracle(folder: Path, dtype: torch.dtype = torch.float32) -> ZayaForCausalLM:
    """transformers' model of a float checkpoint in the hybrid layout.

    Raises:
        UsageError: transformers is not installed, or does not know ZAYA.
        InputError: not such a checkpoint, or it did not load completely.
    """
    require("transformers")
    checkpoint = open_model(str(folder))
    if checkpoint.format != "hybrid":
        raise InputError(
            f"transformers reads the hybrid layout; this is {checkpoint.format}", folder.name
        )
    return _load(checkpoint, dtype=dtype)


def load_artifact_in_transformers(
    folder: Path, dtype: torch.dtype = torch.bfloat16, dense: bool = True
) -> ZayaForCausalLM:
    """Load a compressed-tensors artifact with stock transformers.

    transformers merges per-expert matrices only for model types with a conversion mapping, and
    ``zaya`` has none; we register the one of ``qwen2_moe``, whose expert names are the same. It
    also decodes all experts with one scheme; an artifact that mixes schemes among experts is
    dequantized by us, matrix by matrix, into transformers' model.

    Args:
        dtype: of the dequantized weights.
        dense: dequantize everything at load. Otherwise attention stays packed until it is first
            used; experts are dequantized either way.

    Raises:
        UsageError: transformers or compressed-tensors is not installed.
        InputError: it did not load completely, or a matrix came out wrong.
    """
    checkpoint = open_model(str(folder))
    if _mixes_schemes(checkpoint):
        require("transformers")
        return _load_matrix_by_matrix(checkpoint, dtype)
    require("transformers", "compressed_tensors")
    from transformers import CompressedTensorsConfig
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )

    mapping = get_checkpoint_conversion_mapping("qwen2_moe")
    assert mapping is not None
    register_checkpoint_conversion_mapping("zaya", mapping, overwrite=True)
    options: dict[str, Any] = {"dtype": dtype}
    if dense:
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = _load(checkpoint, **options)
    for parameter in model.parameters():
        # Experts come out in the dtype of their scales, which only some expert kernels accept.
        if parameter.dtype in (torch.float16, torch.bfloat16, torch.float32):
            parameter.data = parameter.data.to(dtype)
    _check_matrices(checkpoint, dict(model.named_parameters()))
    return model


def _mixes_schemes(checkpoint: Checkpoint) -> bool:
    """Whether experts, or attention matrices, are not all quantized alike."""
    specs: dict[str, set[Any]] = {"expert": set(), "attention": set()}
    for key, info in checkpoint.infos.items():
        role = PART_BY_NAME[key.part].role
        if role in specs:
            specs[role].add(info.spec and (info.spec.bits, info.spec.group_size))
    return any(len(found) > 1 for found in specs.values())


def _load_matrix_by_matrix(checkpoint: Checkpoint, dtype: torch.dtype) -> ZayaForCausalLM:
    """transformers' model with every tensor as we read it.

    Raises:
        InputError: transformers' model has a tensor that the checkpoint does not fill.
    """
    from transformers import ZayaConfig, ZayaForCausalLM

    config = checkpoint.config
    described = ZayaConfig.from_dict(config.to_transformers())
    model = ZayaForCausalLM(described)
    model.to(dtype=dtype)  # type: ignore[call-arg]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    left = {name for name in tensors if not name.endswith("inv_freq")}
    with torch.no_grad():
        for key in checkpoint.infos:
            place = stored("hybrid", key, config.dims, config.layers)
            left.discard(place.name)
            target = tensors[place.name]
            target = target if place.expert is None else target[place.expert]
            target = target[slice(*place.rows)] if place.rows else target
            target.copy_(checkpoint.read_float(key))
            if key.part == BALANCING_BIASES:  # kept in fp32 whatever the dtype of the rest
                target.data = checkpoint.read_float(key, torch.float32)
    if left:
        raise InputError([f"{name} is not filled" for name in sorted(left)], checkpoint.path.name)
    return model.eval()


def _load(checkpoint: Checkpoint, **options: Any) -> ZayaForCausalLM:
    """``from_pretrained`` that either loads every tensor of the file or fails."""
    from transformers import ZayaForCausalLM

    with warnings.catch_warnings():
        # It tells of our quantization_config being merged with the folder's, which is the point.
        warnings.filterwarnings("ignore", "You passed `quantization_config`")
        loaded: Any = ZayaForCausalLM.from_pretrained(
            checkpoint.path, output_loading_info=True, **options
        )
    model, report = loaded
    problems = [
        f"{kind.replace('_', ' ')[:-1]} {key}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for key in sorted(map(str, report[kind]))
    ]
    problems += [str(message) for message in report.get("error_msgs", [])]
    if problems:
        raise InputError(problems, f"{checkpoint.path.name} does not load in transformers")
    with torch.no_grad():
        layers: Any = model.model.layers
        for index, layer in enumerate(layers):
            biases = checkpoint.read_float(TensorKey(index, BALANCING_BIASES), torch.float32)
            layer.mlp.gate.balancing_biases.copy_(biases)
    return model.eval()


def _check_matrices(checkpoint: Checkpoint, loaded: Mapping[str, torch.Tensor]) -> None:
    """Every dequantized matrix must be ours up to rounding (its scales' dtype and its own)."""
    problems = []
    for key, info in checkpoint.infos.items():
        place = stored("hybrid", key, checkpoint.config.dims, checkpoint.config.layers)
        value = loaded.get(place.name)
        if info.spec is None or value is None:  # float, or still packed
            continue
        value = value if place.expert is None else value[place.expert]
        value = value[slice(*place.rows)] if place.rows else value
        ours = checkpoint.read_float(key, torch.float32)
        error = (value.detach().float() - ours).norm() / ours.norm().clamp_min(1e-30)
        if not error <= _ROUNDING:
            problems.append(f"{key} differs by {float(error):.1%} from what the file says")
    if problems:
        raise InputError(problems, f"{checkpoint.path.name} is decoded wrongly by transformers")


def require(*packages: str) -> None:
    """Check that packages are here, and that transformers knows ZAYA.

    Raises:
        UsageError: how to get what is missing.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        names = " and ".join(missing).replace("_", "-")
        raise UsageError(f"needs {names}: pip install 'zaya-convert[oracle]'")
    import transformers

    if not hasattr(transformers, "ZayaForCausalLM"):
        raise UsageError(
            f"transformers {transformers.__version__} does not know ZAYA, 5.14 or newer does: "
            "pip install -U 'zaya-convert[oracle]'"
        )
