"""``--engine`` and ``--dtype``: what runs a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from zaya_convert.errors import UsageError

if TYPE_CHECKING:
    from zaya_convert.checkpoint import Checkpoint
    from zaya_convert.runtime.engine import Engine

REFERENCE, ONNXRUNTIME = "reference", "onnxruntime"

engine_option = click.option(
    "--engine",
    type=click.Choice([REFERENCE, ONNXRUNTIME]),
    help="What runs the model [default: onnxruntime for ONNX folders, else our reference runtime].",
)

dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Of the reference runtime [default: bfloat16]; float32 is exact.",
)


def choose_engine(checkpoint: Checkpoint, engine: str | None) -> str:
    """What runs ``checkpoint``, as asked for or by default.

    Raises:
        UsageError: onnxruntime is asked for something else than an ONNX folder.
    """
    is_onnx = checkpoint.format == "onnx"
    if engine == ONNXRUNTIME and not is_onnx:
        raise UsageError(f"--engine onnxruntime runs ONNX folders; this is {checkpoint.format}")
    return engine or (ONNXRUNTIME if is_onnx else REFERENCE)


def open_engine(checkpoint: Checkpoint, engine: str | None, dtype: str | None) -> Engine[Any]:
    """What runs ``checkpoint``, ready to run.

    Raises:
        UsageError: the options contradict each other or the model.
    """
    if choose_engine(checkpoint, engine) == ONNXRUNTIME:
        if dtype:
            raise UsageError("--dtype is of the reference runtime; add --engine reference")
        from zaya_convert.runtime.onnx_engine import OnnxModel

        return OnnxModel(checkpoint)
    import torch

    from zaya_convert.runtime.model import Model

    return Model(checkpoint, getattr(torch, dtype or "bfloat16"), fast=True)
