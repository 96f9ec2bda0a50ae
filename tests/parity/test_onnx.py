"""onnxruntime on our graphs against our runtime on the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from parity import random_models
from parity.random_models import VARIANTS, favour_skip, write_checkpoint
from zaya_convert.checkpoint import Checkpoint, open_source
from zaya_convert.convert import execute
from zaya_convert.errors import InputError
from zaya_convert.layout import TensorKey
from zaya_convert.models import open_model
from zaya_convert.plan import make_plan
from zaya_convert.recipe import Recipe, Rule
from zaya_convert.runtime.model import Model, Output

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from zaya_convert.export.onnx import graph, read  # noqa: E402

# Of the logits' range. Both sum in fp32, but in different orders; temperatures amplify that.
SAME = 1e-5
LENGTHS = (23, 19, 1)  # of the sequences in a left-padded batch
TOKENS = max(LENGTHS)

# GroupQueryAttention rotates multiples of 16 values.
BASE = replace(random_models.BASE, head_dim=32, rotary_dim=16)
ALL = ("experts", "attention", "embedding")


class Session:
    """A graph with its states, for a batch of sequences that go on together."""

    def __init__(self, model: Path | bytes, checkpoint: Checkpoint, batch: int = 1) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        if isinstance(model, bytes):
            folder = str(checkpoint.path / "onnx")
            options.add_session_config_entry(read.EXTERNAL_FOLDER, folder)
        self.session = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model), options,
            providers=["CPUExecutionProvider"],
        )  # fmt: skip
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.inputs = {value.name for value in self.session.get_inputs()}
        self.config, self.batch = checkpoint.config, batch
        self.reset(batch)

    def reset(self, batch: int) -> Session:
        """Forget everything."""
        shapes = graph.state_shapes(self.config, 0)
        self.states = {
            f"past_key_values.{layer}.{name}": np.zeros((batch, *shape), np.float32)
            for layer in range(self.config.layers)
            for name, shape in shapes.items()
        }
        return self

    def run(self, ids: Tensor, mask: Tensor, keep: int = 0) -> dict[str, Tensor]:
        """Outputs of a block; the states go on."""
        feeds: dict[str, Any] = {"input_ids": ids.numpy(), "attention_mask": mask.long().numpy()}
        if "num_logits_to_keep" in self.inputs:
            feeds["num_logits_to_keep"] = np.array(keep, np.int64)
        values = self.session.run(self.outputs, {**feeds, **self.states})
        found = dict(zip(self.outputs, values, strict=True))
        for name in self.states:
            self.states[name] = found.pop(name.replace("past_key_values", "present"))
        return {name: torch.from_numpy(value) for name, value in found.items()}


def batch(checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """Ids [3, T] and mask, padded on the left."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(4, checkpoint.config.vocab_rows, (len(LENGTHS), TOKENS), generator=draw)
    mask = torch.arange(TOKENS) >= TOKENS - torch.tensor(LENGTHS)[:, None]
    return ids, mask


def check(got: Tensor, expected: Tensor, limit: float = SAME) -> None:
    spread = float(expected.max() - expected.min())
    assert float((got - expected).abs().max()) <= limit * spread


def check_every_way(session: Session, reference: Output, ids: Tensor, mask: Tensor) -> None:
    """At once, in chunks and token by token."""
    whole = session.reset(len(ids)).run(ids, mask)
    check(whole["logits"][mask], reference.logits[mask])
    if "routes" in whole:
        shape = (*ids.shape, session.config.layers)
        routes = whole["routes"].view(shape).permute(2, 0, 1)
        weights = whole["route_weights"].view(shape).permute(2, 0, 1)
        assert torch.equal(routes[:, mask].int(), reference.routes[:, mask])
        assert float((weights - reference.weights)[:, mask].abs().max()) < 1e-4
    session.reset(len(ids))
    for at in range(TOKENS):
        found = session.run(ids[:, at : at + 1], mask[:, : at + 1], keep=1)["logits"][:, 0]
        check(found[mask[:, at]], reference.logits[:, at][mask[:, at]])
    for row in range(2):  # more than one new token each: the operator takes one sequence alone
        session.reset(1)
        for begin, end in ((0, 7), (7, 8), (8, 20), (20, TOKENS)):
            part = session.run(ids[row : row + 1, begin:end], mask[row : row + 1, :end])
            real = mask[row, begin:end]
            check(part["logits"][0, real], reference.logits[row, begin:end][real])


def recipe(bits: int, *roles: str, group: int = 32, symmetric: bool = True) -> Recipe:
    return Recipe("parity", "", tuple(Rule(role, bits, group, symmetric) for role in roles))


def convert(source: Checkpoint, chosen: Recipe | None, out: Path) -> Checkpoint:
    execute(make_plan(source, chosen, "onnx"), out, threads=1)
    return open_model(str(out))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_float_model(variant: str, tmp_path: Path) -> None:
    config = replace(VARIANTS[variant], head_dim=32, rotary_dim=16)
    folder = write_checkpoint(tmp_path / "src", config, 3, change=favour_skip(config, 0.15))
    source = open_source(folder)
    artifact = convert(source, None, tmp_path / "a")
    ids, mask = batch(artifact)
    reference = Model(source).forward(ids, mask=mask)
    skipped = reference.routes[:, mask] == source.config.experts
    assert 0.02 < float(skipped.float().mean()) < 0.9
    check_every_way(Session(artifact.path / "onnx" / "model.onnx", artifact), reference, ids, mask)
    exact = Session(read.exact_graph(artifact, routes=True), artifact)
    check_every_way(exact, reference, ids, mask)


@pytest.mark.parametrize(
    "chosen",
    [
        recipe(4, *ALL),
        recipe(4, *ALL, symmetric=False),
        recipe(4, *ALL, group=16),
        recipe(4, "experts", group=-1, symmetric=False),
        recipe(8, *ALL),
        recipe(8, *ALL, symmetric=False),
        recipe(8, "experts", group=-1),
        Recipe("", "", (*recipe(4, "experts").rules, *recipe(8, *ALL[1:]).rules)),
    ],
    ids=lambda chosen: " ".join(
        f"{r.match}{r.bits}g{r.group_size}{'s' if r.symmetric else 'a'}" for r in chosen.rules
    ),
)
def test_an_exact_quantized_model(chosen: Recipe, tmp_path: Path) -> None:
    tied = chosen.rules[0].bits == 4
    config = replace(BASE, expert_width=64, windows=(0, 6, 0), tied=tied)
    folder = write_checkpoint(tmp_path / "src", config, 5, change=favour_skip(config, 0.15))
    artifact = convert(open_source(folder), chosen, tmp_path / "a")
    ids, mask = batch(artifact)
    reference = Model(artifact).forward(ids, mask=mask)
    exact = Session(read.exact_graph(artifact, routes=True), artifact)
    check_every_way(exact, reference, ids, mask)


def test_what_is_shipped_is_exact_where_no_activation_is_rounded(tmp_path: Path) -> None:
    """4-bit experts are, beside float matrices."""
    folder = write_checkpoint(tmp_path / "src", BASE, 5, change=favour_skip(BASE, 0.15))
    artifact = convert(open_source(folder), recipe(4, "experts"), tmp_path / "a")
    ids, mask = batch(artifact)
    reference = Model(artifact).forward(ids, mask=mask)
    session = Session(artifact.path / "onnx" / "model.onnx", artifact)
    check_every_way(session, reference, ids, mask)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_activations_cost_little(bits: int, tmp_path: Path) -> None:
    """With the router's choices out of the way, which would flip in a model as small as this."""

    def change(key: TensorKey, value: Tensor) -> Tensor:
        if key.part == "mlp.gate.balancing_biases":
            value[key.layer] = 10.0
        return value

    folder = write_checkpoint(tmp_path / "src", BASE, 5, change=change)
    artifact = convert(open_source(folder), recipe(bits, *ALL), tmp_path / "a")
    ids, mask = batch(artifact)
    reference = Model(artifact).forward(ids, mask=mask)
    assert set(reference.routes[:, mask].unique().tolist()) == {0, 1, 2}
    session = Session(artifact.path / "onnx" / "model.onnx", artifact, len(ids))
    check(session.run(ids, mask)["logits"][mask], reference.logits[mask], 2e-2)


@pytest.mark.parametrize("chosen", [None, recipe(4, "experts"), recipe(8, "experts")])
@pytest.mark.parametrize("bias", [-1.0, 10.0])
def test_tokens_that_skip(bias: float, chosen: Recipe | None, tmp_path: Path) -> None:
    """None, or all: then every expert's output is 0."""
    folder = write_checkpoint(tmp_path / "src", BASE, 5, change=favour_skip(BASE, bias))
    artifact = convert(open_source(folder), chosen, tmp_path / "a")
    ids, mask = batch(artifact)
    reference = Model(artifact).forward(ids, mask=mask)
    assert bool((reference.routes[:, mask] == BASE.experts).all()) == (bias > 0)
    session = Session(read.exact_graph(artifact, routes=True), artifact)
    check_every_way(session, reference, ids, mask)


@pytest.mark.parametrize("chosen", [None, recipe(4, "experts")])
def test_both_flavours_say_the_same(chosen: Recipe | None, tmp_path: Path) -> None:
    """One sorts rows by expert, the other leaves quantized experts to a single operator."""
    folder = write_checkpoint(tmp_path / "src", BASE, 5, change=favour_skip(BASE, 0.15))
    artifact = convert(open_source(folder), chosen, tmp_path / "a")
    ids, mask = batch(artifact)
    reference = Model(artifact).forward(ids, mask=mask)
    for name in ("model.onnx", "model_genai.onnx"):
        session = Session(artifact.path / "onnx" / name, artifact, len(ids))
        check(session.run(ids, mask, 1)["logits"], reference.logits[:, -1:])


def test_logits_that_are_asked_for(tmp_path: Path) -> None:
    artifact = convert(open_source(write_checkpoint(tmp_path / "src", BASE)), None, tmp_path / "a")
    ids, mask = batch(artifact)
    folder = artifact.path / "onnx"
    session = Session(folder / "model.onnx", artifact)
    whole = session.reset(3).run(ids, mask)["logits"]
    assert whole.shape == (3, TOKENS, BASE.vocab_rows)
    for keep in (1, 3, TOKENS, TOKENS + 5):
        part = session.reset(3).run(ids, mask, keep)["logits"]
        assert torch.allclose(part, whole[:, -keep:], rtol=0, atol=1e-5)
    genai = Session(folder / "model_genai.onnx", artifact, 3)
    assert "num_logits_to_keep" not in genai.inputs
    assert torch.allclose(genai.run(ids, mask)["logits"], whole[:, -1:], rtol=0, atol=1e-5)


def test_data_in_several_files(tmp_path: Path) -> None:
    source = open_source(write_checkpoint(tmp_path / "src", BASE))
    plan = make_plan(source, recipe(4, *ALL), "onnx", shard_bytes=100_000)
    execute(plan, tmp_path / "a", threads=1)
    artifact = open_model(str(tmp_path / "a"))
    assert len(artifact.files) > 2
    ids, mask = batch(artifact)
    reference = Model(artifact).forward(ids, mask=mask)
    session = Session(read.exact_graph(artifact), artifact, len(ids))
    check(session.run(ids, mask)["logits"][mask], reference.logits[mask])


def test_onnxruntime_genai_says_the_same(tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    config = replace(BASE, tied=False)  # a random tied model repeats itself
    folder = write_checkpoint(tmp_path / "src", config, 5, change=favour_skip(config, 0.15))
    artifact = convert(open_source(folder), recipe(4, "experts"), tmp_path / "a")
    prompt, count = [5, 17, 33, 44, 60, 22, 9], 20
    model = genai.Model(str(artifact.path))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + count)
    generator = genai.Generator(model, params)
    generator.append_tokens(prompt[:3])
    generator.append_tokens(prompt[3:])
    while not generator.is_done():
        generator.generate_next_token()
    ours = Model(artifact)
    cache, ids = ours.new_cache(), list(prompt)
    logits = ours.forward(torch.tensor([ids]), cache=cache, last_only=True).logits
    while len(ids) < len(prompt) + count and ids[-1] not in BASE.eos_ids:
        ids.append(int(logits[0, -1].argmax()))
        logits = ours.forward(torch.tensor([ids[-1:]]), cache=cache).logits
    said = [int(token) for token in generator.get_sequence(0)]
    assert len(set(ids[len(prompt) :])) > 5
    assert said[: len(ids)] == ids


def test_models_that_clients_cannot_run(tmp_path: Path) -> None:
    config = replace(random_models.BASE, conv_taps=(2, 3))
    with pytest.raises(InputError) as caught:
        make_plan(open_source(write_checkpoint(tmp_path / "src", config)), None, "onnx")
    assert [line.split()[0] for line in caught.value.problems] == ["cca_time1", "8"]
