"""llm-compressor: ``MODEL IDS OUT gptq|rtn GROUP [routed]``.

4-bit symmetric, every linear layer but the head and the router, as its recipes for mixtures of
experts do. By default every expert is calibrated on all tokens; ``routed``: on its own only.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from worker import load_ids, load_model


def main() -> None:
    """Quantize and save packed."""
    folder, ids_file, out, method, group = sys.argv[1:6]
    ids, model = load_ids(ids_file), load_model(folder)
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
        "group_size": int(group), "dynamic": False,
    }  # fmt: skip
    modifier = GPTQModifier if method == "gptq" else QuantizationModifier
    recipe = modifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head", r"re:.*mlp\.gate\..*"],
    )
    data = {}
    if method == "gptq":
        mask = torch.ones_like(ids)
        data = {
            "dataset": Dataset.from_dict(
                {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}
            ),
            "max_seq_length": ids.shape[1],
            "num_calibration_samples": len(ids),
            "shuffle_calibration_samples": False,
            "moe_calibrate_all_experts": "routed" not in sys.argv[6:],
        }
    oneshot(model=model, recipe=recipe, **data)
    model.save_pretrained(out, save_compressed=True)


if __name__ == "__main__":
    main()
