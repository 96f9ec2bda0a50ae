"""Calibration counts what the runtime routes, survives interruption, and spends further tokens
where experts starve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nano import Nano
from rounding import nearest
from synthetic import nano_config, synthetic_tensor, write_checkpoint
from zaya_convert import calibrate as module
from zaya_convert import stats as files
from zaya_convert.calibrate import Settings, calibrate, coverage
from zaya_convert.checkpoint import Checkpoint
from zaya_convert.convert import execute
from zaya_convert.data import Sequences, digest_of
from zaya_convert.errors import InputError, OutputExistsError
from zaya_convert.layout import TensorKey
from zaya_convert.models import open_model
from zaya_convert.plan import make_plan
from zaya_convert.runtime.model import Model
from zaya_convert.runtime.walk import SITES, Walk
from zaya_convert.stats import Stats

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"layers": 3, "windows": (0, 9, 0), "experts": 6, "expert_width": 32}
LAYERS, EXPERTS, VOCABULARY = 3, 6, 96
# Two rounds on ``documents``, the second with whatever is left.
SETTINGS = Settings(tokens=48, max_tokens=200, min_tokens=20)


class Stop(Exception):
    """What interrupts a run in these tests."""


@pytest.fixture(scope="module")
def model(nano: Nano) -> Checkpoint:
    return open_model(str(nano("hybrid", **SMALL)))


def sequences(ids: list[Tensor]) -> Sequences:
    return Sequences(ids, "test", digest_of(ids))


@pytest.fixture(scope="module")
def documents() -> Sequences:
    draw = torch.Generator().manual_seed(5)
    lengths = (16, 31, 2, 25, 12, 40)
    return sequences([torch.randint(VOCABULARY, (n,), generator=draw) for n in lengths])


@pytest.fixture(scope="module")
def straight(
    model: Checkpoint, documents: Sequences, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The file of a run that nothing disturbed."""
    path = tmp_path_factory.mktemp("straight") / "stats.safetensors"
    found = calibrate(model, documents, SETTINGS, path, threads=1)
    assert found.facts["rounds"] == 2
    return path


# ---- what is counted ----------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "tied": False}], ids=str)
def test_figures_are_those_of_the_runtime(
    nano: Nano, documents: Sequences, tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = open_model(str(nano("hybrid", **SMALL, **changes)))
    stats = calibrate(model, documents, SETTINGS, tmp_path / "s", threads=1)
    rows: dict[tuple[int, str, int], list[Tensor]] = {}

    def observe(layer: int, site: str, seen: Tensor, expert: int) -> None:
        rows.setdefault((layer, site, expert), []).append(seen.double())

    found = Model(model, exact=False).evaluate(stats.sequences, observer=observe)
    assert stats.counts.sum(dim=1).tolist() == [stats.tokens] * LAYERS
    for layer in range(LAYERS):
        expected = torch.bincount(found.routes[layer], minlength=EXPERTS + 1)
        assert torch.equal(stats.counts[layer], expected)
        for site in SITES:
            experts = range(EXPERTS) if site in ("gate_up_proj", "down_proj") else [-1]
            for expert in experts:
                moments = stats.arrays[f"layers.{layer}.{site}.second_moment"]
                absmax = stats.arrays[f"layers.{layer}.{site}.absmax"]
                if expert >= 0:
                    moments, absmax = moments[expert], absmax[expert]
                seen = rows.get((layer, site, expert))
                if seen is None:
                    assert not moments.any()
                    assert not absmax.any()
                    continue
                x = torch.cat(seen)
                # Who sees a skipped token would have more rows than the router gave it.
                wanted = stats.tokens if expert < 0 else int(expected[expert])
                assert len(x) == wanted
                for figure, plain in ((moments, x.square().mean(0)), (absmax, x.abs().amax(0))):
                    error = (figure.double() - plain).abs().max()
                    assert float(error / plain.max()) < 1e-5
    assert int(stats.counts[:, -1].sum()) > 0
    assert bool((stats.counts[:, :-1] == 0).any())  # both branches above were taken


def test_the_file_says_what_it_is(straight: Path, documents: Sequences) -> None:
    stats = files.read(straight)
    assert stats.tokens == documents.tokens
    assert digest_of(stats.sequences) == stats.facts["tokens_digest"]
    assert stats.facts["data"] == documents.digest
    assert stats.facts["not_finite"] == 0
    assert stats.min_tokens == 20
    assert not stats.has_sensitivity
    # The beginning of the data comes first, in order. (The 48th would have been a sequence alone.)
    begin = torch.cat(documents.ids)[:47]
    assert torch.equal(stats.arrays["tokens.ids"][:47].long(), begin)
    below = {(layer, e) for layer, e, _ in stats.below()}
    starved = (stats.counts[:, :-1] < 20).nonzero().tolist()
    assert below == {tuple(entry) for entry in starved}
    table = coverage(stats)
    assert table["counts"] == stats.counts.tolist()
    assert table["least"] == int(stats.counts[:, :-1].min())
    assert len(table["below_minimum"]) == len(below)
    assert table["skip_rate"] == float(stats.counts[:, -1].sum() / stats.counts.sum())


def test_reading_gives_back_what_was_written(straight: Path, tmp_path: Path) -> None:
    stats = files.read(straight)
    again = stats.write(tmp_path / "again")
    assert again.digest == stats.digest
    assert (tmp_path / "again").read_bytes() == straight.read_bytes()
    assert len({stats.serialise() for _ in range(8)}) == 1


def test_an_expert_with_few_tokens_leans_on_its_layer(straight: Path) -> None:
    stats = files.read(straight)
    part = "mlp.experts.down_proj.weight"
    layer = next(i for i in range(LAYERS) if 0 in stats.counts[i, :-1])
    counts = stats.counts[layer, :-1]
    own = stats.arrays[f"layers.{layer}.down_proj.second_moment"].double()
    pooled = (own * counts[:, None]).sum(0) / counts.sum()
    for expert, count in enumerate(counts.tolist()):
        known = stats.of(layer, part, expert)
        if count == 0:
            assert known is None
            continue
        assert known is not None
        assert known.count == count
        share = min(count / 20, 1.0)
        expected = share * own[expert] + (1 - share) * pooled
        torch.testing.assert_close(known.second_moment.double(), expected, rtol=1e-5, atol=0)
    attention = stats.of(layer, "self_attn.o_proj.weight", -1)
    assert attention is not None
    assert attention.count == stats.tokens


# ---- the same bytes -----------------------------------------------------------------------------


def test_same_bytes_on_two_threads(
    model: Checkpoint, documents: Sequences, straight: Path, tmp_path: Path
) -> None:
    calibrate(model, documents, SETTINGS, tmp_path / "s", threads=2)
    assert (tmp_path / "s").read_bytes() == straight.read_bytes()


def test_same_bytes_from_the_other_layout(
    nano: Nano, documents: Sequences, straight: Path, tmp_path: Path
) -> None:
    legacy = open_model(str(nano("legacy", **SMALL)))
    calibrate(legacy, documents, SETTINGS, tmp_path / "s", threads=1)
    assert (tmp_path / "s").read_bytes() == straight.read_bytes()
    files.read(straight).check_fits(legacy)


def test_same_bytes_with_streams_on_disk(
    model: Checkpoint, documents: Sequences, straight: Path, tmp_path: Path
) -> None:
    calibrate(model, documents, SETTINGS, tmp_path / "s", threads=1, max_memory=1)
    assert (tmp_path / "s").read_bytes() == straight.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


# ---- interruption -------------------------------------------------------------------------------

Break = Callable[[pytest.MonkeyPatch, int], None]


def while_visiting(patch: pytest.MonkeyPatch, number: int) -> None:
    """In the middle of the layer."""
    whole, begun = module._Collector.visit, 0

    def visit(collector: Any, site: Any, *rest: Any) -> Any:
        nonlocal begun
        begun += site.name == "qkv_proj"
        if begun > number and (site.name, site.expert) == ("down_proj", 2):
            raise Stop
        return whole(collector, site, *rest)

    patch.setattr(module._Collector, "visit", visit)


def while_saving(patch: pytest.MonkeyPatch, number: int) -> None:
    """With the layer's figures on disk, but not the state after it."""
    whole, saved = Walk.save, 0

    def save(walk: Walk, folder: Path) -> None:
        nonlocal saved
        saved += 1
        if saved > number:
            raise Stop
        whole(walk, folder)

    patch.setattr(Walk, "save", save)


def run_until(
    model: Checkpoint, documents: Sequences, path: Path, layers: int, settings: Settings = SETTINGS
) -> None:
    """Stop after this many layers, rounds one after the other."""
    done = 0

    def progress(what: str, layer: int, of: int) -> None:
        nonlocal done
        done += 1
        if done == layers:
            raise Stop

    with pytest.raises(Stop):
        calibrate(model, documents, settings, path, threads=1, progress=progress)


def steps_of(patch: pytest.MonkeyPatch) -> list[int]:
    """The layers that are run from now on."""
    whole, layers = Walk.step, []

    def step(walk: Walk, visitor: Any) -> None:
        layers.append(walk.layer)
        whole(walk, visitor)

    patch.setattr(Walk, "step", step)
    return layers


@pytest.mark.parametrize("layers", range(1, 2 * LAYERS + 1))
def test_resuming_after_any_layer(
    layers: int,
    model: Checkpoint,
    documents: Sequences,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_until(model, documents, tmp_path / "s", layers)
    assert not (tmp_path / "s").exists()
    ran = steps_of(monkeypatch)
    calibrate(model, documents, SETTINGS, tmp_path / "s", threads=1, resume=True)
    assert (tmp_path / "s").read_bytes() == straight.read_bytes()
    assert len(ran) == 2 * LAYERS - layers  # nothing is run twice
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize(
    ("fail", "number"),
    [*((while_visiting, n) for n in (0, 5)), *((while_saving, n) for n in (1, 2))],
)
def test_resuming_inside_a_layer(
    fail: Break,
    number: int,
    model: Checkpoint,
    documents: Sequences,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        fail(patch, number)
        with pytest.raises(Stop):
            calibrate(model, documents, SETTINGS, tmp_path / "s", threads=1)
    calibrate(model, documents, SETTINGS, tmp_path / "s", threads=1, resume=True)
    assert (tmp_path / "s").read_bytes() == straight.read_bytes()


def test_the_state_of_another_round_is_not_continued(
    nano: Nano, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds of as many tokens, killed at the end of the first and early in the second."""
    model = open_model(str(nano("hybrid", layers=2, windows=(0, 0), experts=6, expert_width=32)))
    draw = torch.Generator().manual_seed(6)
    documents = sequences(list(torch.randint(VOCABULARY, (2, 24), generator=draw)))
    settings = Settings(tokens=24, max_tokens=48, min_tokens=20)
    plain = calibrate(model, documents, settings, tmp_path / "plain", threads=1)
    assert plain.facts["rounds"] == 2
    run_until(model, documents, tmp_path / "s", 2, settings)
    with monkeypatch.context() as patch:
        while_saving(patch, 0)
        with pytest.raises(Stop):
            calibrate(model, documents, settings, tmp_path / "s", threads=1, resume=True)
    calibrate(model, documents, settings, tmp_path / "s", threads=1, resume=True)
    assert (tmp_path / "s").read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("keep", [0, 100])
def test_a_torn_layer_is_run_again(
    keep: int, model: Checkpoint, documents: Sequences, straight: Path, tmp_path: Path
) -> None:
    run_until(model, documents, tmp_path / "s", 2)
    torn = tmp_path / ".s.partial" / "round-1-layer-1.safetensors"
    torn.write_bytes(torn.read_bytes()[:keep])
    calibrate(model, documents, SETTINGS, tmp_path / "s", threads=1, resume=True)
    assert (tmp_path / "s").read_bytes() == straight.read_bytes()


@pytest.mark.parametrize("changed", ["settings", "data", "model"])
def test_resuming_something_else_is_refused(
    changed: str, nano: Nano, model: Checkpoint, documents: Sequences, tmp_path: Path
) -> None:
    run_until(model, documents, tmp_path / "s", 2)
    before = {path.name for path in (tmp_path / ".s.partial").iterdir()}
    other: tuple[Checkpoint, Sequences, Settings] = {
        "settings": (model, documents, replace(SETTINGS, min_tokens=3)),
        "data": (model, sequences(documents.ids[1:]), SETTINGS),
        "model": (open_model(str(nano("hybrid", seed=1, **SMALL))), documents, SETTINGS),
    }[changed]
    with pytest.raises(InputError, match="without --resume to start over") as caught:
        calibrate(*other, tmp_path / "s", threads=1, resume=True)
    assert caught.value.exit_code == 3
    assert {path.name for path in (tmp_path / ".s.partial").iterdir()} == before
    assert not (tmp_path / "s").exists()


def test_without_resume_it_starts_over(
    model: Checkpoint,
    documents: Sequences,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_until(model, documents, tmp_path / "s", 2, replace(SETTINGS, min_tokens=3))
    ran = steps_of(monkeypatch)
    calibrate(model, documents, SETTINGS, tmp_path / "s", threads=1)
    assert ran == [*range(LAYERS), *range(LAYERS)]
    assert (tmp_path / "s").read_bytes() == straight.read_bytes()


def test_resuming_nothing_begins(
    model: Checkpoint, documents: Sequences, straight: Path, tmp_path: Path
) -> None:
    calibrate(model, documents, SETTINGS, tmp_path / "s", threads=1, resume=True)
    assert (tmp_path / "s").read_bytes() == straight.read_bytes()


def test_two_runs_do_not_share_an_output(
    model: Checkpoint, documents: Sequences, tmp_path: Path
) -> None:
    def progress(what: str, layer: int, of: int) -> None:
        with pytest.raises(OutputExistsError, match="another process"):
            calibrate(model, documents, SETTINGS, tmp_path / "s", threads=1)
        raise Stop

    with pytest.raises(Stop):
        calibrate(model, documents, SETTINGS, tmp_path / "s", threads=1, progress=progress)


# ---- rounds -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shallow(nano: Nano) -> Checkpoint:
    """One layer, whose routing follows the token closely."""
    return open_model(str(nano("hybrid", layers=1, windows=(0,), experts=6, expert_width=32)))


@pytest.fixture(scope="module")
def homes(shallow: Checkpoint) -> dict[int, list[int]]:
    """For each expert, the ids that reach it when they are repeated."""
    ids = [torch.full((8,), token) for token in range(VOCABULARY)]
    routes = Model(shallow, exact=False).evaluate(ids).routes[0].view(VOCABULARY, 8)
    found: dict[int, list[int]] = {}
    for token, row in enumerate(routes.tolist()):
        if len(set(row)) == 1:
            found.setdefault(row[0], []).append(token)
    return found


def repeated(token: int, times: int) -> Tensor:
    return torch.full((times,), token)


def common_and_rare(homes: dict[int, list[int]]) -> tuple[int, int, int]:
    """The best-served expert, another one, and an id that reaches that."""
    by_size = sorted((e for e in homes if e < EXPERTS), key=lambda e: -len(homes[e]))
    return by_size[0], by_size[-1], homes[by_size[-1]][0]


def test_starved_experts_are_served_first(
    shallow: Checkpoint, homes: dict[int, list[int]], tmp_path: Path
) -> None:
    common, rare, token = common_and_rare(homes)
    begin = [repeated(homes[common][0], 32), repeated(token, 4)]
    filler = [repeated(homes[common][0], 16) for _ in range(20)]
    wanted = [repeated(token, 16)]
    documents = sequences(begin + filler + wanted + filler)
    settings = Settings(tokens=36, max_tokens=36 + 16, min_tokens=12)
    stats = calibrate(shallow, documents, settings, tmp_path / "s", threads=1)
    assert stats.facts["rounds"] == 2
    assert torch.equal(stats.sequences[-1], wanted[0])
    assert int(stats.counts[0, rare]) >= 12
    # In order it would have taken 36 + 20 · 16 tokens more; as many as these do not serve it.
    plain = replace(settings, tokens=stats.tokens, min_tokens=0)
    in_order = calibrate(shallow, documents, plain, tmp_path / "plain", threads=1)
    assert in_order.facts["rounds"] == 1
    assert in_order.tokens == stats.tokens
    assert int(in_order.counts[0, rare]) < 12


def test_unseen_tokens_are_not_shut_out(
    shallow: Checkpoint, homes: dict[int, list[int]], tmp_path: Path
) -> None:
    """They promise as much as tokens do on average: more than what is known to go elsewhere."""
    common, _, token = common_and_rare(homes)
    known, unseen = homes[common][:2]
    begin = [repeated(known, 32), repeated(token, 4)]
    documents = sequences([*begin, repeated(known, 16), repeated(unseen, 16)])
    settings = Settings(tokens=36, max_tokens=36 + 16, min_tokens=12)
    stats = calibrate(shallow, documents, settings, tmp_path / "s", threads=1)
    assert torch.equal(stats.sequences[-1], repeated(unseen, 16))


def many(seed: int, count: int, length: int = 64) -> Sequences:
    draw = torch.Generator().manual_seed(seed)
    return sequences(list(torch.randint(VOCABULARY, (count, length), generator=draw)))


def test_rounds_end_when_every_expert_is_served(
    shallow: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = many(7, 60)
    settings = Settings(tokens=64, max_tokens=100_000, min_tokens=8)
    stats = calibrate(shallow, documents, settings, tmp_path / "s", threads=1)
    assert stats.facts["rounds"] > 1
    assert int(stats.counts[:, :-1].min()) >= 8
    assert not stats.below()
    assert stats.tokens < documents.tokens
    assert stats.tokens == 64 + 1024 * (stats.facts["rounds"] - 1)


def test_rounds_end_with_the_data(shallow: Checkpoint, tmp_path: Path) -> None:
    documents = many(8, 20)
    settings = Settings(tokens=64, max_tokens=100_000, min_tokens=100_000)
    stats = calibrate(shallow, documents, settings, tmp_path / "s", threads=1)
    assert stats.facts["rounds"] == 3  # 64, 1024 and the rest
    assert stats.tokens == documents.tokens
    used = sorted(tuple(ids.tolist()) for ids in stats.sequences)
    assert used == sorted(tuple(ids.tolist()) for ids in documents.ids)  # each once


@pytest.mark.parametrize("most", [64, 65, 200, 1100])
def test_max_tokens_is_kept(shallow: Checkpoint, tmp_path: Path, most: int) -> None:
    settings = Settings(tokens=64, max_tokens=most, min_tokens=100_000)
    stats = calibrate(shallow, many(9, 40), settings, tmp_path / "s", threads=1)
    # One token alone is no sequence.
    assert stats.tokens == (64 if most == 65 else most)
    assert stats.facts["rounds"] == (1 if most <= 65 else 3 if most > 1088 else 2)


def test_one_round_when_nothing_is_asked_of_it(shallow: Checkpoint, tmp_path: Path) -> None:
    settings = Settings(tokens=64, max_tokens=1000, min_tokens=0)
    stats = calibrate(shallow, many(9, 40), settings, tmp_path / "s", threads=1)
    assert (stats.facts["rounds"], stats.tokens) == (1, 64)
    assert stats.below() == []


# ---- activations that are not finite ------------------------------------------------------------

BAD = 90  # the id whose embedding overflows


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """One embedding row is finite, but not once it is scaled. All tokens go to expert 0."""

    def tensors(key: TensorKey, shape: tuple[int, ...]) -> Tensor:
        value = synthetic_tensor(key, shape, 0, 0.0)
        if key.part == "embed_tokens.weight":
            value[BAD] = torch.finfo(torch.bfloat16).max
        if key.part == "mlp.gate.balancing_biases":
            value[0] = 10.0
        return value

    config = nano_config(layers=1, windows=(0,), experts=6, expert_width=32)
    folder = tmp_path_factory.mktemp("overflowing")
    return open_model(str(write_checkpoint(folder, config, tensors=tensors)))


def test_a_few_bad_rows_are_dropped_and_counted(overflowing: Checkpoint, tmp_path: Path) -> None:
    good = [torch.arange(start, start + 40) for start in (5, 17, 33)]
    settings = Settings(tokens=10_000, max_tokens=10_000, min_tokens=0)
    bad = sequences([*good, torch.tensor([BAD])])
    stats = calibrate(overflowing, bad, settings, tmp_path / "s", threads=1)
    assert stats.facts["not_finite"] == 4  # one row at each site
    clean = sequences(good)
    expected = calibrate(overflowing, clean, settings, tmp_path / "clean", threads=1)
    for name, array in stats.arrays.items():
        if name.startswith("layers."):
            assert bool(torch.isfinite(array).all())
            torch.testing.assert_close(array, expected.arrays[name], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([3, BAD, 4, 5], r"layer 0, qkv_proj: 1 of 44 calibration rows are not finite"),
        # One bad row in a hundred is let pass, but attention spreads it over its sequence.
        ([*range(64), BAD, 4, 5], r"layer 0, o_proj: 67 of 107 calibration rows are not finite"),
    ],
    ids=["at-once", "later"],
)
def test_many_bad_rows_are_an_error(
    overflowing: Checkpoint, tmp_path: Path, ids: list[int], says: str
) -> None:
    bad = sequences([torch.arange(40), torch.tensor(ids)])
    settings = Settings(tokens=200, max_tokens=200, min_tokens=0)
    with pytest.raises(InputError, match=says) as caught:
        calibrate(overflowing, bad, settings, tmp_path / "s", threads=1)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "s").exists()


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    def tensors(key: TensorKey, shape: tuple[int, ...]) -> Tensor:
        value = synthetic_tensor(key, shape, 0, 0.0)
        if key.part == "self_attn.o_proj.weight":
            value[3, 5] = float("nan")
        return value

    config = nano_config(layers=1, windows=(0,), experts=6, expert_width=32)
    broken = open_model(str(write_checkpoint(tmp_path / "m", config, tensors=tensors)))
    says = r"model.layers.0.self_attn.o_proj.weight': value 389 is nan, not a finite number"
    with pytest.raises(InputError, match=says):
        calibrate(broken, sequences([torch.arange(40)]), SETTINGS, tmp_path / "s", threads=1)


# ---- the file -----------------------------------------------------------------------------------


def test_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "no", tmp_path):
        with pytest.raises(InputError, match="no such file; `zaya-convert calibrate` makes one"):
            files.read(path)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file(straight: Path, tmp_path: Path, keep: int) -> None:
    (tmp_path / "s").write_bytes(straight.read_bytes()[:keep])
    with pytest.raises(InputError, match="truncated"):
        files.read(tmp_path / "s")


def test_a_foreign_file(model: Checkpoint) -> None:
    with pytest.raises(InputError, match="is not a calibration file"):
        files.read(model.path / "model.safetensors")


def facts_of(stats: Stats, **changes: Any) -> str:
    return json.dumps({**stats.facts, **changes})


# What is changed in the arrays or the metadata, and what is said of it.
Change = Callable[[dict[str, Tensor], dict[str, str]], object]
MOMENTS = "layers.1.o_proj.second_moment"
FAULTS: dict[str, tuple[Change, str]] = {
    "schema": (lambda a, m: m.update(schema="2"), "another version"),
    "no-schema": (lambda a, m: m.pop("schema"), "another version"),
    "no-facts": (lambda a, m: m.pop("facts"), "damaged"),
    "facts-not-json": (lambda a, m: m.update(facts="{"), "damaged"),
    "facts-a-list": (lambda a, m: m.update(facts="[]"), "damaged"),
    "no-settings": (lambda a, m: m.update(facts="{}"), "damaged"),
    "no-counts": (lambda a, m: a.pop("counts"), "damaged"),
    "no-tokens": (lambda a, m: a.pop("tokens.ids"), "damaged"),
    "no-moments": (lambda a, m: a.pop(MOMENTS), "damaged"),
    "nan": (lambda a, m: a[MOMENTS].fill_(float("nan")), "damaged"),
    "infinite": (lambda a, m: a[MOMENTS].fill_(float("inf")), "damaged"),
    "negative": (lambda a, m: a[MOMENTS].neg_(), "damaged"),
    "nan-absmax": (lambda a, m: a["layers.0.down_proj.absmax"].fill_(float("nan")), "damaged"),
    "lengths": (lambda a, m: a["tokens.lengths"].add_(1), "damaged"),
    "too-few-experts": (
        lambda a, m: a.update({"layers.0.down_proj.absmax": torch.zeros(EXPERTS - 1, 32)}),
        "damaged",
    ),
    "flat": (lambda a, m: a.update(counts=a["counts"].flatten()), "damaged"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_with_faults(straight: Path, tmp_path: Path, fault: str) -> None:
    stats = files.read(straight)
    metadata = {"format": "zaya-convert calibration", "schema": "1", "facts": facts_of(stats)}
    arrays = load_file(straight)
    change, says = FAULTS[fault]
    change(arrays, metadata)
    save_file(arrays, tmp_path / "s", metadata)
    with pytest.raises(InputError, match=says) as caught:
        files.read(tmp_path / "s")
    assert str(caught.value).startswith("s: ")


def test_it_fits_the_model_it_was_made_from_and_no_other(
    nano: Nano, model: Checkpoint, straight: Path, tmp_path: Path
) -> None:
    stats = files.read(straight)
    stats.check_fits(model)
    copy = open_model(str(shutil.copytree(model.path, tmp_path / "copy")))
    stats.check_fits(copy)
    others = [nano("hybrid", seed=1, **SMALL), nano("hybrid", **{**SMALL, "experts": 5})]
    # One expert matrix of the same model, trained a little further.
    changed = tmp_path / "copy" / "model.safetensors"
    info = model.infos[TensorKey(2, "mlp.experts.up_proj.weight", 3)].pieces[""]
    raw = bytearray(changed.read_bytes())
    raw[info.begin + 2] ^= 1
    changed.write_bytes(raw)
    for other in (*others, tmp_path / "copy"):
        with pytest.raises(InputError, match="another model"):
            stats.check_fits(open_model(str(other)))


# ---- what is refused ----------------------------------------------------------------------------


def test_a_quantized_model_is_refused(
    model: Checkpoint, documents: Sequences, tmp_path: Path
) -> None:
    execute(make_plan(model, nearest(4), "compressed-tensors"), tmp_path / "int4", threads=1)
    artifact = open_model(str(tmp_path / "int4"))
    with pytest.raises(InputError, match="calibrate the float model"):
        calibrate(artifact, documents, SETTINGS, tmp_path / "s", threads=1)
    assert [path.name for path in tmp_path.iterdir()] == ["int4"]


def test_no_text_is_refused(model: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no text"):
        calibrate(model, sequences([]), SETTINGS, tmp_path / "s", threads=1)


def test_ids_outside_the_vocabulary_are_refused(model: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"0\.\.95"):
        calibrate(model, sequences([torch.tensor([1, 96])]), SETTINGS, tmp_path / "s", threads=1)
