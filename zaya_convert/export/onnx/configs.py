"""The configuration files of an ONNX folder: transformers.js' and onnxruntime-genai's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zaya_convert import tokenizer_files
from zaya_convert.config import ModelConfig
from zaya_convert.export.container import split
from zaya_convert.files import json_bytes

if TYPE_CHECKING:
    from zaya_convert.plan import Plan

# transformers.js looks for onnx/model.onnx and its data under these names; with a cap on shard
# sizes the data of a model is in model.onnx_data, model.onnx_data_1, ...
FOLDER = "onnx"
NAMES = {"optimum": "model.onnx", "genai": "model_genai.onnx"}
DATA = "model.onnx_data"

_JS = "transformers.js_config"
# onnxruntime-genai allocates keys and values of this many tokens at once; users may ask for more.
_GENAI_TOKENS = 4096
_STATES = {"key": "key", "value": "value", "conv": "conv_state", "recurrent": "shift_state"}


def recognises(config: Mapping[str, Any]) -> bool:
    """A folder that says how transformers.js is to load it."""
    return _JS in config


def data_names(files: int) -> list[str]:
    """Names of the data files."""
    return [DATA + (f"_{i}" if i else "") for i in range(files)]


def files(plan: Plan) -> dict[str, bytes]:
    """Both files, and the tokenizer's where the model has one."""
    config, side_files = plan.source.config, plan.source.side_files()
    chunks = len(split(plan.arrays, plan.shard_bytes))
    stops = tokenizer_files.stop_ids(side_files, {}) or config.eos_ids
    return {
        "config.json": json_bytes(_transformers_js(config, chunks)),
        "genai_config.json": json_bytes(_genai(config, stops)),
        **_tokenizer(side_files),
    }


def _transformers_js(config: ModelConfig, chunks: int) -> dict[str, Any]:
    """transformers' configuration, adapted.

    Without ``cca_time1``, which transformers.js 4.3 takes for the distance between layers with
    states; transformers itself takes 2 for granted.
    """
    found = config.to_transformers()
    del found["cca_time1"]
    # "fp32" names the file without a suffix, which holds whatever it holds
    found[_JS] = {"dtype": "fp32", "use_external_data_format": {NAMES["optimum"]: chunks}}
    return found


def _tokenizer(side_files: Mapping[str, bytes]) -> dict[str, bytes]:
    """``tokenizer_config.json`` with the chat template in it.

    transformers.js 4.3 looks for a language model's template nowhere else.
    """
    name = "tokenizer_config.json"
    settings = tokenizer_files.read(side_files, name)
    template = tokenizer_files.template(side_files)
    # it may hold several templates by name: they stay, unless a newer place overrules them
    if not template or (settings.get("chat_template") and "chat_template.jinja" not in side_files):
        return {}
    return {name: json_bytes(settings | {"chat_template": template})}


def _genai(config: ModelConfig, stops: Sequence[int]) -> dict[str, Any]:
    """``genai_config.json``; ``stops`` are the tokens that end a text.

    onnxruntime-genai 0.18 knows no type "zaya"; "llama" is the one that asks for nothing else than
    a decoder with these states.
    """
    tokens = {"bos_token_id": config.bos_id, "pad_token_id": config.pad_id}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": f"{FOLDER}/{NAMES['genai']}",
        "head_size": config.head_dim,
        "hidden_size": config.hidden,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            **{f"past_{kind}_names": f"past_key_values.%d.{n}" for kind, n in _STATES.items()},
        },
        "outputs": {
            "logits": "logits",
            **{f"present_{kind}_names": f"present.%d.{n}" for kind, n in _STATES.items()},
        },
    }
    model = {
        "type": "llama",
        **{name: token for name, token in tokens.items() if token is not None},
        "eos_token_id": list(stops),
        "vocab_size": config.vocab_rows,
        "context_length": config.max_positions,
        "decoder": decoder,
    }
    search = {
        "do_sample": False,
        "max_length": min(_GENAI_TOKENS, config.max_positions),
        "past_present_share_buffer": True,
    }
    return {"model": model, "search": search}
