"""A walk is the runtime, site by site: it shows what the runtime computes, and computes what the
visitor makes of it, in the same bits however the work is cut, kept or interrupted."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nano import Nano
from zaya_convert.checkpoint import Checkpoint
from zaya_convert.errors import InputError
from zaya_convert.layout import TensorKey
from zaya_convert.models import open_model
from zaya_convert.runtime import walk as module
from zaya_convert.runtime.model import Model
from zaya_convert.runtime.router import rms_norm
from zaya_convert.runtime.walk import (
    SITES,
    Matrices,
    Pieces,
    Rows,
    Site,
    Spread,
    Walk,
    check_finite_share,
    finite_rows,
)
from zaya_convert.threads import one_thread_each

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"layers": 3, "windows": (0, 9, 0), "experts": 6, "expert_width": 32}
EXPERTS, LAYERS, VOCABULARY = 6, 3, 96
MODELS: dict[str, dict[str, Any]] = {
    "plain": SMALL,
    "biased": {**SMALL, "attention_bias": True, "tied": False, "lm_head_bias": True},
    "two-windows": {**SMALL, "windows": (4, 0, 17), "conv_taps": (3, 2)},
}

Place = tuple[int, str, int]


@pytest.fixture(scope="module")
def model(nano: Nano) -> Checkpoint:
    return open_model(str(nano("hybrid", attention_bias=True, **SMALL)))


@pytest.fixture(scope="module")
def sequences() -> list[Tensor]:
    """Of many lengths, longer than the windows; one of a single token."""
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (n,), generator=draw) for n in (40, 1, 23, 56)]


class Reader:
    """Changes nothing, and keeps everything it is shown."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.rows: dict[Place, list[Rows]] = {}
        self.pooled: dict[Place, list[Rows]] = {}

    def visit(self, site: Site, pieces: Pieces, pooled: Pieces, spread: Spread) -> Matrices:
        place = (site.layer, site.name, site.expert)
        self.rows[place] = [copied(piece()) for piece in pieces]
        self.pooled[place] = [copied(piece()) for piece in pooled]
        return self.matrices(site)

    def matrices(self, site: Site) -> Matrices:
        original = tuple(self.checkpoint.read_float(key, torch.float32) for key in site.keys)
        return Matrices(original, original)

    def inputs(self) -> dict[Place, Tensor]:
        """What each site receives, without sites that receive nothing."""
        return {
            place: torch.cat([r.inputs for r in rows]) for place, rows in self.rows.items() if rows
        }

    def digest(self) -> str:
        """Of all bits it was shown."""
        total = hashlib.sha256()
        for kind in (self.rows, self.pooled):
            for place in sorted(kind):
                total.update(f"{place} {len(kind[place])}".encode())
                for rows in kind[place]:
                    for part in rows:
                        total.update(b"-" if part is None else part.contiguous().numpy().tobytes())
        return total.hexdigest()


class Changer(Reader):
    """Rounds every matrix to a coarse grid, so that the visited model leaves the float one."""

    def matrices(self, site: Site) -> Matrices:
        original = super().matrices(site).original
        return Matrices(original, tuple(coarse(matrix) for matrix in original))


def coarse(matrix: Tensor) -> Tensor:
    step = matrix.abs().amax(dim=1, keepdim=True) / 3
    return (matrix / step).round() * step


def copied(rows: Rows) -> Rows:
    return Rows(*(None if part is None else part.clone() for part in rows))  # type: ignore[arg-type]


def run(walk: Walk, visitor: Reader) -> Walk:
    while walk.layer < walk.config.layers:
        walk.step(visitor)
    return walk


def walked(checkpoint: Checkpoint, sequences: list[Tensor], **options: Any) -> tuple[Walk, Reader]:
    reader = Reader(checkpoint)
    return run(Walk(checkpoint, sequences, **options), reader), reader


def changed(checkpoint: Checkpoint, sequences: list[Tensor], **options: Any) -> tuple[Walk, Reader]:
    changer = Changer(checkpoint)
    return run(Walk(checkpoint, sequences, reference=True, **options), changer), changer


def bits(walk: Walk) -> list[bytes]:
    """State and routes of a walk; of both models, if there are two."""
    lanes = [t for lane in walk._lanes for t in (lane.x, lane.state)]
    return [t.numpy().tobytes() for t in (*lanes, *walk.routes)]


def final(walk: Walk) -> Tensor:
    """The residual stream after the final norm."""
    weight = walk.checkpoint.read_float(TensorKey(-1, "norm.weight"), torch.float32)
    return rms_norm(walk.state[0], weight, walk.config.eps)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ---- the runtime --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_walk_that_changes_nothing_is_the_runtime(
    name: str, nano: Nano, sequences: list[Tensor]
) -> None:
    model = open_model(str(nano("hybrid", **MODELS[name])))
    walk, _ = walked(model, sequences)
    routes = torch.stack(walk.routes)
    assert routes.dtype == torch.int32
    assert bool((routes == EXPERTS).any())  # the skip expert is in use
    for exact, tolerance in ((False, 1e-5), (True, 1e-5)):  # fp32 against fp32 and fp64 sums
        found = Model(model, exact=exact).evaluate(sequences)
        assert torch.equal(routes, found.routes)
        assert distance(final(walk), torch.cat(found.hidden)) < tolerance


@pytest.mark.parametrize("name", MODELS)
def test_the_visitor_is_shown_what_the_runtime_observes(
    name: str, nano: Nano, sequences: list[Tensor]
) -> None:
    model = open_model(str(nano("hybrid", **MODELS[name])))
    walk, reader = walked(model, sequences)
    shown = reader.inputs()
    seen: dict[Place, list[Tensor]] = {}

    def observe(layer: int, site: str, rows: Tensor, expert: int) -> None:
        seen.setdefault((layer, site, expert), []).append(rows.clone())

    found = Model(model, exact=False).evaluate(sequences, observer=observe)
    observed = {place: torch.cat(r) for place, r in seen.items() if place[1] != "router"}
    assert shown.keys() == observed.keys()
    for place, rows in shown.items():
        assert rows.shape == observed[place].shape, place
        assert distance(rows, observed[place]) < 1e-5, place
    # Every site is visited, experts without tokens too.
    places = {
        (layer, site, expert)
        for layer in range(LAYERS)
        for site in SITES
        for expert in (range(EXPERTS) if site in ("gate_up_proj", "down_proj") else (-1,))
    }
    assert reader.rows.keys() == places
    for layer in range(LAYERS):
        assert [len(rows.inputs) for rows in reader.rows[layer, "qkv_proj", -1]] == [40, 1, 23, 56]
        count = 0
        for expert in range(EXPERTS):
            mine = walk.routes[layer] == expert
            for site in ("gate_up_proj", "down_proj"):
                rows = reader.rows[layer, site, expert]
                assert len(rows) == int(bool(mine.any()))
                for piece in rows:
                    assert len(piece.inputs) == int(mine.sum())
                    assert piece.weights is not None
                    expected = found.weights[layer][mine].square()
                    torch.testing.assert_close(piece.weights, expected, rtol=1e-4, atol=0)
            count += int(mine.sum())
        skipped = int((walk.routes[layer] == EXPERTS).sum())
        assert count + skipped == walk.tokens


def test_all_tokens_may_skip(nano: Nano, sequences: list[Tensor]) -> None:
    model = open_model(str(nano("hybrid", skip_bias=10.0, **SMALL)))
    walk, reader = walked(model, sequences)
    found = Model(model, exact=False).evaluate(sequences)
    assert bool((found.routes == EXPERTS).all())
    assert torch.equal(torch.stack(walk.routes), found.routes)
    assert distance(final(walk), torch.cat(found.hidden)) < 1e-5
    assert {place[1] for place in reader.inputs()} == {"qkv_proj", "o_proj"}


# ---- what experts are shown of each other -------------------------------------------------------


@pytest.mark.parametrize("most", [16, 1024])
def test_pooled_rows_are_those_that_reach_an_expert(
    most: int, model: Checkpoint, sequences: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POOLED", most)
    walk, reader = walked(model, sequences)
    for layer in range(LAYERS):
        assert reader.pooled[layer, "qkv_proj", -1] == []
        assert reader.pooled[layer, "o_proj", -1] == []
        routes = walk.routes[layer]
        reached = (routes < EXPERTS).nonzero().squeeze(1)
        by_token = torch.zeros(walk.tokens, model.config.hidden)
        for expert in range(EXPERTS):
            for piece in reader.rows[layer, "gate_up_proj", expert]:
                by_token[routes == expert] = piece.inputs
        chosen = reached
        if len(reached) > most:
            chosen = reached[torch.linspace(0, len(reached) - 1, most).long()]
            assert len(chosen.unique()) == most
        for expert in range(EXPERTS):
            (pooled,) = reader.pooled[layer, "gate_up_proj", expert]
            torch.testing.assert_close(pooled.inputs, by_token[chosen], rtol=1e-6, atol=1e-6)
            (hidden,) = reader.pooled[layer, "down_proj", expert]
            gate, up = reader.matrices(Site(layer, "gate_up_proj", expert)).used
            expected = F.silu(F.linear(pooled.inputs, gate)) * F.linear(pooled.inputs, up)
            torch.testing.assert_close(hidden.inputs, expected, rtol=1e-4, atol=1e-5)


# ---- two models side by side --------------------------------------------------------------------


def test_an_unchanged_model_stays_beside_its_reference(
    model: Checkpoint, sequences: list[Tensor]
) -> None:
    walk, reader = walked(model, sequences, reference=True)
    for place, pieces in reader.rows.items():
        for rows in pieces:
            assert rows.reference is not None
            assert torch.equal(rows.reference, rows.inputs), place
    alone, _ = walked(model, sequences)
    assert torch.equal(walk.state[0], alone.state[0])


def test_the_reference_stays_the_float_model(model: Checkpoint, sequences: list[Tensor]) -> None:
    walk, changer = changed(model, sequences)
    alone, reader = walked(model, sequences)
    left = [a != b for a, b in zip(walk.routes, alone.routes, strict=True)]
    assert all(bool(moved.any()) for moved in left[1:])  # some tokens change experts
    drifted = 0
    for layer in range(LAYERS):
        for site in ("qkv_proj", "o_proj"):
            pairs = zip(changer.rows[layer, site, -1], reader.rows[layer, site, -1], strict=True)
            for rows, plain in pairs:
                assert rows.reference is not None
                assert torch.equal(rows.reference, plain.inputs)
                drifted += not torch.equal(rows.reference, rows.inputs)
    # All but the first site's four sequences have drifted.
    assert drifted == len(sequences) * (2 * LAYERS - 1)
    assert torch.equal(walk._lanes[1].x, alone.state[0])
    assert distance(walk.state[0], alone.state[0]) > 0.01


def test_rows_sent_elsewhere_by_the_float_model_stand_for_themselves(
    model: Checkpoint, sequences: list[Tensor]
) -> None:
    walk, changer = changed(model, sequences)
    alone, reader = walked(model, sequences)
    kinds = {"same expert": 0, "elsewhere": 0}
    for layer in range(LAYERS):
        here, there = walk.routes[layer], alone.routes[layer]
        for expert in range(EXPERTS):
            for site in ("gate_up_proj", "down_proj"):
                for rows in changer.rows[layer, site, expert]:
                    tokens = (here == expert).nonzero().squeeze(1).tolist()
                    plain = reader.rows[layer, site, expert]
                    float_rows = dict(
                        zip(
                            (there == expert).nonzero().squeeze(1).tolist(),
                            plain[0].inputs if plain else (),
                            strict=True,
                        )
                    )
                    assert rows.reference is not None
                    for i, token in enumerate(tokens):
                        expected = float_rows.get(token, rows.inputs[i])
                        assert torch.equal(rows.reference[i], expected)
                        kinds["same expert" if token in float_rows else "elsewhere"] += 1
    assert min(kinds.values()) > 10


# ---- the same bits ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(model: Checkpoint, sequences: list[Tensor]) -> tuple[list[bytes], str]:
    """Bits of a walk that changes matrices, and of all it was shown."""
    walk, changer = changed(model, sequences)
    return bits(walk), changer.digest()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(
    threads: int,
    model: Checkpoint,
    sequences: list[Tensor],
    straight: tuple[list[bytes], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walk, changer = changed(model, sequences, threads=threads)
    assert (bits(walk), changer.digest()) == straight


def test_streams_on_disk_change_nothing(
    model: Checkpoint, sequences: list[Tensor], straight: tuple[list[bytes], str], tmp_path: Path
) -> None:
    walk, changer = changed(model, sequences, folder=tmp_path / "streams", max_memory=1)
    assert (bits(walk), changer.digest()) == straight
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "streams").iterdir()}
    assert sizes["visited-x.stream"] == sizes["reference-x.stream"] == 4 * walk.tokens * 64
    enough, _ = changed(model, sequences, folder=tmp_path / "unused", max_memory=1 << 30)
    assert bits(enough) == straight[0]
    assert not (tmp_path / "unused").exists()


def test_rows_are_cut_by_the_data_alone(
    model: Checkpoint,
    sequences: list[Tensor],
    straight: tuple[list[bytes], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With many pieces at once, too."""
    monkeypatch.setattr(module, "ROWS", 16)
    found = [changed(model, sequences, threads=threads) for threads in (1, 3)]
    (one, shown), (three, shown_three) = found
    assert (bits(one), shown.digest()) == (bits(three), shown_three.digest())
    assert torch.equal(torch.stack(one.routes), torch.stack(three.routes))
    assert len(one.routes) == len(straight[0]) - 4


def test_torch_gets_its_threads_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread_each():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---- kept and continued -------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(LAYERS + 1))
def test_a_restored_walk_goes_on_in_the_same_bits(
    at: int,
    model: Checkpoint,
    sequences: list[Tensor],
    straight: tuple[list[bytes], str],
    tmp_path: Path,
) -> None:
    walk, first = Walk(model, sequences, reference=True), Changer(model)
    for _ in range(at):
        walk.step(first)
    walk.save(tmp_path / "walk")
    before = bits(walk)
    run(walk, first)  # what was saved is not touched by going on
    again, rest = Walk(model, sequences, reference=True), Changer(model)
    assert again.restore(tmp_path / "walk")
    assert again.layer == at
    assert bits(again) == before
    assert bits(run(again, rest)) == straight[0]
    assert {place[0] for place in rest.rows} == set(range(at, LAYERS))
    rest.rows = {place: r for place, r in first.rows.items() if place[0] < at} | rest.rows
    rest.pooled = {place: r for place, r in first.pooled.items() if place[0] < at} | rest.pooled
    assert rest.digest() == straight[1]
    assert [path.name for path in tmp_path.iterdir()] == ["walk"]


def test_restored_to_disk(
    model: Checkpoint, sequences: list[Tensor], straight: tuple[list[bytes], str], tmp_path: Path
) -> None:
    walk, changer = Walk(model, sequences, reference=True), Changer(model)
    walk.step(changer)
    walk.save(tmp_path / "walk")
    again = Walk(model, sequences, reference=True, folder=tmp_path / "streams", max_memory=1)
    assert again.restore(tmp_path / "walk")
    assert bits(run(again, changer)) == straight[0]


def test_saving_replaces_what_was_saved(
    model: Checkpoint, sequences: list[Tensor], tmp_path: Path
) -> None:
    walk, reader = Walk(model, sequences), Reader(model)
    (tmp_path / "walk.new").mkdir()  # as if the last attempt was killed
    (tmp_path / "walk.new" / "stray").touch()
    for _ in range(2):
        walk.step(reader)
        walk.save(tmp_path / "walk")
    again = Walk(model, sequences)
    assert again.restore(tmp_path / "walk")
    assert again.layer == 2
    assert not (tmp_path / "walk" / "stray").exists()
    assert not (tmp_path / "walk.new").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.fixture(scope="module")
def kept(
    model: Checkpoint, sequences: list[Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The state after the first layer, of two models side by side."""
    walk = Walk(model, sequences, reference=True)
    walk.step(Changer(model))
    folder = tmp_path_factory.mktemp("kept") / "walk"
    walk.save(folder)
    return folder


FILES = ("walk.json", "x0.npy", "x1.npy", "state0.npy", "state1.npy", "routes.npy")


@pytest.mark.parametrize("fault", [cut, emptied, Path.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("file", FILES)
def test_a_torn_folder_is_not_restored(
    file: str,
    fault: Callable[[Path], None],
    kept: Path,
    model: Checkpoint,
    sequences: list[Tensor],
    tmp_path: Path,
) -> None:
    shutil.copytree(kept, tmp_path / "walk")
    fault(tmp_path / "walk" / file)
    fresh = Walk(model, sequences, reference=True)
    before = bits(fresh)
    assert not fresh.restore(tmp_path / "walk")
    assert (fresh.layer, bits(fresh)) == (0, before)  # nothing was taken over


@pytest.mark.parametrize("facts", ["[]", "{}", '{"layer": 1}', "null"])
def test_a_strange_folder_is_not_restored(
    facts: str, model: Checkpoint, sequences: list[Tensor], tmp_path: Path
) -> None:
    walk = Walk(model, sequences)
    walk.save(tmp_path / "walk")
    (tmp_path / "walk" / "walk.json").write_text(facts)
    assert not walk.restore(tmp_path / "walk")
    assert not walk.restore(tmp_path / "nothing")


def other_ids(sequences: list[Tensor]) -> list[Tensor]:
    return [*sequences[:-1], (sequences[-1] + 1) % VOCABULARY]


def other_cut(sequences: list[Tensor]) -> list[Tensor]:
    joined = torch.cat(sequences)
    return list(joined.split([len(joined) - 20, 20]))


def fewer(sequences: list[Tensor]) -> list[Tensor]:
    return sequences[1:]


@pytest.mark.parametrize("change", [other_ids, other_cut, fewer])
def test_the_state_of_other_tokens_is_not_restored(
    change: Callable[[list[Tensor]], list[Tensor]],
    model: Checkpoint,
    sequences: list[Tensor],
    tmp_path: Path,
) -> None:
    walk = Walk(model, sequences)
    walk.step(Reader(model))
    walk.save(tmp_path / "walk")
    other = Walk(model, change(sequences))
    assert not other.restore(tmp_path / "walk")
    assert other.layer == 0


def test_the_state_of_another_shape_is_not_restored(
    nano: Nano, model: Checkpoint, sequences: list[Tensor], tmp_path: Path
) -> None:
    walk = Walk(model, sequences)
    walk.step(Reader(model))
    walk.save(tmp_path / "walk")
    narrow = open_model(str(nano("hybrid", layers=1, windows=(0,), hidden=32)))
    assert not Walk(narrow, sequences).restore(tmp_path / "walk")
    # Nor one that knows nothing of the float model beside it.
    assert not Walk(model, sequences, reference=True).restore(tmp_path / "walk")


# ---- rows that are not finite -------------------------------------------------------------------


def test_rows_without_numbers_are_left_out() -> None:
    inputs = torch.arange(12.0).view(4, 3)
    reference, weights = inputs + 1, torch.arange(4.0)
    assert finite_rows(Rows(inputs, reference, weights)) == (Rows(inputs, reference, weights), 0)
    inputs[0, 1], reference[2, 2] = float("nan"), float("inf")
    rows, dropped = finite_rows(Rows(inputs, reference, weights))
    assert dropped == 2
    assert rows.reference is not None
    assert rows.weights is not None
    assert torch.equal(rows.inputs, inputs[[1, 3]])
    assert torch.equal(rows.reference, reference[[1, 3]])
    assert rows.weights.tolist() == [1, 3]
    rows, dropped = finite_rows(Rows(inputs))
    assert (len(rows.inputs), dropped, rows.reference, rows.weights) == (3, 1, None, None)


def test_one_in_a_hundred_is_the_limit() -> None:
    check_finite_share(0, 0, "here")
    check_finite_share(1, 100, "here")
    with pytest.raises(InputError, match="here: 2 of 199 calibration rows are not finite"):
        check_finite_share(2, 199, "here")
