"""Synthetic ZAYA1 checkpoints of any size, in either layout, streamed to disk tensor by tensor.

    python tools/synthetic.py --preset 8b --layout hybrid --out DIR --seed 0

What makes them useful is that they look like the real thing where a converter could be wrong:
every parameter is non-trivial, rows differ in scale, a few input channels are 10-60 times larger
than the rest, a few experts are outliers, temperatures and residual scales lie in the ranges
published for ZAYA1, and the router spreads its choices. The gains keep activations of order one.

Values depend on the seed and the ``TensorKey`` alone, never on layout, sharding or order, so both
layouts of one seed hold bit-identical tensors. Full-size models take 8.8e9 values, far too many to
draw one by one: each matrix row is a window at a random offset into one pool of normal values,
times a row scale and a column scale. Two rows of a matrix share values only where their windows
happen to overlap, and then shifted.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from relayout import (
    Entry,
    hybrid_config,
    legacy_config,
    parse_size,
    stored_groups,
    write_files,
)
from zaya_convert import layout as layouts
from zaya_convert.config import ModelConfig
from zaya_convert.layout import PART_BY_NAME, TensorKey

Shape = tuple[int, ...]
TensorMaker = Callable[[TensorKey, Shape], torch.Tensor]

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {value: name for name, value in DTYPES.items()}

_POOL = 1 << 22  # values in the pool of normals (16 MiB)
_BLOCK = 1 << 18  # values generated and written at a time (1 MiB of float32, fits a cache)


# --- values ------------------------------------------------------------------------------------


@cache
def _pool() -> np.ndarray:
    """Normal values with a slightly heavy tail (excess kurtosis about 1), variance 1."""
    rng = np.random.Generator(np.random.SFC64(0x5A415941))
    values = rng.standard_normal(_POOL, np.float32)
    values *= np.exp(0.25 * rng.standard_normal(_POOL, np.float32) - 0.0625)
    return values


def _rng(seed: int, key: TensorKey) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))


# Parts that are vectors: (centre, spread of the logarithm) for positive ones, or
# (0, standard deviation) for signed ones. 0.86 is the eightieth root of 6.8e-6, the published
# product of all residual scales over 40 layers.
_POSITIVE = {
    "input_layernorm.weight": (1.0, 0.3),
    "post_attention_layernorm.weight": (1.0, 0.3),
    "norm.weight": (1.0, 0.2),
    "mlp.gate.router_mlp.norm.weight": (1.0, 0.2),
    "mlp.gate.router_states_scale": (0.5, 0.3),
    "hidden_states_scale": (1.0, 0.25),
    "residual_scale": (0.86, 0.08),
}
_SIGNED = {"residual_bias": 0.02, "hidden_states_bias": 0.02, "bias": 0.1, "balancing_biases": 0.02}

# Root mean square of the output for inputs of order one; 1 unless named. The router's last matrix
# is large so that its choices are clear, the embedding so that logits spread like a real model's.
_GAIN = {
    "embed_tokens.weight": 2.5,
    "lm_head.weight": 2.5,
    "mlp.gate.router_mlp.fc1.weight": 1.5,
    "mlp.gate.router_mlp.fc2.weight": 1.5,
    "mlp.gate.router_mlp.out_proj.weight": 4.0,
}


def value_blocks(
    key: TensorKey, shape: Shape, seed: int, skip_bias: float = -1.0
) -> Iterator[np.ndarray]:
    """The float32 values of one tensor, in row-major blocks of about 1 MiB (at least a row).

    Args:
        skip_bias: the balancing bias of the skip expert. Published models have -1, which makes it
            unreachable; 0 lets it compete like any expert, 1 forces every token to skip.
    """
    rng = _rng(seed, key)
    if len(shape) == 1:
        yield _vector(key, shape[0], rng, skip_bias)
        return
    rows, cols = shape[0], math.prod(shape[1:])
    role = PART_BY_NAME[key.part].role
    column = _column_scales(rng, cols, outliers=role in ("expert", "attention"))
    gain = _GAIN.get(key.part, 1.0)
    if key.part == "mlp.experts.down_proj.weight" and rng.random() < 1 / 24:
        gain *= 8.0  # an outlier expert, about as rare as in the one published study
    column *= gain / math.sqrt(math.fsum(column**2))
    row = np.exp(0.25 * rng.standard_normal(rows)).astype(np.float32)[:, None]
    offsets = rng.integers(0, _POOL - cols, rows)
    windows = np.lib.stride_tricks.sliding_window_view(_pool(), cols)
    step = max(1, _BLOCK // cols)
    for start in range(0, rows, step):
        block = windows[offsets[start : start + step]]
        block *= row[start : start + step]
        block *= column.astype(np.float32)
        yield block


def _column_scales(rng: np.random.Generator, cols: int, outliers: bool) -> np.ndarray:
    """Per-input-channel scales: log-normal, and one column in 1024 at 10 to 60 times the rest."""
    scales = np.exp(0.2 * rng.standard_normal(cols))
    if outliers:
        count = int(cols / 1024 + rng.random())
        scales[rng.choice(cols, count, replace=False)] *= 10 * 6 ** rng.random(count)
    return scales


def _vector(key: TensorKey, size: int, rng: np.random.Generator, skip_bias: float) -> np.ndarray:
    kind = key.part if key.part in _POSITIVE else key.part.rsplit(".", 1)[-1]
    normal = rng.standard_normal(size)
    if kind == "temp":
        values = 0.8 * (12.9 / 0.8) ** rng.random(size)
    elif kind == "input_hidden_states_scale":
        # Small enough that the layers, not the token itself, decide the logits of the tied head.
        values = 0.12 * math.sqrt(size) * np.exp(0.2 * normal)
    elif kind in _POSITIVE:
        centre, spread = _POSITIVE[kind]
        values = centre * np.exp(spread * normal)
    else:
        values = _SIGNED.get(kind, 0.02) * normal
    if kind == "balancing_biases":
        values[-1] = skip_bias
    return values.astype(np.float32)


def synthetic_tensor(
    key: TensorKey, shape: Shape, seed: int = 0, skip_bias: float = -1.0
) -> torch.Tensor:
    """One whole synthetic tensor in float32 (what ``write_checkpoint`` rounds to its dtype)."""
    blocks = [block.reshape(-1) for block in value_blocks(key, shape, seed, skip_bias)]
    return torch.from_numpy(np.concatenate(blocks)).reshape(shape)


# --- configurations ----------------------------------------------------------------------------


def make_config(**changes: Any) -> ModelConfig:
    """``ModelConfig`` with per-layer windows and rope bases filled in where they are left out."""
    layers, head_dim = changes["layers"], changes["head_dim"]
    windows = tuple(changes.setdefault("windows", (0,) * layers))
    if len(windows) != layers:
        raise ValueError(f"{len(windows)} windows for {layers} layers")
    changes["windows"] = windows
    changes.setdefault("rope_thetas", tuple(1e4 if window else 5e6 for window in windows))
    changes.setdefault("rotary_dim", head_dim // 2)
    return ModelConfig(**changes)


_EIGHT_B = {
    "layers": 40, "hidden": 2048, "heads": 8, "kv_heads": 2, "head_dim": 128, "experts": 16,
    "expert_width": 2048, "router_width": 256, "vocab_rows": 262272,
}  # fmt: skip
_SEVENTY_FOUR_B_NARROW = {
    "layers": 6, "hidden": 512, "heads": 16, "kv_heads": 2, "head_dim": 32, "experts": 24,
    "expert_width": 512, "router_width": 128, "vocab_rows": 8192,
}  # fmt: skip
_NANO = {
    "layers": 3, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "experts": 8,
    "expert_width": 64, "router_width": 32, "vocab_rows": 96,
}  # fmt: skip
PRESETS = {"8b": _EIGHT_B, "74b-narrow": _SEVENTY_FOUR_B_NARROW, "nano": _NANO}


def nano_config(**changes: Any) -> ModelConfig:
    """A model of about 0.6 M weights for tests; groups of 32 divide every quantizable width.

    Args:
        changes: any field of ``ModelConfig``; ``windows`` needs one entry per layer.
    """
    return make_config(**{**_NANO, "max_positions": 4096, "eos_ids": (1,), **changes})


def preset_config(name: str, window: int | None = None, **changes: int) -> ModelConfig:
    """A preset with some dimensions changed. ``window``: of every other layer, 0 for none."""
    dims = {**PRESETS[name], **changes}
    if window is None:
        window = 4097 if name == "74b-narrow" else 0
    windows = tuple(window if layer % 2 else 0 for layer in range(dims["layers"]))
    small = {"max_positions": 4096, "eos_ids": (1,)} if name == "nano" else {}
    return make_config(**dims, windows=windows, **small)


# --- checkpoints -------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    *,
    layout: str = "hybrid",
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    shard_bytes: int | None = None,
    index: bool | None = None,
    tensors: TensorMaker | None = None,
    with_tokenizer: Path | None = None,
    skip_bias: float = -1.0,
    lying: bool = False,
) -> Path:
    """Write a checkpoint and return its folder.

    Args:
        layout: "hybrid" or "legacy".
        dtype: of every tensor but the balancing biases, which are always float32, as published.
        shards, shard_bytes, index: as in ``write_files``.
        tensors: gives the values of each ``(key, shape)``; synthetic ones of ``seed`` if None.
        with_tokenizer: folder whose tokenizer and other side files are copied along.
        skip_bias: see ``value_blocks``.
        lying: legacy only, see ``legacy_config``.

    Raises:
        FileExistsError: the folder already holds a checkpoint.
    """

    def chunks(keys: list[TensorKey], stored_as: torch.dtype) -> Iterator[memoryview]:
        for key in keys:
            shape = layouts.resolve(PART_BY_NAME[key.part].shape, config.dims)
            if tensors is not None:
                given = tensors(key, shape)
                if tuple(given.shape) != shape:
                    raise ValueError(f"{key}: shape {tuple(given.shape)} given, {shape} needed")
                yield _raw_bytes(given, stored_as)
                continue
            for block in value_blocks(key, shape, seed, skip_bias):
                yield _raw_bytes(torch.from_numpy(block), stored_as)

    entries = []
    for name, (shape, keys) in stored_groups(layout, config).items():
        stored_as = torch.float32 if keys[0].part.endswith("balancing_biases") else dtype
        entries.append(Entry(name, DTYPE_NAMES[stored_as], shape, partial(chunks, keys, stored_as)))
    raw = (
        legacy_config(config, dtype, lying) if layout == "legacy" else hybrid_config(config, dtype)
    )
    write_files(
        folder, entries, raw,
        shards=shards, shard_bytes=shard_bytes, index=index, side_files=with_tokenizer,
    )  # fmt: skip
    return folder


def _raw_bytes(values: torch.Tensor, dtype: torch.dtype) -> memoryview:
    return values.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data


_DIMENSIONS = tuple(_EIGHT_B)


def _dimension_options(command: Callable[..., None]) -> Callable[..., None]:
    for name in reversed(_DIMENSIONS):
        flag = "--" + name.replace("_", "-")
        command = click.option(flag, type=click.IntRange(1), help="Instead of the preset's.")(
            command
        )
    return command


@click.command()
@click.option("--preset", type=click.Choice(list(PRESETS)), default="nano", show_default=True)
@click.option("--layout", type=click.Choice(["hybrid", "legacy"]), default="hybrid")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16")
@click.option("--shard-size", default="4GB", show_default=True, help="Largest weight file.")
@click.option("--window", type=click.IntRange(0), help="Window of every other layer (0: none).")
@click.option(
    "--skip-bias",
    type=float,
    default=-1.0,
    show_default=True,
    help="Balancing bias of the skip expert: -1 never chosen, 0 like any expert, 1 always.",
)
@click.option("--lying", is_flag=True, help="Legacy: the false config.json of ZAYA1-base.")
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder whose tokenizer files are copied along.",
)
@_dimension_options
def main(
    preset: str,
    layout: str,
    out: Path,
    seed: int,
    dtype: str,
    shard_size: str,
    window: int | None,
    skip_bias: float,
    lying: bool,
    tokenizer: Path | None,
    **dimensions: int | None,
) -> None:
    """Write a synthetic ZAYA1 checkpoint of any size."""
    torch.set_num_threads(1)
    changes = {name: value for name, value in dimensions.items() if value is not None}
    try:
        write_checkpoint(
            out,
            preset_config(preset, window, **changes),
            layout=layout,
            seed=seed,
            dtype=getattr(torch, dtype),
            shard_bytes=parse_size(shard_size),
            with_tokenizer=tokenizer,
            skip_bias=skip_bias,
            lying=lying,
        )
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(out)


if __name__ == "__main__":
    main()
