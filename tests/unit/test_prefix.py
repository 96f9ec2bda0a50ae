"""Quantizing on the quantized prefix: what the artifact is made on, and that interruptions and the
order of work leave no trace in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nano import Nano
from rounding import nearest
from zaya_convert import work
from zaya_convert.calibrate import Settings, calibrate
from zaya_convert.checkpoint import Checkpoint
from zaya_convert.convert import execute
from zaya_convert.data import Sequences, digest_of, load_documents, load_sequences
from zaya_convert.errors import InputError, UsageError
from zaya_convert.export.safetensors import ShardSet
from zaya_convert.layout import PART_BY_NAME
from zaya_convert.models import open_model
from zaya_convert.plan import Plan, make_plan
from zaya_convert.prefix import Prefix
from zaya_convert.recipe import adjusted, for_bits, load
from zaya_convert.runtime.model import Model
from zaya_convert.runtime.walk import Matrices, Pieces, Site, Spread, Walk
from zaya_convert.stats import Stats
from zaya_convert.validate import validate
from zaya_quant.qtensor import QuantTensor

pytestmark = pytest.mark.usefixtures("one_thread")

# Few tokens for this many experts, so some get none; the skip expert and a window are in use.
SMALL: dict[str, Any] = {"layers": 3, "windows": (0, 9, 0), "experts": 6, "expert_width": 32}
LAYERS = SMALL["layers"]
METHODS = ("gptq", "gptaq")


class Stop(Exception):
    """What interrupts a run in these tests."""


@pytest.fixture(scope="module")
def model(nano: Nano) -> Checkpoint:
    return open_model(str(nano("hybrid", **SMALL)))


def calibrated(checkpoint: Checkpoint, folder: Path) -> Stats:
    ids = list(torch.randint(96, (3, 16), generator=torch.Generator().manual_seed(1)))
    documents = Sequences(ids, "random ids", digest_of(ids))
    settings = Settings(tokens=48, max_tokens=48, min_tokens=4)
    return calibrate(checkpoint, documents, settings, folder / "stats.safetensors", threads=1)


@pytest.fixture(scope="module")
def stats(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    return calibrated(model, tmp_path_factory.mktemp("stats"))


def plan_of(checkpoint: Checkpoint, stats: Stats | None, method: str) -> Plan:
    recipe = adjusted(load("int4"), method=method)
    return replace(make_plan(checkpoint, recipe, "compressed-tensors"), stats=stats)


@pytest.fixture(scope="module")
def made(
    model: Checkpoint, stats: Stats, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The artifact of a method on one thread; not to be changed."""
    known: dict[str, Path] = {}

    def make(method: str) -> Path:
        if method not in known:
            known[method] = tmp_path_factory.mktemp("made") / method
            execute(plan_of(model, stats, method), known[method], threads=1)
        return known[method]

    return make


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; folders too, as None would be."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"a folder"
        for path in folder.rglob("*")
    }


# ---- the same bytes -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_same_bytes_on_two_threads_from_the_other_layout(
    method: str, nano: Nano, made: Callable[[str], Path], tmp_path: Path
) -> None:
    legacy = open_model(str(nano("legacy", **SMALL)))
    own = calibrated(legacy, tmp_path)
    execute(plan_of(legacy, own, method), tmp_path / "out", threads=2)
    assert contents(tmp_path / "out") == contents(made(method))


@pytest.mark.parametrize("method", METHODS)
def test_streams_on_disk_change_nothing(
    method: str, model: Checkpoint, stats: Stats, made: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = replace(plan_of(model, stats, method), max_memory=1)
    execute(plan, tmp_path / "out", threads=1)
    assert contents(tmp_path / "out") == contents(made(method))


def interrupt_saving(monkeypatch: pytest.MonkeyPatch, layer: int) -> None:
    """Stop where the state after ``layer`` would be saved."""
    whole = Walk.save

    def save(walk: Walk, folder: Path) -> None:
        if walk.layer > layer:
            raise Stop
        whole(walk, folder)

    monkeypatch.setattr(Walk, "save", save)


@pytest.mark.parametrize(
    ("method", "layer"), [("gptq", 1), *(("gptaq", layer) for layer in range(LAYERS))]
)
def test_interrupted_before_a_layer_is_saved(
    method: str,
    layer: int,
    model: Checkpoint,
    stats: Stats,
    made: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, out = plan_of(model, stats, method), tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_saving(patch, layer)
        with pytest.raises(Stop):
            execute(plan, out, threads=1)
    result = execute(plan, out, threads=1, resume=True)
    assert result.resumed_steps > 0
    assert contents(out) == contents(made(method))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def interrupted(plan: Plan, out: Path, share: float) -> None:
    """Run until this share of the matrices on the prefix is written, then stop."""
    done = 0
    total = sum(plan.source.infos[s.key].bytes for s in plan.steps)

    def progress(size: int) -> None:
        nonlocal done
        done += size
        if done > share * total:
            raise Stop

    with pytest.raises(Stop):
        execute(plan, out, threads=1, progress=progress)


def test_interrupted_inside_a_layer_and_again(
    model: Checkpoint, stats: Stats, made: Callable[[str], Path], tmp_path: Path
) -> None:
    plan, out = plan_of(model, stats, "gptaq"), tmp_path / "out"
    interrupted(plan, out, 0.8)
    sizes: list[int] = []

    def progress(size: int) -> None:
        sizes.append(size)
        if len(sizes) > len(plan.steps) - 3:
            raise Stop

    with pytest.raises(Stop):
        execute(plan, out, threads=2, resume=True, progress=progress)
    sizes.clear()
    execute(plan, out, threads=1, resume=True, progress=sizes.append)
    assert sum(sizes) == model.bytes  # every tensor is counted once, resumed or not
    assert contents(out) == contents(made("gptaq"))


def lose_state(partial: Path, plan: Plan) -> None:
    for path in (partial / "walk").iterdir():
        path.unlink()
    (partial / "walk").rmdir()


def tear_state(partial: Path, plan: Plan) -> None:
    largest = max((partial / "walk").iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])


def empty_state(partial: Path, plan: Plan) -> None:
    """As after a crash of the machine: names are there, bytes are not."""
    for path in (partial / "walk").iterdir():
        path.write_bytes(b"")


def lose_record(partial: Path, plan: Plan) -> None:
    """The journal no longer vouches for a matrix of layer 0, on which the state builds."""
    journal = partial / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    kept = [line for line in lines if "layers.0.mlp.experts.0.up_proj" not in line]
    assert len(kept) == len(lines) - 1
    journal.write_text("".join(kept))


def damage_output(partial: Path, plan: Plan) -> None:
    """A matrix of layer 0 does not stand on disk as the journal says."""
    shards = ShardSet(partial, plan.arrays, plan.shard_bytes).files
    (step,) = (s for s in plan.steps if str(s.key) == "model.layers.0.self_attn.o_proj.weight")
    shards.write(next(iter(step.regions.values())), b"\x55" * 16)
    shards.close()


@pytest.mark.parametrize(
    "damage", [lose_state, tear_state, empty_state, lose_record, damage_output],
    ids=lambda damage: damage.__name__,
)  # fmt: skip
def test_resuming_without_all_that_was_kept(
    damage: Callable[[Path, Plan], None],
    model: Checkpoint,
    stats: Stats,
    made: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    plan, out = plan_of(model, stats, "gptaq"), tmp_path / "out"
    interrupted(plan, out, 0.85)
    damage(tmp_path / ".out.partial", plan)
    execute(plan, out, threads=1, resume=True)
    assert contents(out) == contents(made("gptaq"))


# ---- what it is made on -------------------------------------------------------------------------


class Seen:
    """Inputs by (layer, site, expert), as pieces in order."""

    def __init__(self) -> None:
        self.pieces: dict[tuple[int, str, int], list[Tensor]] = {}

    def observe(self, layer: int, site: str, rows: Tensor, expert: int) -> None:
        self.pieces.setdefault((layer, site, expert), []).append(rows.clone())

    def rows(self) -> dict[tuple[int, str, int], Tensor]:
        return {place: torch.cat(rows) for place, rows in self.pieces.items() if rows}


def observed(checkpoint: Checkpoint, sequences: list[Tensor]) -> dict[tuple[int, str, int], Tensor]:
    """What the runtime's sites receive, without the router."""
    seen = Seen()
    Model(checkpoint, exact=False).evaluate(sequences, observer=seen.observe)
    return {place: rows for place, rows in seen.rows().items() if place[1] != "router"}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("method", METHODS)
def test_every_matrix_is_calibrated_on_what_the_artifact_gives_it(
    method: str,
    model: Checkpoint,
    stats: Stats,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, whole = Seen(), Prefix.visit

    def visit(
        prefix: Prefix, site: Site, pieces: Pieces, pooled: Pieces, spread: Spread
    ) -> Matrices:
        for piece in pieces:
            seen.observe(site.layer, site.name, piece().inputs, site.expert)
        return whole(prefix, site, pieces, pooled, spread)

    monkeypatch.setattr(Prefix, "visit", visit)
    execute(plan_of(model, stats, method), tmp_path / "out", threads=1)
    shown = seen.rows()
    artifact = observed(open_model(str(tmp_path / "out")), stats.sequences)
    assert shown.keys() == artifact.keys()
    for place, rows in shown.items():
        # The same sums in another order, through up to three layers.
        assert rows.shape == artifact[place].shape, place
        assert distance(rows, artifact[place]) < 1e-5, place
    float_model = observed(model, stats.sequences)
    first = (0, "qkv_proj", -1)
    assert distance(shown[first], float_model[first]) < 1e-5  # nothing has changed yet
    for layer in range(LAYERS):
        for site in ("qkv_proj", "o_proj"):
            if (layer, site) != first[:2]:
                place = (layer, site, -1)
                assert distance(shown[place], float_model[place]) > 1e-3, place


def codes(checkpoint: Checkpoint) -> dict[str, QuantTensor]:
    found = {str(key): checkpoint.read(key) for key, i in checkpoint.infos.items() if i.spec}
    return {name: value for name, value in found.items() if isinstance(value, QuantTensor)}


def same(a: QuantTensor, b: QuantTensor) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)


def without_tokens(routes: Tensor, experts: int) -> set[str]:
    """Names of matrices of experts that no row reaches; routes [layers, rows]."""
    parts = ("gate_proj", "up_proj", "down_proj")
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
        for layer, chosen in enumerate(routes)
        for expert in range(experts)
        if not bool((chosen == expert).any())
        for part in parts
    }


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_without_tokens_is_rounded_by_weight_alone_and_flagged(
    method: str, model: Checkpoint, stats: Stats, made: Callable[[str], Path], tmp_path: Path
) -> None:
    artifact = open_model(str(made(method)))
    execute(plan_of(model, None, "rtn"), tmp_path / "rtn", threads=1)
    rounded, calibrated = codes(open_model(str(tmp_path / "rtn"))), codes(artifact)
    # No token on the quantized prefix, which may route a few tokens elsewhere.
    routes = Model(artifact, exact=False).evaluate(stats.sequences).routes
    starved = without_tokens(routes, model.config.experts)
    assert starved
    assert len(starved) < len(calibrated) // 2
    assert artifact.manifest["calibration"]["fallback"] == dict.fromkeys(
        sorted(starved, key=list(calibrated).index), "no calibration tokens"
    )
    for name, value in calibrated.items():
        # The same codes and scales: its error is exactly that of rounding.
        assert same(value, rounded[name]) == (name in starved), name


def test_second_moments_fall_back_and_flag_too(
    model: Checkpoint, stats: Stats, tmp_path: Path
) -> None:
    execute(plan_of(model, stats, "imatrix"), tmp_path / "imatrix", threads=1)
    execute(plan_of(model, None, "rtn"), tmp_path / "rtn", threads=1)
    artifact = open_model(str(tmp_path / "imatrix"))
    rounded, calibrated = codes(open_model(str(tmp_path / "rtn"))), codes(artifact)
    routes = Model(model, exact=False).evaluate(stats.sequences).routes
    starved = without_tokens(routes, model.config.experts)
    assert set(artifact.manifest["calibration"]["fallback"]) == starved
    assert {name for name, value in calibrated.items() if same(value, rounded[name])} == starved


def test_matrices_made_by_rows_flag_it_too(
    model: Checkpoint, stats: Stats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = adjusted(for_bits(8), method="imatrix")
    plan = replace(make_plan(model, recipe, "dense"), stats=stats)
    execute(plan, tmp_path / "whole", threads=1)
    monkeypatch.setattr(work, "CHUNK_BYTES", 1000)
    execute(plan, tmp_path / "rows", threads=1)
    whole, rows = (open_model(str(tmp_path / name)) for name in ("whole", "rows"))
    assert whole.manifest["calibration"]["fallback"]
    assert rows.manifest == whole.manifest


def test_the_manifest_names_the_calibration(stats: Stats, made: Callable[[str], Path]) -> None:
    facts = open_model(str(made("gptaq"))).manifest["calibration"]
    assert facts["digest"] == stats.digest
    assert facts["tokens"] == 48
    assert facts["counts"] == stats.counts.tolist()
    assert facts["below_minimum"] == [list(entry) for entry in stats.below()]
    assert facts["skip_rate"] == pytest.approx(
        float(stats.counts[:, -1].sum()) / (48 * LAYERS), abs=1e-6
    )
    assert facts["skip_rate"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_float_set_is_untouched(
    method: str, model: Checkpoint, made: Callable[[str], Path]
) -> None:
    artifact = open_model(str(made(method)))
    kept = [key for key, info in artifact.infos.items() if info.spec is None]
    assert {PART_BY_NAME[key.part].role for key in kept} == {"float", "embedding"}
    for key in kept:
        assert artifact.infos[key].dtype == model.infos[key].dtype
        ours, theirs = (b"".join(c.chunks(key)) for c in (artifact, model))
        assert ours == theirs, key


def test_calibrated_rounding_is_nearer_where_it_counts(bundled: Path, tmp_path: Path) -> None:
    model = open_model(str(bundled))
    documents = load_documents(model, None, length=256, pack=True, tokens=4096)
    settings = Settings(tokens=4096, max_tokens=4096, min_tokens=64)
    stats = calibrate(model, documents, settings, tmp_path / "stats.safetensors", threads=1)
    figures = {}
    sequences = load_sequences(model, None, tokens=2048, length=256)
    for method in ("rtn", "gptq"):
        plan = replace(
            make_plan(model, adjusted(for_bits(4), method=method), "compressed-tensors"),
            stats=stats,
        )
        execute(plan, tmp_path / method, threads=1)
        figures[method] = validate(model, open_model(str(tmp_path / method)), sequences).kl_mean
    # Measured: 1.8e-5 and 2.8e-6 nats, a ratio of 0.16.
    assert 0 < figures["gptq"] < 0.6 * figures["rtn"]


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, "imatrix"])
def test_a_calibrated_method_asks_for_statistics(
    method: str, model: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="needs calibration"):
        execute(plan_of(model, None, method), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_statistics_of_another_model_are_refused(nano: Nano, stats: Stats, tmp_path: Path) -> None:
    for other in (nano("hybrid", seed=1, **SMALL), nano("hybrid")):
        with pytest.raises(InputError, match="made from another model"):
            execute(plan_of(open_model(str(other)), stats, "gptq"), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_resuming_with_other_statistics_is_refused(
    model: Checkpoint, stats: Stats, tmp_path: Path
) -> None:
    interrupted(plan_of(model, stats, "gptq"), tmp_path / "out", 0.8)
    other = replace(stats, digest="0" * 64)
    with pytest.raises(InputError, match="belongs to another conversion"):
        execute(plan_of(model, other, "gptq"), tmp_path / "out", resume=True)


def test_rounding_needs_no_statistics(model: Checkpoint, tmp_path: Path) -> None:
    plan = make_plan(model, nearest(4), "compressed-tensors")
    assert not plan.needs_stats
    execute(plan, tmp_path / "out", threads=1)
    assert open_model(str(tmp_path / "out")).manifest["calibration"] is None
