"""Bits go where measured sensitivity asks for them, as near to the optimum as the theory says, and
the recipe that comes out means exactly what was chosen."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nano import Nano
from zaya_convert import allocate as module
from zaya_convert import recipe as recipes
from zaya_convert import sensitivity
from zaya_convert.allocate import GRIDS, Allocation, Option, allocate
from zaya_convert.calibrate import Settings, calibrate
from zaya_convert.checkpoint import Checkpoint
from zaya_convert.data import Sequences, digest_of, load_documents
from zaya_convert.errors import InputError, UsageError
from zaya_convert.layout import PART_BY_NAME
from zaya_convert.models import open_model
from zaya_convert.plan import make_plan
from zaya_convert.recipe import Recipe, Rule, load
from zaya_convert.runtime.attention import Batch, attend, project
from zaya_convert.runtime.model import residual
from zaya_convert.runtime.router import rms_norm, route
from zaya_convert.runtime.walk import SITES
from zaya_convert.runtime.weights import Weights
from zaya_convert.sensitivity import measure
from zaya_convert.stats import Stats
from zaya_quant.spec import BlockSpec, QuantSpec

pytestmark = pytest.mark.usefixtures("one_thread")

PACKING = "compressed-tensors"
SMALL: dict[str, Any] = {"layers": 3, "windows": (0, 9, 0), "experts": 6, "expert_width": 32}
MATRICES = ("expert", "attention")


# ---- the knapsack -------------------------------------------------------------------------------

SPEC = QuantSpec(4, 32)
raw_options = st.lists(
    st.builds(
        Option, st.just(SPEC), st.integers(1, 60), st.integers(0, 1000).map(lambda n: n / 64)
    ),
    min_size=1,
    max_size=5,
)


@given(raw_options)
def test_a_hull_is_convex_and_keeps_the_extremes(options: list[Option]) -> None:
    hull = module._hull(options)
    assert all(option in options for option in hull)
    smallest = min(option.bytes for option in options)
    assert hull[0].bytes == smallest
    assert hull[0].kl == min(o.kl for o in options if o.bytes == smallest)
    best = min(option.kl for option in options)
    assert hull[-1].kl == best
    assert hull[-1].bytes == min(o.bytes for o in options if o.kl == best)
    gains = [module._gain(a, b) for a, b in itertools.pairwise(hull)]
    assert all(gain > 0 for gain in gains)
    assert all(a > b for a, b in itertools.pairwise(gains))
    for option in options:  # nothing lies below it
        for a, b in itertools.pairwise(hull):
            if a.bytes <= option.bytes <= b.bytes:
                line = a.kl - module._gain(a, b) * (option.bytes - a.bytes)
                assert option.kl >= line - 1e-9


@settings(max_examples=60)
@given(st.lists(raw_options.map(module._hull), min_size=1, max_size=4), st.floats(0, 1))
def test_a_budget_is_spent_within_one_item_of_the_optimum(
    options: list[list[Option]], share: float
) -> None:
    least, most = (sum(own[i].bytes for own in options) for i in (0, -1))
    budget = least + int(share * (most - least))
    picked = module._fill(options, budget, 0)
    assert [p in own for p, own in zip(picked, options, strict=True)] == [True] * len(options)
    assert sum(p.bytes for p in picked) <= budget
    kl = sum(p.kl for p in picked)
    possible = [c for c in itertools.product(*options) if sum(o.bytes for o in c) <= budget]
    optimum = min(sum(o.kl for o in choice) for choice in possible)
    one_item = max((a.kl - b.kl for own in options for a, b in itertools.pairwise(own)), default=0)
    assert optimum - 1e-9 <= kl <= optimum + one_item + 1e-9
    if budget == most:
        assert picked == [own[-1] for own in options]


def test_targets_out_of_reach_name_what_is_in_reach() -> None:
    options = [[Option(SPEC, 10, 3.0), Option(SPEC, 20, 1.0)], [Option(SPEC, 30, 1.0)]]
    with pytest.raises(UsageError, match=r"target is 139 bytes; this recipe can reach 140 to 150"):
        module._fill(options, 39, 100)
    with pytest.raises(UsageError, match=r"target is 200 bytes; this recipe can reach 140 to 150"):
        module._fill(options, 100, 100)
    assert [o.bytes for o in module._fill(options, 40, 100)] == [10, 30]
    assert [o.bytes for o in module._fill(options, 51, 100)] == [20, 30]  # as near as it gets


# ---- whole models -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(nano: Nano) -> Checkpoint:
    return open_model(str(nano("hybrid", **SMALL)))


def ids_of(count: int, length: int, seed: int = 2) -> list[Tensor]:
    return list(torch.randint(96, (count, length), generator=torch.Generator().manual_seed(seed)))


@pytest.fixture(scope="module")
def stats(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    """Of few tokens, so that some experts have none."""
    ids = ids_of(4, 16)
    path = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    documents = Sequences(ids, "random ids", digest_of(ids))
    return calibrate(model, documents, Settings(64, 64, 4, sensitivity=True), path, threads=1)


@pytest.fixture(scope="module")
def bundled_stats(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    source = open_model(str(bundled))
    documents = load_documents(source, None, length=128, pack=True, tokens=512)
    path = tmp_path_factory.mktemp("stats") / "stats.safetensors"
    return calibrate(source, documents, Settings(512, 512, 16, sensitivity=True), path, threads=1)


def matrices(checkpoint: Checkpoint) -> list[Any]:
    return [i for i in checkpoint.infos.values() if PART_BY_NAME[i.key.part].role in MATRICES]


def middle(checkpoint: Checkpoint, recipe: Recipe) -> int:
    """A size halfway between all 3 and all 8 bits."""
    sizes = []
    for bits, group in ((3, -1), (8, 32)):
        changed = recipes.adjusted(recipe, group_size=group)
        rules = tuple(r if r.keep else replace(r, bits=bits) for r in changed.rules)
        sizes.append(make_plan(checkpoint, replace(recipe, rules=rules), PACKING).bytes)
    return sum(sizes) // 2


Picked = Callable[[], list[Option]]


@pytest.fixture
def picked(monkeypatch: pytest.MonkeyPatch) -> Picked:
    """What the knapsack chose last, matrix by matrix."""
    last: list[list[Option]] = []
    whole = module._fill

    def fill(options: list[list[Option]], budget: int, fixed: int) -> list[Option]:
        last.append(whole(options, budget, fixed))
        return last[-1]

    monkeypatch.setattr(module, "_fill", fill)
    return lambda: last[-1]


def check_means_what_was_chosen(
    checkpoint: Checkpoint, recipe: Recipe, found: Allocation, chosen: list[Option]
) -> None:
    """The allocated recipe quantizes what ``recipe`` does, on the chosen grids and no others."""
    specs = iter(option.spec for option in chosen)
    for info in checkpoint.infos.values():
        before, after = recipe.rule_for(info.key), found.recipe.rule_for(info.key)
        if before is None:
            assert after is None, info.key
            continue
        assert after is not None, info.key
        assert after.spec == next(specs), info.key
        assert after.method == before.method
    assert next(specs, None) is None
    plan = make_plan(checkpoint, found.recipe, PACKING)
    assert plan.bytes == found.bytes


@pytest.mark.parametrize("bits", [4.5, 6.0])
def test_a_target_is_met_within_one_percent(
    bits: float, bundled: Path, bundled_stats: Stats, picked: Picked
) -> None:
    source, recipe = open_model(str(bundled)), load("mixed")
    target = int(bits * source.weights / 8)
    found = allocate(source, recipe, PACKING, bundled_stats, target, threads=1)
    assert 0.99 * target <= found.bytes <= target
    check_means_what_was_chosen(source, recipe, found, picked())
    total = sum(sum(counts.values()) for counts in found.chosen.values())
    assert total == len(matrices(source))
    assert found.to_dict()["chosen"] == found.chosen
    assert len({option.spec for option in picked()}) > 3  # bits do differ
    # Nothing is left that would have fitted.
    assert found.predicted_kl == pytest.approx(sum(option.kl for option in picked()))


def test_more_room_costs_less_kl(model: Checkpoint, stats: Stats) -> None:
    recipe = recipes.adjusted(load("mixed"), group_size=32)
    middle_size = middle(model, recipe)
    found = [
        allocate(model, recipe, PACKING, stats, middle_size + step * 4000, threads=1)
        for step in (-6, -2, 2, 6)
    ]
    assert all(a.bytes < b.bytes for a, b in itertools.pairwise(found))
    assert all(a.predicted_kl > b.predicted_kl for a, b in itertools.pairwise(found))


def test_threads_change_nothing(model: Checkpoint, stats: Stats) -> None:
    recipe = recipes.adjusted(load("mixed"), group_size=32)
    one, two = (
        allocate(model, recipe, PACKING, stats, middle(model, recipe), threads=n) for n in (1, 2)
    )
    assert one == two


KEPT = Recipe(
    "kept",
    "",
    (
        Rule("model.layers.1.mlp.experts.*", keep=True),
        Rule("experts", 4, 32, method="rtn"),
        Rule("attention", 8, 32, method="gptq"),
    ),
)
PARTIAL = Recipe("partial", "", (Rule("*.down_proj", 4, 32), Rule("*.o_proj", 8, 32)))
ONE_ROLE = Recipe("one role", "", (Rule("experts", 4, 32),))
TWO_METHODS = Recipe(
    "two methods",
    "",
    (Rule("*.down_proj", 4, 32, method="rtn"), Rule("experts", 4, 32, method="gptq")),
)


@pytest.mark.parametrize(
    "recipe", [KEPT, PARTIAL, ONE_ROLE, TWO_METHODS], ids=lambda recipe: recipe.name
)
def test_the_recipe_means_what_was_chosen(
    recipe: Recipe, model: Checkpoint, stats: Stats, picked: Picked
) -> None:
    target = middle(model, recipe)
    found = allocate(model, recipe, PACKING, stats, target, threads=1)
    assert found.bytes <= target
    check_means_what_was_chosen(model, recipe, found, picked())


def test_a_saved_recipe_means_the_same(model: Checkpoint, stats: Stats, tmp_path: Path) -> None:
    recipe = recipes.adjusted(load("mixed"), group_size=32)
    found = allocate(model, recipe, PACKING, stats, middle(model, recipe), threads=1)
    (tmp_path / "mine.toml").write_text(recipes.to_toml(found.recipe), encoding="utf-8")
    assert load(str(tmp_path / "mine.toml")).rules == found.recipe.rules


def test_targets_out_of_reach(model: Checkpoint, stats: Stats) -> None:
    recipe = recipes.adjusted(load("mixed"), group_size=32)
    said = r"the target is {:,} bytes; this recipe can reach ([\d,]+) to ([\d,]+)"
    for target in (1000, 1 << 30):
        with pytest.raises(UsageError, match=said.format(target)) as caught:
            allocate(model, recipe, PACKING, stats, target, threads=1)
        found = re.search(said.format(target), str(caught.value))
        assert found is not None
        least, most = (int(group.replace(",", "")) for group in found.groups())
        for reachable in (least, most):
            made = allocate(model, recipe, PACKING, stats, reachable, threads=1)
            assert made.bytes == reachable
    # A ceiling may be higher than anything.
    made = allocate(model, recipe, PACKING, stats, 1 << 30, ceiling=True, threads=1)
    assert made.bytes == most
    with pytest.raises(UsageError, match=said.format(1000)):
        allocate(model, recipe, PACKING, stats, 1000, ceiling=True, threads=1)


def test_statistics_must_fit_and_hold_sensitivities(
    nano: Nano, model: Checkpoint, stats: Stats
) -> None:
    recipe = load("mixed")
    plain = {n: a for n, a in stats.arrays.items() if not n.endswith(".sensitivity")}
    with pytest.raises(InputError, match="calibrate with --sensitivity"):
        allocate(model, recipe, PACKING, replace(stats, arrays=plain), 1, threads=1)
    other = open_model(str(nano("hybrid", seed=1, **SMALL)))
    with pytest.raises(InputError, match="another model"):
        allocate(other, recipe, PACKING, stats, 1, threads=1)


# ---- what a grid is predicted to cost -----------------------------------------------------------


def test_finer_grids_cost_less(bundled: Path, bundled_stats: Stats) -> None:
    source = open_model(str(bundled))
    total = torch.zeros(len(GRIDS), dtype=torch.float64)
    by_bits = [GRIDS.index(QuantSpec(bits, 32)) for bits in (3, 4, 5, 6, 8)]
    for info in matrices(source)[::7]:
        costs = torch.tensor(module._costs(source, bundled_stats, info, GRIDS)).double()
        total += costs
        if costs.any():
            assert bool((costs[by_bits].diff() < 0).all()), info.key
            assert bool((costs > 0).all())
    affine = [i for i, spec in enumerate(GRIDS) if isinstance(spec, QuantSpec)]
    supers = [GRIDS.index(BlockSpec(name)) for name in ("Q3_K", "Q4_K", "Q5_K", "Q6_K")]
    for grids in (affine, supers):  # each from the coarsest to the finest
        assert bool((total[grids].diff() < 0).all())


def test_a_matrix_that_nothing_reaches_costs_nothing(model: Checkpoint, stats: Stats) -> None:
    layer, expert = (stats.counts[:, :-1] == 0).nonzero()[0].tolist()
    (info,) = (
        i
        for i in matrices(model)
        if (i.key.layer, i.key.expert) == (layer, expert) and "up_proj" in i.key.part
    )
    assert module._costs(model, stats, info, GRIDS) == [0.0] * len(GRIDS)


# ---- sensitivity --------------------------------------------------------------------------------


def directly(checkpoint: Checkpoint, sequences: list[Tensor], seed: int) -> dict[str, Tensor]:
    """The same figures from one graph over all layers, with labels drawn in the same way."""
    config, weights = checkpoint.config, Weights(checkpoint, torch.float32, torch.float32, True)
    outputs: dict[str, list[tuple[int, Tensor]]] = {}

    def keep(name: str, expert: int, y: Tensor) -> Tensor:
        y.retain_grad()
        outputs.setdefault(name, []).append((expert, y))
        return y

    def logits_of(ids: Tensor) -> Tensor:
        bias = weights.vector("input_hidden_states_bias")
        scale = weights.vector("input_hidden_states_scale")
        assert bias is not None
        assert scale is not None
        x = ((weights.embed(ids) + bias) * scale).requires_grad_()
        state = None
        for layer in range(config.layers):
            parts = weights.layer(layer)
            names = {id(parts[n]): n for site in ("qkv_proj", "o_proj") for n in SITES[site]}

            def linear(x: Tensor, w: Tensor, b: Tensor | None = None, layer: int = layer,
                       names: dict[int, str] = names) -> Tensor:  # fmt: skip
                y = F.linear(x, w, b)
                name = names.get(id(w))
                return y if name is None else keep(f"layers.{layer}.{name}", -1, y)

            batch = Batch(config, (1, len(ids)), torch.float32, torch.float32)
            h = rms_norm(x, parts["input_layernorm.weight"], config.eps)
            mixed = attend(h[None], parts, layer, batch, linear)[1][0]
            update = project(mixed, parts, "self_attn.o_proj", linear)
            x = residual(x, update, parts, "post_attention_residual_scale")
            h = rms_norm(x, parts["post_attention_layernorm.weight"], config.eps)
            routing = route(h, parts, state, config.eps, F.linear)
            state = routing.state
            out = []
            for row, expert in enumerate(routing.choice.tolist()):
                if expert == config.experts:
                    out.append(torch.zeros_like(h[row]))
                    continue
                gate, up, down = (w for w in weights.expert(layer, expert) if isinstance(w, Tensor))
                prefix = f"layers.{layer}.mlp.experts."
                a = keep(f"{prefix}gate_proj.weight", expert, F.linear(h[row], gate))
                b = keep(f"{prefix}up_proj.weight", expert, F.linear(h[row], up))
                y = keep(f"{prefix}down_proj.weight", expert, F.linear(F.silu(a) * b, down))
                out.append(y * routing.weight[row])
            x = residual(x, torch.stack(out), parts, "post_mlp_residual_scale")
        norm, head_bias = weights.vector("norm.weight"), weights.vector("lm_head.bias")
        assert norm is not None
        head = torch.cat([block for _, block in weights.head_blocks()])
        return F.linear(rms_norm(x, norm, config.eps), head, head_bias)

    logits = torch.cat([logits_of(ids) for ids in sequences])
    draw = torch.Generator().manual_seed(seed)
    p = torch.softmax(logits.detach(), dim=1)
    labels = [
        torch.multinomial(part, 1, generator=draw) for part in p.split(sensitivity._HEAD_ROWS)
    ]
    torch.log_softmax(logits, dim=1).gather(1, torch.cat(labels)).sum().neg().backward()
    found: dict[str, Tensor] = {}
    for name, kept in outputs.items():
        for expert, y in kept:
            assert y.grad is not None
            energy = y.grad.double().flatten(0, -2) if y.ndim > 1 else y.grad.double()[None]
            shape = (y.shape[-1],) if expert < 0 else (config.experts, y.shape[-1])
            total = found.setdefault(f"{name}.sensitivity", torch.zeros(shape, dtype=torch.float64))
            (total if expert < 0 else total[expert]).add_(energy.square().sum(0))
    return {name: value / len(logits) for name, value in found.items()}


@pytest.mark.parametrize(
    "changes", [{}, {"attention_bias": True, "tied": False, "lm_head_bias": True}], ids=str
)
def test_sensitivity_is_the_mean_squared_gradient(
    nano: Nano, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    model = open_model(str(nano("hybrid", **SMALL, **changes)))
    sequences = [*ids_of(3, 24), torch.tensor([5, 6])]  # more than one chunk of the head
    expected = directly(model, sequences, seed=4)
    kept = measure(model, sequences, seed=4)
    # Streams are kept in bf16, which is most of the difference.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    exact = measure(model, sequences, seed=4)
    assert kept.keys() == exact.keys() == expected.keys()
    assert len(expected) == SMALL["layers"] * 8
    for name, value in expected.items():
        assert exact[name].shape == value.shape
        assert float((exact[name] - value).abs().max() / value.max()) < 1e-3, name
        assert float((kept[name] - value).abs().max() / value.max()) < 0.1, name
        if value.ndim == 2:
            assert torch.equal(exact[name] == 0, value == 0), name  # experts without tokens
    assert any(bool((v == 0).all(dim=-1).any()) for v in expected.values() if v.ndim == 2)


def test_sensitivity_does_not_depend_on_threads(model: Checkpoint) -> None:
    sequences = ids_of(4, 16)
    one, two = (measure(model, sequences, threads=n) for n in (1, 2))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = measure(model, sequences, seed=1)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_sensitivity_looks_at_the_first_tokens(
    model: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "TOKENS", 40)
    long, short = ids_of(4, 16), [*ids_of(4, 16)[:2], ids_of(4, 16)[2][:8]]
    found = [measure(model, ids) for ids in (long, short)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_statistics_hold_the_sensitivities(model: Checkpoint, stats: Stats) -> None:
    assert stats.has_sensitivity
    expected = measure(model, stats.sequences)
    for info in matrices(model):
        own = stats.sensitivity(info.key)
        whole = expected[f"layers.{info.key.layer}.{info.key.part}.sensitivity"]
        assert torch.equal(own, whole if info.key.expert < 0 else whole[info.key.expert])
        assert own.shape == info.shape[:1]
