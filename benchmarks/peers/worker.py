"""What the workers share. They run in environments of their own, without zaya_convert."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

# pyright: reportMissingImports=false


def load_ids(path: str) -> torch.Tensor:
    """Calibration rows ``[rows, length]``."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    lines = Path(path).read_text().splitlines()
    return torch.tensor([json.loads(line)["ids"] for line in lines])


def load_model(folder: str) -> Any:
    """The bf16 model, routing as it was trained to.

    transformers sets the last balancing bias to -1 whatever the file holds; the file's is restored,
    or no token would ever choose the skip expert during calibration.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    restored = 0
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                if name.endswith("balancing_biases"):
                    with torch.no_grad():
                        model.get_buffer(name).copy_(file.get_tensor(name))
                    restored += 1
    assert restored == model.config.num_hidden_layers, restored
    return model
