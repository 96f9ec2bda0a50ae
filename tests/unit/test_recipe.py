"""Recipes: first match wins, mistakes are refused with the nearest known word."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from synthetic import nano_config
from zaya_convert import layout, recipe
from zaya_convert.cli.quantize import choose_recipe
from zaya_convert.errors import InputError, UsageError
from zaya_convert.layout import TensorKey
from zaya_convert.models import open_model
from zaya_convert.recipe import Budget, Rule
from zaya_convert.runtime.model import Model
from zaya_quant.methods import METHODS
from zaya_quant.spec import ALLOWED_BITS

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


# --- budgets

RULES = [{"match": "experts"}]


def test_a_budget_is_sizes_or_numbers() -> None:
    raw = {"rules": RULES, "budget": {"memory": "6GB", "context": 4096, "runtime": "0.5MiB"}}
    found = recipe.parse(raw, "test", "test.toml")
    assert found.budget == Budget(6_000_000_000, 4096, 1 << 19)
    assert "6,000,000,000 bytes of memory at a context of 4,096 tokens" in found.budget.text
    assert found.to_dict()["budget"] == {
        "memory": 6_000_000_000, "context": 4096, "runtime": 1 << 19,
    }  # fmt: skip
    assert parsed(*RULES).budget is None


def test_all_mistakes_of_a_budget_at_once() -> None:
    message = problems_of(
        {"rules": [{"match": "experts", "bits": 7}], "budget": {"memroy": "6GB", "context": "8 k"}}
    )
    for part in (
        "rule 1: bits is 7",
        "budget: unknown key 'memroy' (did you mean 'memory'?)",
        "budget: memory is missing",
        "budget: runtime is missing",
        "budget: context = '8 k' must be a number of tokens",
    ):
        assert part in message
    assert "context is missing" not in message


@pytest.mark.parametrize("value", ["", "6XB", "-6GB", "0", -1, 6.5, True, None, [6], {"GB": 6}])
def test_what_is_no_size_in_a_budget(value: object) -> None:
    budget = {"memory": value, "context": 4096, "runtime": 0}
    message = problems_of({"rules": RULES, "budget": budget})
    assert message.startswith("test.toml: budget: memory")
    assert "size like" in message


@pytest.mark.parametrize("budget", ["6GB", 6, [{"memory": "6GB"}], None])
def test_a_budget_is_a_table(budget: object) -> None:
    assert "budget must be a table" in problems_of({"rules": RULES, "budget": budget})


def test_states_of_a_small_model_by_hand() -> None:
    config = nano_config(windows=(0, 9, 0))  # 4 query heads and 2 of keys and values, of 32
    # Two layers keep all columns, the sliding one 9; 2 heads of 32 for keys and as many for values.
    columns = 2 * 100 + 9
    keys_values = columns * 2 * (2 * 32)
    # Each layer keeps, of 4 + 2 query and key heads of 32, the columns that two convolutions of two
    # taps look back on; and the half of the values that is delayed.
    own = 3 * ((4 + 2) * 32 * (1 + 1) + 32)
    budget = Budget(memory=100_000, context=100, runtime=7000)
    assert budget.states(config) == 2 * (keys_values + own) == 56_000
    assert budget.weights(config) == 100_000 - 7000 - 56_000
    short = replace(budget, context=5)  # shorter than the window
    assert short.states(config) == 2 * (3 * 5 * 128 + own)
    with pytest.raises(UsageError, match=r"takes 56,000 bytes.*nothing of 60,000.*lower `context`"):
        replace(budget, memory=60_000).weights(config)
    assert replace(budget, memory=63_001).weights(config) == 1


def test_states_are_those_that_the_runtime_keeps(nano_hybrid: Path) -> None:
    source = open_model(str(nano_hybrid))
    model = Model(source)
    cache = model.new_cache()
    model.forward(torch.arange(30)[None], cache=cache)
    kept = sum(t.numel() for state in (cache.conv, cache.delayed) for t in state if t is not None)
    for layer in cache.keys_values:
        assert layer.buffer is not None
        in_use = min(layer.end - layer.start, layer.window or layer.end)
        kept += layer.buffer[:, :, :, :in_use].numel()
    assert Budget(1, 30, 0).states(source.config) == 2 * kept


def test_shipped_budgets_leave_room_for_the_8b_model() -> None:
    from synthetic import preset_config

    budgets = {name: recipe.load(name).budget for name in recipe.shipped()}
    assert {name for name, budget in budgets.items() if budget} == {
        "edge-6gb", "edge-8gb", "edge-16gb",
    }  # fmt: skip
    for name, budget in budgets.items():
        if budget:
            assert recipe.parse_size(name.removeprefix("edge-")) == budget.memory
            assert f"{budget.context:,} tokens" in recipe.load(name).description
            # At least the 3 bits of the smallest grid, and the embedding in 16.
            assert budget.weights(preset_config("8b")) > 8.8e9 * 3.2 / 8


# --- as a file


def reread(found: recipe.Recipe) -> recipe.Recipe:
    return recipe.parse(tomllib.loads(recipe.to_toml(found)), found.name, "again.toml")


@pytest.mark.parametrize("name", recipe.shipped())
def test_a_written_recipe_reads_the_same_without_its_budget(name: str) -> None:
    found = recipe.load(name)
    assert reread(found) == replace(found, budget=None)


@given(
    st.text(),
    st.lists(
        st.builds(
            Rule,
            match=st.text(),
            bits=st.sampled_from(ALLOWED_BITS),
            group_size=st.sampled_from([-1, 16, 32, 128]),
            symmetric=st.booleans(),
            scale_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
            method=st.sampled_from(list(METHODS)),
            keep=st.booleans(),
        ),
        min_size=1,
    ),
)
def test_any_recipe_can_be_written_and_read(description: str, rules: list[Rule]) -> None:
    found = recipe.Recipe("any", description, tuple(rules))
    assert reread(found) == found
