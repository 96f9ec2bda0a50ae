"""``Recipe``: which tensors are quantized and how, as data. TOML in, first match wins.

    description = "whom this recipe serves"

    [[rules]]
    match = "experts"      # a role, or a glob on canonical names: "model.layers.0.mlp.experts.3.*"
    bits = 4
    group_size = 32        # weights per scale; -1 = one scale per output channel
    symmetric = true
    method = "rtn"

    [[rules]]
    match = "attention"
    keep = true            # leave as floats

    [[rules]]
    match = "embedding"
    type = "Q6_K"          # a ggml block type instead of bits, group and symmetry (GGUF only),
                           # or F32, F16, BF16: leave as floats of that type

    [budget]               # optional: choose bits per matrix so that everything fits a device
    memory = "6GB"         # weights, keys and values, states and the runtime together
    context = 8192         # tokens
    runtime = "400MB"      # code, buffers, logits

    floats = "F16"         # optional, at the top: type of the router's matrices in GGUF

Tensors that no rule matches stay floats. The router path, convolutions, norms, scales and
temperatures can never be matched: quantizing them costs far more than it saves.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zaya_convert.errors import InputError, UsageError
from zaya_convert.layout import EXPERT_PARTS, PART_BY_NAME, TensorKey
from zaya_quant.spec import BLOCK_TYPES, QuantSpec, Spec, spec_of_type

if TYPE_CHECKING:
    from zaya_convert.config import ModelConfig

FLOAT_TYPES = ("F32", "F16", "BF16")
ROLES = {"experts": "expert", "attention": "attention", "embedding": "embedding"}

TYPES = (*FLOAT_TYPES, *BLOCK_TYPES)

_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip

_GLOB = re.compile(r"[*?\[]")

# Names that a glob on experts is tried on, when no model is at hand: more than ZAYA1-8B has.
_LAYERS, _EXPERTS = 64, 32


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. ``keep`` leaves the matched tensors as floats; the rest says how to quantize.

    ``type`` names a ggml block type, whose grid replaces bits, group and symmetry, or a float type.
    """

    match: str
    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    scale_dtype: str = "float16"
    method: str = "rtn"
    keep: bool = False
    type: str = ""

    @property
    def spec(self) -> Spec | None:
        """What the rule asks for, without the method; None when it leaves floats."""
        if self.keep or self.type in FLOAT_TYPES:
            return None
        if self.type:
            return spec_of_type(self.type)
        return QuantSpec(self.bits, self.group_size, self.symmetric, self.scale_dtype)

    def matches(self, key: TensorKey) -> bool:
        """Whether this rule speaks of ``key``."""
        role = PART_BY_NAME[key.part].role
        if self.match in ROLES:
            return role == ROLES[self.match]
        if not _GLOB.search(self.match):  # allocations name thousands of matrices
            return self.match in (key.module, str(key))
        return fnmatchcase(key.module, self.match) or fnmatchcase(str(key), self.match)


@dataclass(frozen=True, slots=True)
class Budget:
    """What a device has, in bytes, and the context that must fit."""

    memory: int
    context: int
    runtime: int

    @property
    def text(self) -> str:
        """For people."""
        return (
            f"{self.memory:,} bytes of memory at a context of {self.context:,} tokens, "
            f"{self.runtime:,} of them for the runtime"
        )

    def states(self, config: ModelConfig) -> int:
        """Bytes of one sequence's states at full context, in 16 bits.

        Keys and values (a sliding layer keeps its window), convolution columns and the delayed
        value row of each layer.
        """
        dims = config.dims
        columns = sum(min(self.context, window or self.context) for window in config.windows)
        own = dims["c"] * (dims["t0"] + dims["t1"] - 2) + dims["v"]
        return 2 * (columns * 2 * dims["k"] + config.layers * own)

    def weights(self, config: ModelConfig) -> int:
        """Bytes left for weights.

        Raises:
            UsageError: nothing is left.
        """
        left = self.memory - self.runtime - self.states(config)
        if left <= 0:
            raise UsageError(
                f"a context of {self.context:,} tokens takes {self.states(config):,} bytes, which "
                f"leaves nothing of {self.memory:,} for weights; lower `context`"
            )
        return left


@dataclass(frozen=True, slots=True)
class Recipe:
    """An ordered list of rules."""

    name: str
    description: str
    rules: tuple[Rule, ...]
    budget: Budget | None = None
    floats: str = ""

    @property
    def quantizes(self) -> bool:
        """Whether some rule asks for more than floats."""
        return any(rule.spec for rule in self.rules)

    def rule_for(self, key: TensorKey) -> Rule | None:
        """The first rule that matches, or None when the tensor stays a float."""
        rule = self._first(key)
        return rule if rule and rule.spec else None

    def float_type(self, key: TensorKey) -> str:
        """The float type that the recipe wishes for a tensor, or ""."""
        if PART_BY_NAME[key.part].role == "float":
            return self.floats
        rule = self._first(key)
        return rule.type if rule and rule.spec is None else ""

    def _first(self, key: TensorKey) -> Rule | None:
        if PART_BY_NAME[key.part].role == "float":
            return None
        return next((rule for rule in self.rules if rule.matches(key)), None)

    def to_dict(self) -> dict[str, Any]:
        """As recorded in every artifact."""
        return asdict(self)


def folder() -> Path:
    """Where the shipped recipes are: inside the installed package, or at the checkout's root."""
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {path.stem: path for path in sorted(folder().glob("*.toml"))}


def load(name: str) -> Recipe:
    """Load a recipe by shipped name or by file.

    Raises:
        UsageError: no such recipe. InputError: a recipe file with mistakes, all of them listed.
    """
    known = shipped()
    if name.upper() in TYPES:
        return for_type(name)
    path = known.get(name.lower(), Path(name))
    if not path.is_file():
        raise UsageError(
            f"no recipe {name!r}{_nearest(name, (*known, *TYPES))}; shipped recipes: "
            f"{', '.join(known)}; types: {', '.join(TYPES)}"
        )
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"not valid TOML: {error}", path.name) from None
    return parse(raw, path.stem, path.name)


def parse(raw: Mapping[str, Any], name: str, where: str) -> Recipe:
    """Check a recipe's fields; every mistake is reported, unknown keys with the nearest known."""
    problems = _unknown(raw, ("description", "rules", "budget", "floats"), "")
    floats = raw.get("floats", "")
    if floats not in ("", *FLOAT_TYPES):
        problems.append(f"floats = {floats!r}; allowed: {', '.join(FLOAT_TYPES)}")
    entries = raw.get("rules", [])
    if not isinstance(entries, list) or not entries:
        problems.append("needs at least one [[rules]] table")
        entries = []
    rules = []
    for number, entry in enumerate(entries, 1):
        found = _rule_problems(entry, f"rule {number}: ")
        problems += found
        if not found:
            rules.append(Rule(**entry))
    budget, found = _budget(raw["budget"]) if "budget" in raw else (None, [])
    problems += found
    if problems:
        raise InputError(problems, where)
    return Recipe(name, str(raw.get("description", "")), tuple(rules), budget, floats)


def to_toml(recipe: Recipe) -> str:
    """A recipe as a file that ``load`` reads; chosen bits replace a budget."""
    lines = [f"description = {_toml(recipe.description)}"]
    if recipe.floats:
        lines.append(f"floats = {_toml(recipe.floats)}")
    defaults = Rule("")
    for rule in recipe.rules:
        lines.append("\n[[rules]]")
        for name, value in asdict(rule).items():
            always = name == "match" or (name == "bits" and not rule.type)
            if always or value != getattr(defaults, name):
                lines.append(f"{name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    """JSON, but that TOML knows no surrogate pairs and wants DEL escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def adjusted(
    recipe: Recipe,
    bits: int | None = None,
    group_size: int | None = None,
    method: str | None = None,
) -> Recipe:
    """Apply command-line flags: ``bits`` to rules that speak of experts, the others to all."""
    rules = []
    for rule in recipe.rules:
        changes: dict[str, Any] = {}
        if bits is not None and _speaks_of_experts(rule):
            changes |= {"bits": bits, "type": ""}
        if group_size is not None and not changes.get("type", rule.type):
            changes["group_size"] = group_size
        if method is not None:
            changes["method"] = method
        rules.append(replace(rule, **changes) if rule.spec else rule)
    return replace(recipe, rules=tuple(rules))


def for_bits(bits: int) -> Recipe:
    """The recipe behind a plain ``--bits N``."""
    exact = f"int{bits}"
    return load(exact) if exact in shipped() else adjusted(load("int4"), bits=bits)


def for_type(name: str) -> Recipe:
    """The recipe behind a ggml type: all matrices of that type, embedding and head as below.

    The embedding is the tied head too, so that it gets no less than 6 bits, as llama.cpp has it.
    """
    kind = name.upper()
    if kind in FLOAT_TYPES:
        rules = tuple(Rule(role, type=kind) for role in ROLES)
        return Recipe(kind, f"{kind} for all matrices", rules, floats=kind)
    embedding = kind if kind in ("Q8_0", "Q6_K") else "Q6_K"
    rules = (
        Rule("experts", type=kind, method="gptaq"),
        Rule("attention", type=kind, method="gptaq"),
        Rule("embedding", type=embedding),
    )
    return Recipe(kind, f"{kind} for experts and attention", rules, floats="F16")


def unmatched(recipe: Recipe, keys: Iterable[TensorKey]) -> list[str]:
    """One line per rule that matches none of a model's quantizable tensors.

    A rule whose tensors are all taken by earlier rules does match, and is no mistake.
    """
    quantizable = [key for key in keys if PART_BY_NAME[key.part].role != "float"]
    return [
        f"rule {number}: match {rule.match!r} matches no tensor{_nearest(rule.match, ROLES)}"
        for number, rule in enumerate(recipe.rules, 1)
        if not any(rule.matches(key) for key in quantizable)
    ]


def _speaks_of_experts(rule: Rule) -> bool:
    if rule.match in ROLES:
        return ROLES[rule.match] == "expert"
    return "expert" in rule.match or any(
        rule.matches(TensorKey(layer, part, expert))
        for part in EXPERT_PARTS
        for expert in range(_EXPERTS)
        for layer in range(_LAYERS)
    )


def _rule_problems(entry: object, where: str) -> list[str]:
    fields = tuple(Rule.__dataclass_fields__)
    if not isinstance(entry, dict):
        return [f"{where}must be a table"]
    problems = _unknown(entry, fields, where)
    types = {"match": str, "bits": int, "group_size": int, "symmetric": bool, "keep": bool,
             "scale_dtype": str, "method": str, "type": str}  # fmt: skip
    problems += [
        f"{where}{name} = {entry[name]!r} must be of type {kind.__name__}"
        for name, kind in types.items()
        if name in entry and type(entry[name]) is not kind
    ]
    if problems:
        return problems
    if "match" not in entry:
        problems.append(f"{where}match is missing")
    kind = entry.get("type", "")
    if kind not in ("", *TYPES):
        return [*problems, f"{where}type = {kind!r}; allowed: {', '.join(TYPES)}"]
    if kind and {"bits", "group_size", "symmetric", "scale_dtype", "keep"} & set(entry):
        problems.append(f"{where}type says it all; leave out bits, group and the like")
    try:
        _ = Rule(**{"match": "", **entry}).spec
    except ValueError as error:
        problems.append(f"{where}{error}")
    return problems


def _budget(entry: object) -> tuple[Budget | None, list[str]]:
    """The budget of a recipe, or what is wrong with it."""
    fields = tuple(Budget.__dataclass_fields__)
    if not isinstance(entry, dict):
        return None, ["budget must be a table"]
    problems = _unknown(entry, fields, "budget: ")
    problems += [f"budget: {name} is missing" for name in fields if name not in entry]
    values: dict[str, int] = {}
    for name in fields:
        value = entry.get(name)
        try:
            known: Any = value
            if isinstance(value, str) and name != "context":
                known = parse_size(value)
        except ValueError as error:
            problems.append(f"budget: {name}: {error}")
            continue
        if type(known) is int and known >= 0:
            values[name] = known
        elif name in entry:
            problems.append(
                f"budget: {name} = {value!r} must be "
                + ("a number of tokens" if name == "context" else 'a size like "6GB" or a number')
            )
    return (None if problems else Budget(**values)), problems


def parse_size(text: str) -> int:
    """``"2GB"`` or ``"4.6GiB"`` → bytes.

    Raises:
        ValueError: not a size, or less than a byte.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ValueError(f"{text!r} is not a size like 500MB, 2GB or 4.6GiB")
    return int(float(match[1]) * unit)


def _unknown(raw: Mapping[str, Any], known: tuple[str, ...], where: str) -> list[str]:
    return [f"{where}unknown key {key!r}{_nearest(key, known)}" for key in raw if key not in known]


def _nearest(word: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    match = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
