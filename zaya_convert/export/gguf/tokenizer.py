"""Tokenizer and chat template as GGUF metadata, both ways.

Loaders of ``zaya`` know two kinds of BPE. *gemma4* (what ZAYA1 has): spaces become U+2581, what is
no token falls back on bytes ``<0x0A>``. *gpt2*: byte-level, with a named rule for splitting words.
What a tokenizer means beyond that cannot be said in GGUF, so others are left out, with a note.

The token list and the embedding must have as many entries, so that rows without a token get a text
of their own (``[PAD740]``) of type UNUSED, and no row is lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from zaya_convert import tokenizer_files
from zaya_convert.config import ModelConfig
from zaya_convert.errors import InputError
from zaya_convert.export.gguf.metadata import Entry
from zaya_convert.gguf_header import GgufHeader
from zaya_convert.tokenizer_files import Files

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_PADDING = re.compile(r"\[PAD\d+\]")
_NO_SCORE = -1000.0  # BPE goes by merges; readers that print scores expect a number
_SPECIALS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}

# Rules for splitting words that llama.cpp has by name: the regular expression of tokenizer.json, ""
# for the one built into ByteLevel.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"gpt-2": "", "llama-bpe": _LLAMA3, "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")}
_WHOLE_WORDS_FIRST = ("llama-bpe",)  # a word that is a token is not merged together


def entries(files: Files, config: ModelConfig) -> tuple[list[Entry], str]:
    """Metadata for the tokenizer of a model, and why it has none, or "".

    Raises:
        InputError: the tokenizer has more tokens than the model has rows, or is damaged.
    """
    raw = tokenizer_files.read(files, "tokenizer.json")
    try:
        return _entries(raw, files, config)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"is damaged ({type(error).__name__}: {error})", "tokenizer.json"
        ) from None


def _entries(raw: Mapping[str, Any], files: Files, config: ModelConfig) -> tuple[list[Entry], str]:
    kind, split, reason = _kind(raw)
    if reason:
        ids = _special_ids(files, config, [])
        return [("tokenizer.ggml.model", "str", "none"), *ids], reason
    texts, types = _tokens(raw, config.vocab_rows)
    found: list[Entry] = [("tokenizer.ggml.model", "str", kind)]
    if split:
        found.append(("tokenizer.ggml.pre", "str", split))
    found += [
        ("tokenizer.ggml.tokens", "[str]", texts),
        ("tokenizer.ggml.scores", "[f32]", [_NO_SCORE] * len(texts)),
        ("tokenizer.ggml.token_type", "[i32]", types),
        ("tokenizer.ggml.merges", "[str]", _merges(raw["model"].get("merges", []))),
    ]
    found += _special_ids(files, config, texts)
    found += [
        ("tokenizer.ggml.add_bos_token", "bool", _adds_bos(raw)),
        ("tokenizer.ggml.add_space_prefix", "bool", False),
    ]
    template = tokenizer_files.template(files)
    if template:
        found.append(("tokenizer.chat_template", "str", template))
    return found, ""


def side_files(header: GgufHeader) -> dict[str, bytes]:
    """``tokenizer.json`` and ``tokenizer_config.json`` that mean what the metadata says.

    Returns:
        {} when the file has no tokenizer, or one of a kind that is not rebuilt.
    """
    data: Mapping[str, Any] = header.metadata
    kind, texts = data.get("tokenizer.ggml.model"), data.get("tokenizer.ggml.tokens", [])
    split = data.get("tokenizer.ggml.pre", "gpt-2")
    known = kind == "gemma4" or (kind == "gpt2" and split in tuple(_SPLITS))
    if not known or not texts or not _strings(texts):
        return {}
    types = data.get("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != len(texts):
        types = [BYTE if _BYTE.fullmatch(text) else NORMAL for text in texts]
    merges = data.get("tokenizer.ggml.merges", [])
    if not _strings(merges):
        raise InputError("tokenizer.ggml.merges must hold strings", "metadata")
    raw = _tokenizer(data, str(kind), str(split), texts, types, merges)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, token in _SPECIALS.items():
        place = data.get(f"tokenizer.ggml.{name}_token_id")
        if type(place) is int and 0 <= place < len(texts):
            settings[token] = texts[place]
    template = data.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    return {"tokenizer.json": _json(raw), "tokenizer_config.json": _json(settings)}


def _kind(raw: Mapping[str, Any]) -> tuple[str, str, str]:
    """(model, split rule, why it cannot be said) of a ``tokenizer.json``."""
    if not raw:
        return "", "", "the model has no tokenizer.json"
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or "vocab" not in model:
        return "", "", "its tokenizer is no BPE, which GGUF cannot express"
    steps = _steps(raw.get("normalizer"))
    splits = _steps(raw.get("pre_tokenizer"))
    if any(step.get("type") == "ByteLevel" for step in splits):
        return _byte_level(steps, splits, _whole_words(model))
    replaces = [step for step in steps if step.get("type") == "Replace"]
    spaces = [r for r in replaces if r.get("pattern") == {"String": " "} and r["content"] == _SPACE]
    harmless = all(step.get("type") == "Split" for step in splits) and not _whole_words(model)
    if not model.get("byte_fallback") or len(spaces) != len(steps) or not spaces or not harmless:
        return "", "", "its tokenizer is neither byte-fallback nor byte-level BPE"
    return "gemma4", "", ""


def _byte_level(
    steps: Sequence[Mapping[str, Any]], splits: Sequence[Mapping[str, Any]], whole_words: bool
) -> tuple[str, str, str]:
    last = splits[-1]
    if len(splits) == 1 and last.get("use_regex", True):
        pattern = ""
    elif len(splits) == 2 and splits[0].get("type") == "Split":
        pattern = str(splits[0].get("pattern", {}).get("Regex"))
    else:
        pattern = "?"
    names = [
        name
        for name, known in _SPLITS.items()
        if known == pattern and (name in _WHOLE_WORDS_FIRST) == whole_words
    ]
    if steps or last.get("add_prefix_space") or not names:
        return "", "", "llama.cpp has no name for how its tokenizer splits words"
    return "gpt2", names[0], ""


def _whole_words(model: Mapping[str, Any]) -> bool:
    return bool(model.get("ignore_merges"))


def _tokens(raw: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Texts and types of all rows."""
    model = raw["model"]
    texts: dict[int, str] = {place: text for text, place in model["vocab"].items()}
    types: dict[int, int] = {}
    if model.get("byte_fallback"):
        types = {i: BYTE for i, text in texts.items() if _BYTE.fullmatch(text)}
    for token in raw.get("added_tokens") or []:
        texts[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    unknown = model["vocab"].get(model.get("unk_token"))
    if unknown is not None:
        types[unknown] = UNKNOWN
    if not all(type(i) is int and i >= 0 and isinstance(text, str) for i, text in texts.items()):
        raise ValueError("token ids are not whole numbers, or texts no text")
    largest = max(texts, default=-1)
    if largest >= rows:
        raise InputError(
            f"has token {largest} ({texts[largest]!r}), but the embedding has {rows} rows",
            "tokenizer.json",
        )
    listed = [texts.get(i, f"[PAD{i}]") for i in range(rows)]
    if len(set(listed)) != rows:
        raise InputError(
            "gives one text to several tokens, which GGUF cannot say", "tokenizer.json"
        )
    return listed, [types.get(i, NORMAL if i in texts else UNUSED) for i in range(rows)]


def _merges(merges: Sequence[Any]) -> list[str]:
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in merges)
    return [f"{left} {right}" for left, right in pairs]


def _special_ids(files: Files, config: ModelConfig, texts: Sequence[str]) -> list[Entry]:
    """Ids of the special tokens; further stop tokens as ends of turn and message."""
    named = tokenizer_files.specials(files)
    places = {text: i for i, text in enumerate(texts)}
    stop = tokenizer_files.stop_ids(files, {"eos_token_id": list(config.eos_ids)})
    ids: dict[str, int | None] = {
        "bos": config.bos_id,
        "eos": stop[0] if stop else None,
        "eot": stop[1] if len(stop) > 1 else None,
        "eom": stop[2] if len(stop) > 2 else None,
        "unknown": None,
        "padding": config.pad_id,
    }
    for name, token in _SPECIALS.items():
        if ids[name] is None and token in named:
            ids[name] = places.get(named[token])
    return [
        (f"tokenizer.ggml.{name}_token_id", "u32", place)
        for name, place in ids.items()
        if place is not None and 0 <= place < config.vocab_rows
    ]


def _adds_bos(raw: Mapping[str, Any]) -> bool:
    """Whether encoding a text begins with a special token."""
    for step in _steps(raw.get("post_processor"), "processors"):
        single = step.get("single") or []
        if step.get("type") == "TemplateProcessing" and single and "SpecialToken" in single[0]:
            return True
    return False


def _tokenizer(
    data: Mapping[str, Any],
    kind: str,
    split: str,
    texts: Sequence[str],
    types: Sequence[int],
    merges: Sequence[str],
) -> dict[str, Any]:
    """A ``tokenizer.json``."""
    real = [
        (i, text, what)
        for i, (text, what) in enumerate(zip(texts, types, strict=True))
        if what != UNUSED or not _PADDING.fullmatch(text)
    ]
    added = [
        {
            "id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": what != USER_DEFINED,
        }
        for i, text, what in real
        if what in (CONTROL, USER_DEFINED, UNKNOWN)
    ]  # fmt: skip
    unknown = next((text for _, text, what in real if what == UNKNOWN), None)
    gemma = kind == "gemma4"
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _replace(" ", _SPACE) if gemma else None,
        "pre_tokenizer": None if gemma else _pre_tokenizer(_SPLITS[split]),
        "post_processor": _begin_with(data, texts),
        "decoder": {
            "type": "Sequence",
            "decoders": [_replace(_SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}],
        }
        if gemma
        else _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": gemma,
            "byte_fallback": gemma,
            "ignore_merges": not gemma and split in _WHOLE_WORDS_FIRST,
            "vocab": {text: i for i, text, _ in real},
            # Split at the first space that is not the beginning, as llama.cpp does.
            "merges": [[m[: m.find(" ", 1)], m[m.find(" ", 1) + 1 :]] for m in merges],
        },
    }


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
               "use_regex": False}  # fmt: skip


def _pre_tokenizer(pattern: str) -> dict[str, Any]:
    if not pattern:
        return _BYTE_LEVEL | {"use_regex": True}
    split = {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    return {"type": "Sequence", "pretokenizers": [split, _BYTE_LEVEL]}


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _begin_with(data: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any] | None:
    """A post-processor that puts BOS first, if the metadata asks for it."""
    place = data.get("tokenizer.ggml.bos_token_id")
    if not data.get("tokenizer.ggml.add_bos_token") or type(place) is not int:
        return None
    if not 0 <= place < len(texts):
        return None
    token, text = {"id": texts[place], "type_id": 0}, texts[place]
    single = [{"SpecialToken": token}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [
        {"SpecialToken": token | {"type_id": 1}},
        {"Sequence": {"id": "B", "type_id": 1}},
    ]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single + second,
        "special_tokens": {text: {"id": text, "ids": [place], "tokens": [text]}},
    }


def _steps(value: object, inner: str = "") -> list[Mapping[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or post-processor, sequences taken apart."""
    if not isinstance(value, dict):
        return []
    if value.get("type") == "Sequence":
        names = (inner, "normalizers", "pretokenizers", "processors")
        parts = next((value[name] for name in names if name in value), [])
        return [step for part in parts for step in _steps(part, inner)]
    return [value]


def _strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
