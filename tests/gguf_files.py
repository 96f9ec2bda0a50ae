"""GGUF files for tests: ours with something changed, and one that another tool might write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from dialects import NAMES
from nano import Stored
from zaya_convert.config import ModelConfig
from zaya_convert.gguf_format import aligned
from zaya_convert.gguf_header import read_gguf
from zaya_convert.gguf_writing import build_header

Entries = dict[str, tuple[str, Any]]  # key: kind, value


def rewrite(
    path: Path,
    out: Path,
    *,
    keys: Callable[[Entries], object] = lambda _: None,
    tensors: Callable[[dict[str, Stored]], object] = lambda _: None,
) -> Path:
    """Write a copy of a file after changing its metadata or its tensors in place."""
    header, raw = read_gguf(path), path.read_bytes()
    entries = {key: (kind, value) for key, kind, value in header.entries()}
    keys(entries)
    held = {
        name: Stored(tensor.dtype, list(tensor.shape), raw[tensor.begin : tensor.end])
        for name, tensor in header.tensors.items()
    }
    tensors(held)
    listing, data = [], bytearray()
    for name, tensor in held.items():
        data += bytes(aligned(len(data), 32) - len(data))
        listing.append((name, tensor.dtype, tuple(tensor.shape), len(data)))
        data += tensor.data
    metadata = [(key, kind, value) for key, (kind, value) in entries.items()]
    out.write_bytes(build_header(metadata, listing) + data)
    return out


def foreign(entries: Entries) -> None:
    """Take away all that only we write."""
    for key in [key for key in entries if key.startswith("zaya_convert.")]:
        del entries[key]


def place(dialect: str, tensor: torch.Tensor, hybrid: str) -> torch.Tensor:
    """A tensor of the hybrid layout as a dialect stores it."""
    if hybrid.endswith("conv_qk_depthwise.weight"):
        return tensor.squeeze(1)
    if hybrid.endswith("conv_qk_grouped.weight") and dialect == "combined40":
        return tensor.permute(2, 0, 1).contiguous()
    return tensor


def written_elsewhere(
    path: Path,
    folder: Path,
    config: ModelConfig,
    dialect: str = "pr23112",
    *,
    split_experts: bool = False,
    change: Callable[[str, np.ndarray], np.ndarray] = lambda _, array: array,
    keys: Mapping[str, Any] | None = None,
) -> Path:
    """A two-layer hybrid checkpoint as GGUF, through the gguf package, named from ``dialects``.

    Args:
        split_experts: gate and up rows of the experts as two tensors, as some converters do.
        change: what to store of each tensor, by its name there.
        keys: of ``zaya.``, instead of or beside the usual ones; None leaves one out. Whole numbers
            are stored as u32, others as f32, lists as arrays of u32.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "zaya")
    halves = 1 if dialect == "combined40" else 2
    usual: dict[str, Any] = {
        "block_count": halves * config.layers,
        "context_length": config.max_positions,
        "embedding_length": config.hidden,
        "feed_forward_length": config.expert_width,
        "expert_feed_forward_length": config.router_width,
        "expert_count": config.experts,
        "expert_used_count": 1,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.eps,
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": config.rope_thetas[0],
        "ssm.conv_kernel": 2,
        "vocab_size": config.vocab_rows,
    }
    for key, value in (usual | dict(keys or {})).items():
        if isinstance(value, list):
            writer.add_array(f"zaya.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"zaya.{key}", value)
        elif value is not None:
            writer.add_float32(f"zaya.{key}", value)
    writer.add_tokenizer_model("none")
    tensors = load_file(folder / "model.safetensors")
    for name, (_, hybrid) in NAMES[dialect].items():
        array = place(dialect, tensors[hybrid], hybrid).float().numpy()
        if split_experts and "ffn_gate_up_exps" in name:
            for half, part in zip(("gate", "up"), np.split(array, 2, axis=1), strict=True):
                own = name.replace("gate_up", half)
                writer.add_tensor(own, change(own, np.ascontiguousarray(part)))
        else:
            writer.add_tensor(name, change(name, array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
