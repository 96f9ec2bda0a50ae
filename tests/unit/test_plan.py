"""A plan says exactly what will be written, or every reason why not."""

import shutil
from pathlib import Path

import pytest

from nano import Nano
from rounding import nearest
from zaya_convert.errors import InputError, UsageError
from zaya_convert.layout import PART_BY_NAME
from zaya_convert.models import open_model
from zaya_convert.plan import make_plan
from zaya_convert.recipe import Recipe, Rule, for_bits, load, shipped
from zaya_quant.spec import QuantSpec


def _recipe(*rules: Rule) -> Recipe:
    return Recipe("test", "", rules)


def test_bits_per_weight_counts_everything(nano_hybrid: Path) -> None:
    source = open_model(str(nano_hybrid))
    plan = make_plan(source, _recipe(Rule("experts", 4, 32)), "auto-round")
    expected = 0
    for info in source.infos.values():
        if info.key.expert >= 0:
            rows, columns = info.shape
            # codes, fp16 scales, packed zero points of 4 bits
            expected += rows * columns // 2 + rows * columns // 32 * 2 + columns // 32 * rows // 2
        else:
            expected += info.bytes
    assert plan.bytes == expected
    assert plan.bits_per_weight == pytest.approx(
        8 * expected / sum(i.numel for i in source.infos.values())
    )


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_never_touch_the_float_set(name: str, nano_hybrid: Path) -> None:
    recipe = load(name)
    assert recipe.description
    for info in open_model(str(nano_hybrid)).infos.values():
        if PART_BY_NAME[info.key.part].role == "float":
            assert recipe.rule_for(info.key) is None
        elif info.key.expert >= 0:
            assert recipe.rule_for(info.key) is not None


def test_a_glob_cannot_reach_the_router(nano_hybrid: Path) -> None:
    source = open_model(str(nano_hybrid))
    plan = make_plan(source, _recipe(Rule("*.layers.*", 8, 32)), "compressed-tensors")
    touched = {step.key.part for step in plan.steps if step.spec}
    assert touched
    assert all(PART_BY_NAME[part].role != "float" for part in touched)


def test_first_match_wins(nano_hybrid: Path) -> None:
    source = open_model(str(nano_hybrid))
    one = Rule("model.layers.0.mlp.experts.1.down_proj", 8, 32)
    plan = make_plan(source, _recipe(one, Rule("experts", 4, 32)), "compressed-tensors")
    specs = {str(step.key): step.spec for step in plan.steps}
    assert specs["model.layers.0.mlp.experts.1.down_proj.weight"] == QuantSpec(8, 32)
    assert specs["model.layers.0.mlp.experts.1.up_proj.weight"] == QuantSpec(4, 32)
    keep = make_plan(
        source,
        _recipe(Rule("model.layers.0.*", keep=True), Rule("experts", 4, 32)),
        "compressed-tensors",
    )
    assert all(step.spec is None for step in keep.steps if step.key.layer == 0)


def test_all_problems_together(nano: Nano) -> None:
    source = open_model(str(nano("hybrid", hidden=96)))
    recipe = _recipe(
        Rule("experts", 4, 64), Rule("attention", 8, 32, False), Rule("embedding", 8, 32)
    )
    with pytest.raises(InputError) as caught:
        make_plan(source, recipe, "compressed-tensors")
    text = "\n".join(caught.value.problems)
    assert "group size 64 does not divide its 96 inputs" in text
    assert "asymmetric" in text
    assert "embedding" in text


def test_unknown_method_is_named(nano_hybrid: Path) -> None:
    rule = Rule("experts", 4, 32, method="magic")
    with pytest.raises(InputError, match="no method 'magic'"):
        make_plan(open_model(str(nano_hybrid)), _recipe(rule), "compressed-tensors")


def test_damaged_side_files_are_not_copied_along(nano_hybrid: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(nano_hybrid, tmp_path / "damaged"))
    (folder / "tokenizer.json").write_text('{"version": "1.0", "added')
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(InputError) as found:
        make_plan(open_model(str(folder)), load("int8"), "compressed-tensors")
    assert "tokenizer.json: not valid JSON" in found.value.problems[0]
    assert found.value.problems[1] == "generation_config.json: expected a JSON object"


def test_quantizing_twice_is_refused(nano_hybrid: Path, tmp_path: Path) -> None:
    from zaya_convert.convert import execute

    execute(
        make_plan(open_model(str(nano_hybrid)), nearest(4), "compressed-tensors"), tmp_path / "a"
    )
    with pytest.raises(UsageError, match="quantized already"):
        make_plan(open_model(str(tmp_path / "a")), for_bits(8), "compressed-tensors")


def test_fingerprint_changes_with_what_matters(nano_hybrid: Path) -> None:
    source = open_model(str(nano_hybrid))
    prints = {
        make_plan(source, for_bits(bits), packing, shard).fingerprint()
        for bits in (4, 8)
        for packing in ("compressed-tensors", "auto-round")
        for shard in (10**6, 10**9)
    }
    assert len(prints) == 8
    again = make_plan(open_model(str(nano_hybrid)), for_bits(4), "compressed-tensors", 10**6)
    assert again.fingerprint() in prints
