"""Write a checkpoint in either layout; as a tool, rewrite an existing one in the other layout.

    python tools/relayout.py SRC DST --to legacy

Tensor bytes are copied unchanged, streamed in bounded pieces, and tokenizer, chat template and
licence are carried over. The streaming writer and the published forms of ``config.json`` below
are shared with ``synthetic.py``.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from zaya_convert import layout as layouts
from zaya_convert.checkpoint import SIDE_FILES, Checkpoint, open_source
from zaya_convert.config import ModelConfig
from zaya_convert.errors import InputError
from zaya_convert.headers import DTYPE_BYTES
from zaya_convert.layout import TensorKey

Shape = tuple[int, ...]

# --- published configurations ------------------------------------------------------------------


def hybrid_config(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """``config.json`` as published for the hybrid layout, its stray ``rope_type`` included."""
    raw = config.to_transformers()
    for name, theta in (("hybrid", 5e6), ("hybrid_sliding", 1e4)):
        default = {
            "rope_type": "default",
            "rope_theta": theta,
            "partial_rotary_factor": config.rotary_dim / config.head_dim,
        }
        raw["rope_parameters"].setdefault(name, default)
    raw["rope_parameters"]["rope_type"] = "default"
    raw["dtype"] = str(dtype).removeprefix("torch.")
    return raw


def legacy_config(
    config: ModelConfig, dtype: torch.dtype = torch.bfloat16, lying: bool = False
) -> dict[str, Any]:
    """``config.json`` as published for the legacy layout.

    Args:
        lying: with the false claims of ZAYA1-base: half again as many layers as the file has,
            twice as many heads, per-layer lists, and ``kv_channels`` in place of ``head_dim``.

    Raises:
        ValueError: a window of one token, which the legacy list cannot tell from none.
    """
    if 1 in config.windows:
        raise ValueError("the legacy layout has no way to write a window of 1")
    layers, router, width = 2 * config.layers, config.router_width, 2 * config.expert_width
    raw: dict[str, Any] = {
        "architectures": ["ZayaForCausalLM"],
        "model_type": "zaya",
        "num_hidden_layers": layers,
        "hidden_size": config.hidden,
        "ffn_hidden_size": width,
        "zaya_mlp_expansion": router,
        "num_experts": config.experts,
        "moe_router_topk": 1,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "cca": True,
        "cca_time0": config.conv_taps[0],
        "cca_time1": config.conv_taps[1],
        "activation_func": "swiglu",
        "norm_epsilon": config.eps,
        "rope_theta": next((t for w, t in _patterns(config) if not w), 5e6),
        "partial_rotary_factor": config.rotary_dim / config.head_dim,
        "rope_scaling": False,
        "zaya_use_mod": True,
        "zaya_use_eda": True,
        "scale_residual_merge": True,
        "clamp_temp": False,
        "attention_bias": config.attention_bias,
        "lm_head_bias": config.lm_head_bias,
        "tie_word_embeddings": config.tied,
        "vocab_size": config.vocab_rows,
        "max_position_embeddings": config.max_positions,
        "pad_token_id": config.pad_id,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids),
        "mamba_cache_dtype": "float32",
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if any(config.windows):
        # One entry per half-layer; attention sits at the even ones. The list counts the tokens
        # before the current one, so it is one less than the window.
        raw["swa_layers"] = [n for w in config.windows for n in (max(w - 1, 0), 0)]
        raw["swa_rotary_base"] = next(t for w, t in _patterns(config) if w)
    if lying:
        raw["num_hidden_layers"] = 3 * config.layers
        raw["num_attention_heads"] = 2 * config.heads
        raw["kv_channels"] = raw.pop("head_dim")
        raw["ffn_hidden_size"] = [0, width] * config.layers
        raw["zaya_mlp_expansion"] = [0, router] * config.layers
        raw["num_experts"] = [0, config.experts] * config.layers
    return raw


def _patterns(config: ModelConfig) -> list[tuple[int, float]]:
    return list(zip(config.windows, config.rope_thetas, strict=True))


# --- files -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One tensor to be stored: what its header says, and how to get its bytes when it is time."""

    name: str
    dtype: str
    shape: Shape
    chunks: Callable[[], Iterable[bytes | bytearray | memoryview]]

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def stored_groups(layout: str, config: ModelConfig) -> dict[str, tuple[Shape, list[TensorKey]]]:
    """Every stored tensor of a layout: its name, its shape, and the keys it holds in file order."""
    groups: dict[str, tuple[Shape, list[tuple[tuple[int, int], TensorKey]]]] = {}
    for key in layouts.keys(config.layers, config.experts, config.flags):
        place = layouts.stored(layout, key, config.dims, config.layers)
        order = (place.expert or 0, place.rows[0] if place.rows else 0)
        groups.setdefault(place.name, (place.shape, []))[1].append((order, key))
    return {name: (shape, [key for _, key in sorted(ks)]) for name, (shape, ks) in groups.items()}


def write_files(
    folder: Path,
    entries: Sequence[Entry],
    config: dict[str, Any],
    *,
    shards: int = 1,
    shard_bytes: int | None = None,
    index: bool | None = None,
    side_files: Path | None = None,
) -> None:
    """Write weight files, index and, last of all, ``config.json``; memory is one chunk.

    Args:
        folder: made when missing; must not hold a checkpoint yet.
        shards: number of files of about equal size, unless ``shard_bytes`` limits their size.
        index: whether to write ``model.safetensors.index.json``; by default when sharded.
        side_files: folder whose tokenizer, chat template and licence are carried over.

    Raises:
        FileExistsError: the folder already holds a checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        raise FileExistsError(f"{folder} already holds a checkpoint")
    for name in SIDE_FILES:
        if side_files is not None and (side_files / name).is_file():
            shutil.copyfile(side_files / name, folder / name)
    total = sum(entry.bytes for entry in entries)
    groups = _split(entries, shard_bytes or -(-total // shards), exact=shard_bytes is not None)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = "model.safetensors"
        if len(groups) > 1:
            name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        _write_file(folder / name, group)
        weight_map |= {entry.name: name for entry in group}
    if index if index is not None else len(groups) > 1:
        table = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", table)
    _write_json(folder / "config.json", config)


def _split(entries: Sequence[Entry], limit: int, exact: bool) -> list[list[Entry]]:
    """Consecutive groups of about ``limit`` bytes (``exact``: never more, single tensors aside)."""
    groups: list[list[Entry]] = [[]]
    start = position = 0
    for entry in entries:
        full = position + entry.bytes > start + limit if exact else position >= start + limit
        if full and groups[-1]:
            groups.append([])
            # Without ``exact`` the ideal boundaries are kept, so that rounding does not add up.
            start = position if exact else start + limit
        groups[-1].append(entry)
        position += entry.bytes
    return groups


def _write_file(path: Path, entries: Sequence[Entry]) -> None:
    # Wide types first, as the safetensors library does, keeps every tensor aligned.
    entries = sorted(entries, key=lambda entry: -DTYPE_BYTES[entry.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        offsets = [position, position + entry.bytes]
        header[entry.name] = {
            "dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets,
        }  # fmt: skip
        position = offsets[1]
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb", buffering=0) as file:
        _write_all(file.fileno(), len(raw).to_bytes(8, "little") + raw)
        for entry in entries:
            written = sum(_write_all(file.fileno(), chunk) for chunk in entry.chunks())
            if written != entry.bytes:
                raise ValueError(f"{entry.name}: {written} bytes given, {entry.bytes} planned")
    partial.rename(path)


def _write_all(descriptor: int, chunk: bytes | bytearray | memoryview) -> int:
    view = memoryview(chunk)
    position = 0
    while position < len(view):
        position += os.write(descriptor, view[position:])
    return position


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


# --- the tool ----------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """``"4GB"`` → bytes (decimal units, as the Hub counts).

    Raises:
        ValueError: not a positive size.
    """
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    number = text.strip().upper().rstrip("KMGB")
    unit = text.strip().upper()[len(number) :].strip()
    if unit not in units or float(number) <= 0:
        raise ValueError(f"{text!r} is not a size like 4GB or 500MB")
    return int(float(number) * units[unit])


def relayout(
    source: Checkpoint,
    folder: Path,
    layout: str,
    *,
    shards: int = 1,
    shard_bytes: int | None = None,
    index: bool | None = None,
) -> None:
    """Write ``source`` in ``layout`` ("hybrid" or "legacy") to ``folder``.

    A checkpoint that keeps its layout keeps its ``config.json``; one that changes it gets the
    form published for the new layout.

    Raises:
        InputError: pieces of one fused tensor are stored with different dtypes.
        FileExistsError: the folder already holds a checkpoint.
    """
    entries = []
    for name, (shape, keys) in stored_groups(layout, source.config).items():
        dtypes = {source.infos[key].dtype for key in keys}
        if len(dtypes) > 1:
            raise InputError(f"its pieces are stored as {sorted(dtypes)}, one is needed", name)
        entries.append(Entry(name, dtypes.pop(), shape, _copier(source, keys)))
    if layout == source.format:
        config = dict(source.raw_config)
    else:
        dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[entries[0].dtype]
        config = (hybrid_config if layout == "hybrid" else legacy_config)(
            source.config, getattr(torch, dtype)
        )
    write_files(
        folder, entries, config,
        shards=shards, shard_bytes=shard_bytes, index=index, side_files=source.path,
    )  # fmt: skip


def _copier(source: Checkpoint, keys: Sequence[TensorKey]) -> Callable[[], Iterable[memoryview]]:
    return lambda: (chunk for key in keys for chunk in source.chunks(key))


@click.command()
@click.argument("src", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option("--to", "layout", type=click.Choice(["hybrid", "legacy"]), required=True)
@click.option("--shard-size", default="4GB", show_default=True, help="Largest weight file.")
def main(src: Path, dst: Path, layout: str, shard_size: str) -> None:
    """Rewrite the checkpoint SRC in the other layout as DST, its tensors unchanged."""
    try:
        relayout(open_source(src), dst, layout, shard_bytes=parse_size(shard_size))
    except (InputError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(dst)


if __name__ == "__main__":
    main()
