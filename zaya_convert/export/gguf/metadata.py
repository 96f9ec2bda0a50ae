"""Metadata of a GGUF file: the model's dimensions both ways, general facts, and provenance.

Keys and types are those that the loaders of ``zaya`` read. Two of them mislead by name:
``expert_feed_forward_length`` is the router's width, and ``feed_forward_length`` the experts'.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from zaya_convert import __version__
from zaya_convert.card import kept_metadata
from zaya_convert.config import MAX_EXPERTS, MAX_LAYERS, ModelConfig
from zaya_convert.errors import InputError
from zaya_convert.export.container import Outcome
from zaya_convert.export.gguf.names import Dialect
from zaya_convert.gguf_header import GgufHeader
from zaya_convert.headers import parse_json_object

if TYPE_CHECKING:
    from zaya_convert.plan import Plan

Entry = tuple[str, str, Any]  # key, kind, value

PROVENANCE = "zaya_convert."
CHECKSUMS = PROVENANCE + "checksums"
HEADER_DIGEST = PROVENANCE + "header."  # and the number of the part
BLANK_DIGEST = "0" * 64

# llama.cpp's numbers for the type that most of a file has (llama.h, llama_ftype).
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q3_K": 11,
    "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32,
}  # fmt: skip
_STOP_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
_FILE_TYPES_MIXED = {"q4_k_m": 15, "q5_k_m": 17}


def model_entries(config: ModelConfig, dialect: Dialect) -> list[Entry]:
    """Dimensions and constants."""
    entries: list[Entry] = [
        ("block_count", "u32", dialect.blocks(config)),
        ("context_length", "u32", config.max_positions),
        ("embedding_length", "u32", config.hidden),
        ("feed_forward_length", "u32", config.expert_width),
        ("expert_feed_forward_length", "u32", config.router_width),
        ("expert_count", "u32", config.experts),
        ("expert_used_count", "u32", 1),
        ("attention.head_count", "u32", config.heads),
        ("attention.head_count_kv", "u32", config.kv_heads),
        ("attention.key_length", "u32", config.head_dim),
        ("attention.value_length", "u32", config.head_dim),
        ("attention.layer_norm_rms_epsilon", "f32", config.eps),
        ("rope.dimension_count", "u32", config.rotary_dim),
        ("rope.freq_base", "f32", _theta(config, sliding=False)),
        ("ssm.conv_kernel", "u32", config.conv_taps[0]),
        ("vocab_size", "u32", config.vocab_rows),
        # transformers' meaning; loaders of half-layer dialects never choose the skip expert
        ("skip_mode", "str", "zero"),
    ]
    if any(config.windows):
        entries += [
            ("attention.sliding_window", "u32", max(config.windows)),
            ("attention.sliding_window_pattern", "[bool]", [bool(w) for w in config.windows]),
            ("rope.freq_base_swa", "f32", _theta(config, sliding=True)),
        ]
    return [("zaya." + key, kind, value) for key, kind, value in entries]


def read_config(header: GgufHeader, dialect: Dialect, vocab_rows: int, tied: bool) -> ModelConfig:
    """The configuration that a file's metadata describes.

    Raises:
        InputError: keys that are missing or absurd, all of them.
    """
    found = _Keys(header)
    layers = _layers(found, dialect)
    hidden, heads = found.integer("embedding_length"), found.integer("attention.head_count")
    head_dim = found.integer("attention.key_length", hidden // max(heads, 1))
    windows = _windows(found, layers)
    theta = found.number("rope.freq_base", 1e4)
    sliding = found.number("rope.freq_base_swa", theta)
    eps = "attention.layer_norm_rms_epsilon"
    taps = found.integer("ssm.conv_kernel", 2)
    stop = (_token(header, name) for name in _STOP_TOKENS)
    config = ModelConfig(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=found.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        experts=found.integer("expert_count", high=MAX_EXPERTS),
        expert_width=found.integer("feed_forward_length"),
        router_width=found.integer("expert_feed_forward_length", 256),
        vocab_rows=vocab_rows,
        conv_taps=(taps, taps),
        windows=windows,
        rope_thetas=tuple(sliding if window else theta for window in windows),
        rotary_dim=found.integer("rope.dimension_count", head_dim),
        eps=found.number(
            eps if "zaya." + eps in header.kinds else "attention.layer_norm_epsilon", 1e-5
        ),
        max_positions=found.integer("context_length", 131072),
        tied=tied,
        pad_id=_token(header, "padding_token_id"),
        bos_id=_token(header, "bos_token_id"),
        eos_ids=tuple(dict.fromkeys(token for token in stop if token is not None)),
    )
    if found.integer("expert_used_count", 1) != 1:
        found.problems.append("zaya.expert_used_count must be 1")
    if config.heads % config.kv_heads or config.rotary_dim % 2 or config.rotary_dim > head_dim:
        found.problems.append("heads, key-value heads and rotary width do not fit together")
    if found.problems:
        raise InputError(found.problems, "metadata")
    return config


def _layers(found: _Keys, dialect: Dialect) -> int:
    """Whole layers, at least one; complaints go to ``found``."""
    halves = 2 if dialect.halves else 1
    blocks = found.integer("block_count", low=halves, high=halves * MAX_LAYERS)
    if blocks % halves:
        found.problems.append(f"zaya.block_count is {blocks}, expected an even number")
    return blocks // halves


def _windows(found: _Keys, layers: int) -> tuple[int, ...]:
    """The window of every layer; a period n means n - 1 sliding layers, then a full one."""
    window = found.integer("attention.sliding_window", 0, low=0)
    pattern = found.value("attention.sliding_window_pattern", 2)
    if type(pattern) is int:
        pattern = [pattern == 0 or i % pattern < pattern - 1 for i in range(layers)]
    if not isinstance(pattern, list) or len(pattern) != layers:
        found.problems.append(
            f"zaya.attention.sliding_window_pattern must be a period or hold {layers} values"
        )
        return (0,) * layers
    return tuple(window if slides else 0 for slides in pattern)


def general_entries(plan: Plan) -> list[Entry]:
    """What people and tools ask of any GGUF file."""
    config, card = plan.source.config, kept_metadata(plan.source)
    recipe = plan.recipe.name.lower() if plan.recipe else ""
    quantized = any(step.spec for step in plan.steps)
    name = plan.origin.rpartition("/")[2] or "ZAYA1"
    entries: list[Entry] = [
        ("general.architecture", "str", "zaya"),
        ("general.type", "str", "model"),
        ("general.name", "str", name),
        ("general.size_label", "str", size_label(plan.weights, config)),
        ("general.file_type", "u32", _FILE_TYPES_MIXED.get(recipe, _FILE_TYPES[plan.main_type])),
    ]
    if quantized:
        entries.append(("general.quantization_version", "u32", 2))
    for key, field in (
        ("license", "license"),
        ("license.name", "license_name"),
        ("license.link", "license_link"),
    ):
        if isinstance(card.get(field), str):
            entries.append((f"general.{key}", "str", card[field]))
    entries += _base_model(plan.origin or card.get("base_model"))
    entries.append(("general.tags", "[str]", ["zaya", "text-generation"]))
    languages = card.get("language")
    languages = [languages] if isinstance(languages, str) else languages
    if isinstance(languages, list) and languages and all(isinstance(x, str) for x in languages):
        entries.append(("general.languages", "[str]", languages))
    return entries


def provenance_entries(plan: Plan, outcome: Outcome) -> list[Entry]:
    """Where the file came from: the manifest's facts, in the file itself."""
    entries: list[Entry] = [
        (PROVENANCE + "version", "str", __version__),
        (PROVENANCE + "packing", "str", plan.packing),
        (PROVENANCE + "source.digest", "str", outcome.source_digest),
        (PROVENANCE + "source.model", "str", plan.origin),
    ]
    if plan.how:
        entries.append((PROVENANCE + "recipe", "str", json.dumps(plan.how, sort_keys=True)))
    calibration = _calibration(plan)
    for name, kind in (("digest", "str"), ("data", "str"), ("tokens", "u64")):
        if name in calibration:
            entries.append((f"{PROVENANCE}calibration.{name}", kind, calibration[name]))
    entries.append((CHECKSUMS, "[str]", list(outcome.checksums)))
    return entries


def placeholder(plan: Plan) -> Outcome:
    """An outcome as long as the real one will be, to lay the file out with."""
    regions = sum(len(step.regions) for step in plan.steps)
    known = plan.source_digest
    digest = BLANK_DIGEST if known is None else known
    return Outcome(digest, {}, (BLANK_DIGEST,) * regions)


def read_manifest(header: GgufHeader) -> dict[str, Any]:
    """The facts of ``provenance_entries``, as a manifest has them; {} for other tools' files."""
    digest, model, version, recipe = (
        header.short(PROVENANCE + name)
        for name in ("source.digest", "source.model", "version", "recipe")
    )
    if not isinstance(digest, str) or not isinstance(model, str):
        return {}
    manifest: dict[str, Any] = {
        "tool": {"name": "zaya-convert", "version": version},
        "source": {"digest": digest, "model": model},
    }
    if isinstance(recipe, str):
        manifest["recipe"] = parse_json_object(recipe.encode(), PROVENANCE + "recipe")
        if not isinstance(manifest["recipe"].get("name"), str):
            raise InputError("has no name", PROVENANCE + "recipe")
    kinds = {"digest": str, "data": str, "tokens": int}
    calibration = {name: header.short(f"{PROVENANCE}calibration.{name}") for name in kinds}
    if all(isinstance(calibration[name], kind) for name, kind in kinds.items()):
        manifest["calibration"] = calibration
    return manifest


def size_label(weights: int, config: ModelConfig) -> str:
    """Like ``16x850M``: experts, and the size of a model with one of them, as GGUF's naming has it.

    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#gguf-naming-convention
    """
    expert = config.layers * 3 * config.hidden * config.expert_width
    single = weights - (config.experts - 1) * expert
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if single >= limit:
            value = single / limit
            return (
                f"{config.experts}x{value:.1f}{unit}"
                if value < 10
                else (f"{config.experts}x{value:.0f}{unit}")
            )
    return f"{config.experts}x{single}"


def _calibration(plan: Plan) -> dict[str, Any]:
    stats = plan.stats
    if stats is None or not plan.needs_stats:
        return plan.source.manifest.get("calibration") or {}
    description = stats.facts["description"]
    return {"digest": stats.digest, "data": description, "tokens": stats.tokens}


def _base_model(origin: object) -> list[Entry]:
    """The keys of one base model, from its Hub id."""
    origin = origin[0] if isinstance(origin, list) and origin else origin
    if not isinstance(origin, str) or not origin:
        return []
    organization, _, name = origin.rpartition("/")
    prefix = "general.base_model."
    entries: list[Entry] = [(prefix + "count", "u32", 1), (prefix + "0.name", "str", name)]
    if organization:
        entries += [
            (prefix + "0.organization", "str", organization),
            (prefix + "0.repo_url", "str", f"https://huggingface.co/{origin}"),
        ]
    return entries


def _theta(config: ModelConfig, sliding: bool) -> float:
    """Rotary base of the layers of one kind; that of the others where there is none."""
    pairs = zip(config.windows, config.rope_thetas, strict=True)
    return next((t for w, t in pairs if bool(w) == sliding), config.rope_thetas[0])


def _token(header: GgufHeader, name: str) -> int | None:
    value = header.short(f"tokenizer.ggml.{name}")
    return value if type(value) is int and 0 <= value < 1 << 31 else None


class _Keys:
    """Typed access to a file's ``zaya.`` keys; complaints are collected."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.problems: list[str] = []

    def value(self, key: str, default: Any) -> Any:
        """What the file says, whatever it is."""
        return self.header.short("zaya." + key, default)

    def integer(
        self, key: str, default: int | None = None, low: int = 1, high: int = 1 << 31
    ) -> int:
        value = self.value(key, default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]  # some writers repeat a figure for every block
        if type(value) is int and low <= value <= high:
            return value
        wrong = "is missing" if value is None else f"is {value!r}"
        self.problems.append(f"zaya.{key} {wrong}, expected a whole number from {low} to {high}")
        return low

    def number(self, key: str, default: float) -> float:
        value = self.value(key, default)
        if isinstance(value, int | float) and value is not True and 0 < value < 1e12:
            return float(f"{value:.7g}")  # fp32's 9.9999997e-06 is meant to be 1e-05
        self.problems.append(f"zaya.{key} is {value!r}, expected a positive number")
        return default
