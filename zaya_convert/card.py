"""The model card of an artifact: licence and base model kept, and how to use what is inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zaya_convert.checkpoint import Checkpoint

if TYPE_CHECKING:
    from zaya_convert.plan import Plan

_KEPT = ("license", "license_name", "license_link", "language", "base_model")

_HOW = {
    "compressed-tensors": """Run it, or load it in transformers (plain `from_pretrained` would fill
the experts at random with only a warning, because transformers has no per-expert names for ZAYA):

```python
from zaya_convert.oracle import load_artifact_in_transformers

model = load_artifact_in_transformers("PATH_TO_THIS_FOLDER")
```""",
    "auto-round": """Loads in transformers with the `auto-round` package installed:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH_TO_THIS_FOLDER")
```""",
    "onnx": """Loads in transformers.js (from 4.3), onnxruntime-genai (from 0.18) and onnxruntime
(from 1.25.1):

```js
import { AutoModelForCausalLM } from "@huggingface/transformers";

const model = await AutoModelForCausalLM.from_pretrained("PATH_TO_THIS_FOLDER");
```

```python
import onnxruntime_genai

model = onnxruntime_genai.Model("PATH_TO_THIS_FOLDER")
```""",
    "gguf": """For builds of llama.cpp that know ZAYA1, such as kmbandy/llama.cpp, branch
feat/zaya1-cca; no release does, and other forks read other dialects:

```sh
llama-cli -m PATH_TO_THIS_FOLDER/model.gguf
```""",
    "gguf-combined40": """For builds of llama.cpp that know ZAYA1 as 1bit-MONSTER/llama.cpp does; no
release does, and other forks read other dialects.""",
    "gguf-yggdrasil": """For builds of llama.cpp that know ZAYA1 as jimbothigpen/llama.cpp does; no
release does, and other forks read other dialects.""",
    "dense": """Dequantized bf16 weights in the original layout: loads wherever ZAYA1 does.""",
}


def model_card(plan: Plan, facts: Mapping[str, Any]) -> bytes:
    """README.md of an artifact: metadata, what was done, how to load it."""
    metadata = kept_metadata(plan.source)
    if plan.origin:
        metadata["base_model"] = plan.origin
    metadata |= {"base_model_relation": "quantized", "tags": ["zaya", "quantized", plan.packing]}
    rows = [
        f"| {name} | {row['tensors']} | {row['weights']:,} | {row['bytes']:,} |"
        for name, row in plan.summary().items()
    ]
    recipe = facts["recipe"]
    lines = [
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in metadata.items()),
        "---",
        "",
        f"# {plan.origin or 'ZAYA1'}: {plan.packing}",
        "",
        f"Written by zaya-convert {facts['tool']['version']}"
        + (f" with recipe `{recipe['name']}`" if recipe else "")
        + f": {facts['bits_per_weight']} bits per weight over all {plan.weights:,} weights, scales"
        " included.",
        "",
        "| kind | tensors | weights | bytes |",
        "| --- | ---: | ---: | ---: |",
        *rows,
        "",
        *_calibration_lines(facts),
        "The router path, convolutions, norms, residual scales and key temperatures are never"
        " quantized. A token routed to the skip expert gets output zero.",
        "",
        _HOW[plan.packing],
        "",
        f"Source digest: `{facts['source']['digest'] or 'unknown'}`. Checksums of every file and"
        " tensor are in `zaya-convert.json`; `zaya-convert verify` checks them.",
        "",
    ]
    return "\n".join(lines).encode()


def _calibration_lines(facts: Mapping[str, Any]) -> list[str]:
    """One paragraph on calibration and chosen bits, if there were any."""
    found, chosen = facts.get("calibration"), facts.get("allocation")
    lines = []
    if found:
        coverage = "."
        if "below_minimum" in found:  # a GGUF file, exported again, does not say
            coverage = (
                f"; {len(found['below_minimum'])} experts had fewer than "
                f"{found['min_tokens']:,} tokens, {len(found['fallback'])} matrices none."
            )
        lines.append(
            f"Calibrated on {found['tokens']:,} tokens of {found['data']} (statistics "
            f"`{found['digest'][:16]}`)" + coverage
        )
    if chosen:
        lines.append(f"Bits were chosen for each matrix to meet {chosen['target']}.")
    return [*lines, ""] if lines else []


def kept_metadata(source: Checkpoint) -> dict[str, Any]:
    """Licence, language and base model of the source's own card."""
    path = source.path / "README.md"
    if not path.is_file():
        return {}
    from huggingface_hub.repocard import metadata_load

    try:
        found = metadata_load(path) or {}
    except Exception:  # any YAML error: a card that cannot be parsed has nothing to keep
        return {}
    return {name: found[name] for name in _KEPT if name in found}
