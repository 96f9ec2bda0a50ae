"""``--engine``: what runs a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from zaya_convert.errors import UsageError

if TYPE_CHECKING:
    from zaya_convert.checkpoint import Checkpoint

REFERENCE, ONNXRUNTIME = "reference", "onnxruntime"

engine_option = click.option(
    "--engine",
    type=click.Choice([REFERENCE, ONNXRUNTIME]),
    help="What runs the model [default: onnxruntime for ONNX folders, else our reference runtime].",
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
