"""The deployed graph as an engine: what it computes, carries from block to block, and refuses."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nano import Nano
from rounding import nearest
from zaya_convert.convert import execute
from zaya_convert.data import load_sequences
from zaya_convert.errors import InputError, UsageError
from zaya_convert.models import open_model
from zaya_convert.plan import make_plan
from zaya_convert.runtime.generate import Decoder, Sampling, Task, complete
from zaya_convert.runtime.model import PADDING, Model
from zaya_convert.validate import Report, validate

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from zaya_convert.runtime import onnx_engine  # noqa: E402
from zaya_convert.runtime.onnx_engine import OnnxModel, OnnxStates  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

# Of the range of logits: float32 sums in another order, through three layers.
FLOAT, QUANTIZED = 1e-5, 1e-4

PROMPTS = [[5, 6, 7, 8], [9], [11, 12, 13, 14, 15, 16, 17]]
SAMPLINGS = [Sampling(), Sampling(temperature=1.5, top_p=0.95, top_k=40, seed=3)]

Made = Callable[[str, int, str], Path]


@pytest.fixture(scope="module")
def made(nano: Nano, bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Artifact of a model ("nano", "bundled") in so many bits (0: floats) in a packing."""
    root = tmp_path_factory.mktemp("onnx")
    sources = {"nano": nano("hybrid", dtype=torch.float32), "bundled": bundled}

    def make(model: str, bits: int, packing: str = "onnx") -> Path:
        out = root / f"{model}-{bits}-{packing}"
        if not out.exists():
            recipe = nearest(bits) if bits else None
            execute(make_plan(open_model(str(sources[model])), recipe, packing), out)
        return out

    return make


@pytest.fixture(scope="module")
def nano_pair(made: Made) -> tuple[Model, OnnxModel]:
    """Our runtime and onnxruntime on the same float weights, one layer with a window."""
    opened = open_model(str(made("nano", 0, "onnx")))
    return Model(opened), OnnxModel(opened)


def tokens(length: int, rows: int = 96, seed: int = 0) -> Tensor:
    return torch.randint(1, rows, (length,), generator=torch.Generator().manual_seed(seed))


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the range."""
    return float((ours - theirs).abs().max() / (ours.max() - ours.min()))


# --- what it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_the_cut_changes_no_bit(made: Made, bits: int) -> None:
    folder = made("bundled", bits, "onnx")
    model = OnnxModel(open_model(str(folder)))
    ids = tokens(50)[None]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    path = folder / "onnx" / "model.onnx"
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 50), np.int64)}
    for given in session.get_inputs()[3:]:  # the states, of whose dimensions two are named
        shape = [{"batch_size": 1}.get(n, 0) if isinstance(n, str) else n for n in given.shape]
        feeds[given.name] = np.zeros(shape, np.float32)
    for keep in (0, 1):
        kept = {"num_logits_to_keep": np.array(keep)}
        (untouched,) = session.run(["logits"], feeds | kept)
        ours = model.forward(ids, last_only=bool(keep)).logits
        assert np.array_equal(untouched, ours.numpy())


@pytest.mark.parametrize(
    ("model", "bits", "exact", "limit"),
    [
        ("bundled", 0, False, FLOAT),
        ("bundled", 0, True, FLOAT),
        ("bundled", 4, True, QUANTIZED),
        ("bundled", 8, True, QUANTIZED),
        ("nano", 0, False, FLOAT),
        ("nano", 8, True, QUANTIZED),
    ],
)
def test_evaluate_equals_our_runtime(
    made: Made, model: str, bits: int, exact: bool, limit: float
) -> None:
    opened = open_model(str(made(model, bits, "onnx")))
    rows = opened.config.vocab_rows
    sequences = [tokens(600, rows), tokens(1, rows), tokens(33, rows)]  # one in two parts
    seen: list[tuple[int, int]] = []
    ours, engine = Model(opened), OnnxModel(opened, exact)
    a, b = ours.evaluate(sequences), engine.evaluate(sequences, lambda *done: seen.append(done))
    assert [h.shape for h in a.hidden] == [h.shape for h in b.hidden]
    assert distance(ours.logits(torch.cat(a.hidden)), engine.logits(torch.cat(b.hidden))) <= limit
    assert (a.routes.dtype, a.weights.dtype) == (b.routes.dtype, b.weights.dtype)
    assert torch.equal(a.routes, b.routes)
    assert len(b.routes.unique()) == opened.config.experts + 1  # the skip expert too
    assert float((a.weights - b.weights).abs().max()) <= QUANTIZED
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_deployed_graphs_round_activations(made: Made) -> None:
    opened = open_model(str(made("bundled", 4, "onnx")))
    ids = tokens(40, 700)[None]
    deployed, exact = (OnnxModel(opened, exact).forward(ids).logits for exact in (False, True))
    assert FLOAT < distance(exact, deployed) < 0.2


# --- what it carries -----------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1] * 24, [5, 1, 10, 8], [23, 1]], ids=str)
def test_blocks_equal_the_whole(nano_pair: tuple[Model, OnnxModel], sizes: list[int]) -> None:
    ours, engine = nano_pair
    ids = torch.stack([tokens(24), tokens(24, seed=1)])
    cache, found = engine.new_cache(), []
    for part in ids.split(sizes, dim=1):
        found.append(engine.forward(part, cache=cache).logits)
    assert cache.length == 24
    assert distance(ours.forward(ids).logits, torch.cat(found, dim=1)) <= FLOAT


def test_padding_is_not_seen(nano_pair: tuple[Model, OnnxModel]) -> None:
    ours, engine = nano_pair
    ids = torch.stack([tokens(20), tokens(20, seed=1)])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :7] = False
    whole = engine.forward(ids, mask=mask)
    expected = ours.forward(ids, mask=mask)
    assert torch.equal(whole.routes, expected.routes)
    assert bool((whole.routes[:, 1, :7] == PADDING).all())
    assert distance(expected.logits[mask], whole.logits[mask]) <= FLOAT
    alone = engine.forward(ids[1:, 7:]).logits[0]
    assert distance(alone, whole.logits[1, 7:]) <= FLOAT
    cache, parts = engine.new_cache(), []
    for start, end in ((0, 9), (9, 15), (15, 16), (16, 20)):
        seen = mask[:, :end] if start < 15 else None  # which the cache remembers
        parts.append(engine.forward(ids[:, start:end], cache=cache, mask=seen).logits)
    assert distance(whole.logits[mask], torch.cat(parts, dim=1)[mask]) <= FLOAT


def test_selected_states_are_independent(nano_pair: tuple[Model, OnnxModel]) -> None:
    _, engine = nano_pair
    cache = engine.new_cache()
    engine.forward(torch.stack([tokens(9), tokens(9, seed=1)]), cache=cache)
    before = {name: array.copy() for name, array in cache.arrays.items()}
    fork = cache.select([1, 1, 0])
    assert isinstance(fork, OnnxStates)
    for array in fork.arrays.values():
        array += 1
    assert all(np.array_equal(before[name], cache.arrays[name]) for name in before)
    again = cache.select([1])
    step = engine.forward(tokens(1)[None], cache=again).logits[0]
    both = engine.forward(tokens(1)[None].expand(2, -1), cache=cache).logits[1]
    assert distance(step, both) <= FLOAT


def test_joined_states_go_on_as_they_would_alone(nano_pair: tuple[Model, OnnxModel]) -> None:
    _, engine = nano_pair
    long, short, joined = tokens(14), tokens(6, seed=1), []
    for ids in (long, short):
        joined.append(engine.new_cache())
        engine.forward(ids[None], cache=joined[-1])
    both = joined[0].join(joined[1])
    assert both.length == 14
    assert both.valid is not None
    found = engine.forward(torch.tensor([[7], [8]]), cache=both).logits
    for row, (ids, token) in enumerate(((long, 7), (short, 8))):
        alone = engine.forward(torch.cat([ids, torch.tensor([token])])[None]).logits[0, -1:]
        assert distance(alone, found[row]) <= FLOAT
    alone = both.select([1]).join(joined[1])
    assert alone.length == 7
    assert {array.shape[2] for array in alone.arrays.values() if array.ndim == 4} == {7}


def test_sequences_join_a_running_batch(made: Made) -> None:
    engine = OnnxModel(open_model(str(made("bundled", 0, "onnx"))))
    how = Sampling(1.0, top_p=0.95)
    tasks = [Task(prompt, 16, how, (i,)) for i, prompt in enumerate(PROMPTS)]
    decoder, found = Decoder(engine), [[] for _ in tasks]
    for task in tasks:
        decoder.add([task])
        for _ in range(3):
            for step in decoder.step():
                found[step.sequence].append(step.token)
    while len(decoder):
        for step in decoder.step():
            found[step.sequence].append(step.token)
    assert found == [c.tokens for c in complete(engine, PROMPTS, max_new_tokens=16, sampling=how)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_generation_equals_our_runtime(made: Made, sampling: Sampling, chunk: int | None) -> None:
    opened = open_model(str(made("bundled", 0, "onnx")))
    ours, theirs = (
        complete(engine, PROMPTS, max_new_tokens=24, sampling=sampling, prefill_chunk=chunk,
                 stop_ids={5})
        for engine in (Model(opened), OnnxModel(opened))
    )  # fmt: skip
    assert ours == theirs
    assert sum(len(completion.tokens) for completion in ours) > 24


# --- what it proves ------------------------------------------------------------------------------


def test_validating_the_same_codes(made: Made, bundled: Path) -> None:
    reference = open_model(str(bundled))
    sequences = load_sequences(reference, None, tokens=600, length=300)
    opened = open_model(str(made("bundled", 4, "onnx")))
    split = open_model(str(made("bundled", 4, "compressed-tensors")))

    def judged(exact: bool) -> Report:
        return validate(reference, opened, sequences, engine=OnnxModel(opened, exact))

    exact, deployed = judged(True), judged(False)
    ours = validate(reference, split, sequences)
    assert (ours.engine, ours.packing) == ("reference runtime", "compressed-tensors")
    assert exact.engine == f"onnxruntime {ort.__version__}, exact"
    assert deployed.engine == f"onnxruntime {ort.__version__}, as deployed"
    assert exact.kl_mean == pytest.approx(ours.kl_mean, rel=0.01)
    assert exact.router_agreement_by_layer == ours.router_agreement_by_layer
    assert exact.skip_rate == ours.skip_rate > 0
    assert 0 < deployed.kl_mean < 10 * ours.kl_mean
    assert 0.97 < min(deployed.router_agreement_by_layer) < 1
    assert {report.verdict for report in (ours, exact, deployed)} == {"pass"}


# --- what it refuses -----------------------------------------------------------------------------


def test_senseless_inputs(nano_pair: tuple[Model, OnnxModel]) -> None:
    for engine in nano_pair:
        with pytest.raises(InputError, match=r"token ids must lie in 0\.\.95"):
            engine.forward(torch.tensor([[3, 96]]))
        with pytest.raises(InputError, match="at least one token"):
            engine.forward(torch.empty(1, 0, dtype=torch.long))
        with pytest.raises(InputError, match=r"mask has shape \[1, 3\], expected \[1, 2\]"):
            engine.forward(torch.tensor([[3, 4]]), mask=torch.ones(1, 3))
        with pytest.raises(InputError, match="nothing to evaluate"):
            engine.evaluate([])


def test_without_onnxruntime(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"pip install 'zaya-convert\[onnx\]'"):
        OnnxModel(open_model(str(made("nano", 0, "onnx"))))


def unknown_operator(graph: onnx.GraphProto) -> None:
    graph.node[0].op_type = "Nonsense"


def another_output(graph: onnx.GraphProto) -> None:
    graph.output[1].name = "past.0.key"


def no_router(graph: onnx.GraphProto) -> None:
    next(node for node in graph.node if node.op_type == "ArgMax").op_type = "ArgMin"


def no_head(graph: onnx.GraphProto) -> None:
    next(node for node in graph.node if "logits" in node.output).input[0] = "input_ids"


def another_state(graph: onnx.GraphProto) -> None:
    state = next(value for value in graph.input if value.name.endswith("0.shift_state"))
    state.type.tensor_type.shape.dim[1].dim_value += 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unknown_operator, "onnxruntime cannot run the graph: .*Nonsense"),
        (another_output, r"model\.onnx: is built in another way"),
        (no_router, r"model\.onnx: is built in another way"),
        (no_head, r"model\.onnx: is built in another way"),
        (another_state, "onnxruntime cannot run the graph: .*shift_state"),
    ],
)
def test_graphs_of_another_make(
    made: Made, tmp_path: Path, damage: Callable[[onnx.GraphProto], None], message: str
) -> None:
    folder = Path(shutil.copytree(made("nano", 0, "onnx"), tmp_path / "copy"))
    path = folder / "onnx" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    damage(model.graph)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=message):
        OnnxModel(open_model(str(folder))).forward(tokens(3)[None])


def test_memory_of_logits(
    nano_pair: tuple[Model, OnnxModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long texts run in parts, none of which gives logits."""
    _, engine = nano_pair
    monkeypatch.setattr(onnx_engine, "_COLUMNS", 8)
    monkeypatch.delattr(engine, "_head")
    found = engine.evaluate([tokens(30)])
    assert found.hidden[0].shape == (30, engine.config.hidden)
    assert "logits" not in engine._outputs
