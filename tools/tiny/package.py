"""Writes the finished checkpoint folder: weights, configuration, tokenizer and held-out data."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import ZayaForCausalLM

from tools.tiny.data import (
    ERROR_RATE,
    FOREIGN_SHARE,
    SLIP_RATE,
    Example,
    aggregation_example,
    draw_problem,
    single_example,
    tell,
)
from tools.tiny.prose import prose_text
from tools.tiny.tokenizer import BOS_ID, IM_END_ID, PAD_ID, write_tokenizer

PROBLEMS = 320
TEXT_BYTES = 380_000


def write_package(model: ZayaForCausalLM, tokenizer: Tokenizer, folder: Path, seed: int) -> None:
    """Everything but the model card."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    write_weights(model, folder / "model.safetensors")
    write_config(model, folder)
    write_tokenizer(tokenizer, folder, model.config.max_position_embeddings)
    write_problems(folder / "data" / "problems.jsonl", seed)
    for split in ("calibration", "validation"):
        write_texts(folder / "data" / f"{split}.jsonl", split, seed)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def write_weights(model: ZayaForCausalLM, path: Path) -> None:
    """One file, bf16; the balancing biases stay fp32 and the tied head is not stored again."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        dtype = torch.float32 if name.endswith("balancing_biases") else torch.bfloat16
        tensors[name] = tensor.detach().to(dtype).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def write_config(model: ZayaForCausalLM, folder: Path) -> None:
    """`config.json` as transformers writes it, with the dtype under its older name too."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = ["ZayaForCausalLM"]
    config["dtype"] = config["torch_dtype"] = "bfloat16"
    config["tie_word_embeddings"] = True
    generation = {
        "bos_token_id": BOS_ID,
        "eos_token_id": IM_END_ID,
        "pad_token_id": PAD_ID,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 112,
    }
    for name, content in (("config", config), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_problems(path: Path, seed: int) -> None:
    """Distinct problems of their own split, with the answer."""
    rng = random.Random(f"{seed}:problems")
    seen: set[str] = set()
    lines: list[str] = []
    while len(lines) < PROBLEMS:
        problem = draw_problem(rng, "problems")
        if problem.canonical in seen:
            continue
        seen.add(problem.canonical)
        row = {
            "id": f"tiny-{len(lines):04d}",
            "problem": tell(problem, rng),
            "answer": problem.answer,
        }
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")


def write_texts(path: Path, split: str, seed: int) -> None:
    """Texts of a held-out split in the training proportions: single traces, aggregation, prose."""
    rng = random.Random(f"{seed}:{split}")
    lines: list[str] = []
    size = 0
    while size < TEXT_BYTES:
        line = json.dumps({"text": _held_out_text(rng, split)})
        lines.append(line)
        size += len(line) + 1
    path.write_text("\n".join(lines[:-1]) + "\n")


def _held_out_text(rng: random.Random, split: str) -> str:
    chance = rng.random()
    if chance < 0.05:
        return prose_text(rng, split, rng.randint(3, 10))
    example: Example
    if chance < 0.60:
        example = single_example(rng, split, SLIP_RATE)
    else:
        example = aggregation_example(
            rng, split, SLIP_RATE, ERROR_RATE, foreign_share=FOREIGN_SHARE
        )
    return example.text
