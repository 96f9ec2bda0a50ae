"""Recipes: first match wins, mistakes are refused with the nearest known word."""

from pathlib import Path

import pytest

from zaya_convert import layout, recipe
from zaya_convert.cli.quantize import choose_recipe
from zaya_convert.errors import InputError, UsageError
from zaya_convert.layout import TensorKey

EXPERT = TensorKey(1, "mlp.experts.gate_proj.weight", 3)
ATTENTION = TensorKey(0, "self_attn.o_proj.weight")
EMBEDDING = TensorKey(-1, "embed_tokens.weight")


def parsed(*rules: dict[str, object]) -> recipe.Recipe:
    return recipe.parse({"rules": list(rules)}, "test", "test.toml")


def problems_of(raw: dict[str, object]) -> str:
    with pytest.raises(InputError) as caught:
        recipe.parse(raw, "test", "test.toml")
    return str(caught.value)


def test_first_match_wins() -> None:
    found = parsed(
        {"match": "model.layers.1.mlp.experts.3.*", "bits": 8},
        {"match": "experts", "bits": 4},
    )
    assert found.rule_for(EXPERT).bits == 8  # type: ignore[union-attr]
    assert found.rule_for(TensorKey(1, EXPERT.part, 2)).bits == 4  # type: ignore[union-attr]


def test_what_no_rule_matches_or_keeps_stays_float() -> None:
    found = parsed({"match": "*o_proj", "keep": True}, {"match": "attention", "bits": 8})
    assert found.rule_for(ATTENTION) is None
    assert found.rule_for(EXPERT) is None
    assert found.rule_for(TensorKey(0, "self_attn.qkv_proj.q_proj.weight")) is not None


@pytest.mark.parametrize("match", ["*", "*.*", "*.weight"])
def test_the_float_set_can_never_be_matched(match: str) -> None:
    found = parsed({"match": match})
    for part in layout.PARTS:
        key = TensorKey(-1 if part.scope == "model" else 1, part.name,
                        0 if part.scope == "expert" else -1)  # fmt: skip
        assert (found.rule_for(key) is None) == (part.role == "float")


def test_roles() -> None:
    for match, key in (("experts", EXPERT), ("attention", ATTENTION), ("embedding", EMBEDDING)):
        found = parsed({"match": match})
        assert [found.rule_for(k) is not None for k in (EXPERT, ATTENTION, EMBEDDING)] == [
            key is k for k in (EXPERT, ATTENTION, EMBEDDING)
        ]


def test_all_mistakes_at_once_each_with_the_nearest_word() -> None:
    message = problems_of(
        {
            "descripton": "",
            "rules": [
                {"match": "experts", "bist": 4},
                {"match": "experts", "group_size": "32"},
                {"bits": 4},
                {"match": "experts", "bits": 7},
                {"match": "experts", "bits": True},
                "experts",
            ],
        }
    )
    for part in (
        "unknown key 'descripton' (did you mean 'description'?)",
        "rule 1: unknown key 'bist' (did you mean 'bits'?)",
        "rule 2: group_size = '32' must be of type int",
        "rule 3: match is missing",
        "rule 4: bits is 7",
        "rule 5: bits = True must be of type int",
        "rule 6: must be a table",
    ):
        assert part in message


@pytest.mark.parametrize("raw", [{}, {"rules": []}, {"rules": {}}])
def test_a_recipe_needs_rules(raw: dict[str, object]) -> None:
    assert "at least one [[rules]]" in problems_of(raw)


@pytest.mark.parametrize("text", [b"rules = [", b"\xff\xfe", b"a = 1\na = 2"])
def test_not_toml(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "bad.toml").write_bytes(text)
    with pytest.raises(InputError, match=r"bad\.toml: not valid TOML"):
        recipe.load(str(tmp_path / "bad.toml"))


def test_shipped_recipes_load_and_say_whom_they_serve() -> None:
    assert {"int4", "int8"} <= set(recipe.shipped())
    for name, path in recipe.shipped().items():
        assert recipe.load(name).description
        assert path.read_text().startswith("# For ")


def test_the_nearest_recipe_is_offered() -> None:
    with pytest.raises(UsageError, match="did you mean 'int4-small'"):
        recipe.load("int4-smal")


def test_flags_overrule_a_recipe() -> None:
    changed = choose_recipe("int4", 3, 64, None)
    assert [(rule.bits, rule.group_size) for rule in changed.rules] == [(3, 64), (8, 64)]
    assert choose_recipe(None, None, None, None) == recipe.load("int4")
    assert choose_recipe(None, 8, None, None) == recipe.load("int8")
    assert choose_recipe(None, 4, -1, "rtn").rules[1].group_size == -1


def test_flags_leave_kept_tensors_alone() -> None:
    kept = parsed({"match": "experts", "keep": True}, {"match": "attention"})
    changed = recipe.adjusted(kept, bits=8, group_size=128)
    assert changed.rules[0] == kept.rules[0]
    assert changed.rules[1].group_size == 128


@pytest.mark.parametrize(
    ("match", "changed"),
    [
        ("experts", True),
        ("model.layers.0.mlp.experts.*", True),
        ("*gate_proj", True),
        ("model.layers.3?.mlp.*", True),
        ("*.7.down_proj.weight", True),
        ("*", True),
        ("attention", False),
        ("embedding", False),
        ("*o_proj", False),
        ("model.layers.*.self_attn.*", False),
    ],
)
def test_bits_are_those_of_rules_that_speak_of_experts(match: str, changed: bool) -> None:
    (rule,) = recipe.adjusted(parsed({"match": match, "bits": 8}), bits=3).rules
    assert rule.bits == (3 if changed else 8)


def test_rules_that_match_nothing_are_named_with_the_nearest_role() -> None:
    found = parsed(
        {"match": "experts"},
        {"match": "atention"},
        {"match": "model.layers.1.mlp.experts.3.*"},  # shadowed by rule 1, which is no mistake
        {"match": "model.layers.99.*"},
        {"match": "*mlp.gate*", "keep": True},  # the router path is never quantized anyway
    )
    router = TensorKey(0, "mlp.gate.down_proj.weight")
    assert recipe.unmatched(found, [EXPERT, ATTENTION, EMBEDDING, router]) == [
        "rule 2: match 'atention' matches no tensor (did you mean 'attention'?)",
        "rule 4: match 'model.layers.99.*' matches no tensor",
        "rule 5: match '*mlp.gate*' matches no tensor",
    ]


@pytest.mark.parametrize("name", recipe.shipped())
def test_shipped_recipes_match_a_model(name: str) -> None:
    model = layout.keys(2, 4, frozenset())
    assert recipe.unmatched(recipe.load(name), model) == []
