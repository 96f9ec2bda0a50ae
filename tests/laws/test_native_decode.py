"""Laws of the native decode step: what the reference computes, whatever the model and the batch.

The reference is the exact runtime on the same checkpoint. Models are small and random; quantized
ones have packed matrices, float ones show every number in between to fp32 precision.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nano import Nano
from zaya_convert.checkpoint import Checkpoint, open_source
from zaya_convert.cli.main import run
from zaya_convert.models import open_model
from zaya_convert.runtime.cache import Cache
from zaya_convert.runtime.generate import complete
from zaya_convert.runtime.model import Model, Output
from zaya_convert.runtime.tokenizer import Tokenizer
from zaya_kernels import decode, library, table

if not library.supported_isas():
    pytest.skip(library.load()[1], allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 96
# Distances of logits, as shares of their norm.
SUMS = 1e-4  # another order of sums
ROUNDED = 0.05  # activations in int8, which all layers add up, and in half of all columns
SAME_ROUNDING = 1e-3  # both ways round to int8 what differs by the order of sums
RULE = '[[rules]]\nmatch = "{}"\nbits = {}\ngroup_size = 32\nmethod = "rtn"\n'

FORMS: dict[str, dict[str, Any]] = {
    "as published": {},
    "windows": {"windows": (5, 0, 1)},
    "biases": {"attention_bias": True, "lm_head_bias": True, "windows": (0, 0, 0)},
    "one head each": {"heads": 2, "kv_heads": 2, "windows": (0, 4, 0)},
    "many queries a head": {"heads": 12, "kv_heads": 2, "head_dim": 16},
    "odd widths": {
        "hidden": 60, "head_dim": 12, "heads": 3, "kv_heads": 1, "router_width": 21,
        "expert_width": 50, "vocab_rows": 101, "rotary_dim": 6,
    },
    "whole heads rotated": {"rotary_dim": 32},
    "untied, longer convolutions": {"tied": False, "conv_taps": (3, 4)},
    "no convolutions": {"conv_taps": (1, 1)},
    "every token skips": {"skip_bias": 1.0},
    "no token skips": {"skip_bias": -1.0},
}  # fmt: skip


def native(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Model:
    """Single tokens of it take the native step, or the test ends."""
    model = Model(checkpoint, dtype, exact=False, fast=True)
    model.forward(torch.tensor([[1]]), cache=model.new_cache())
    assert model.step_refusal == ""
    return model


def tokens(rows: int, columns: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (rows, columns), generator=draw)


def in_blocks(model: Model, ids: Tensor, blocks: list[int], mask: Tensor | None = None) -> Output:
    """Everything a model says of the columns, run in blocks of these lengths."""
    assert sum(blocks) == ids.shape[1]
    cache, outs = model.new_cache(), []
    for part in ids.split(blocks, 1):
        seen = None if mask is None else mask[:, : cache.length + part.shape[1]]
        outs.append(model.forward(part, cache=cache, mask=seen))
    return joined(outs)


def joined(outs: list[Output]) -> Output:
    return Output(
        torch.cat([out.logits for out in outs], 1),
        torch.cat([out.routes for out in outs], 2),
        torch.cat([out.weights for out in outs], 2),
    )


def errors(found: Output, wanted: Output) -> Tensor:
    """Of each column [B, T]: the distance of the logits as a share of their norm."""
    return (found.logits - wanted.logits).norm(dim=-1) / wanted.logits.norm(dim=-1)


def agree(found: Output, wanted: Output, real: Tensor | None = None) -> None:
    """All that is said of the real columns, but for the order of sums."""
    real = torch.ones(found.logits.shape[:2], dtype=torch.bool) if real is None else real
    assert errors(found, wanted)[real].max() < SUMS
    assert torch.equal(found.routes, wanted.routes)
    assert torch.allclose(found.weights[:, real], wanted.weights[:, real], atol=1e-4)


def ones(count: int) -> list[int]:
    return [1] * count


@pytest.mark.parametrize("form", FORMS)
def test_the_step_computes_what_the_reference_does(form: str, nano: Nano) -> None:
    source = open_source(nano(dtype=torch.float32, **FORMS[form]))
    ids = tokens(3, 14)
    wanted = Model(source).forward(ids)
    model = native(source)
    agree(in_blocks(model, ids, ones(14)), wanted)
    agree(in_blocks(model, ids, [6, 1, 1, 2, 1, 3]), wanted)


@pytest.mark.parametrize("isa", library.supported_isas())
def test_every_instruction_set(isa: str, nano: Nano, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "options", partial(library.options, isa=isa))
    source = open_source(nano(dtype=torch.float32))
    ids = tokens(5, 9)
    agree(in_blocks(native(source), ids, ones(9)), Model(source).forward(ids))


@pytest.mark.parametrize("form", ["as published", "biases", "windows"])
def test_left_padding(form: str, nano: Nano) -> None:
    """From a prefill by torch, and with the padding itself fed token by token."""
    source = open_source(nano(dtype=torch.float32, **FORMS[form]))
    ids, mask = tokens(4, 12), torch.ones(4, 12, dtype=torch.bool)
    for row, count in enumerate((0, 3, 7, 1)):
        mask[row, :count] = False
    wanted = Model(source).forward(ids, mask=mask)
    model = native(source)
    agree(in_blocks(model, ids, [8, *ones(4)], mask), wanted, mask)
    agree(in_blocks(model, ids, ones(12), mask), wanted, mask)


def test_a_sequence_does_not_depend_on_those_beside_it(nano: Nano) -> None:
    model = native(open_source(nano(dtype=torch.float32)))
    ids = tokens(70, 4)
    together = in_blocks(model, ids, ones(4))
    for row in (0, 41, 69):
        alone = in_blocks(model, ids[row : row + 1], ones(4))
        assert torch.equal(alone.logits[0], together.logits[row])
        assert torch.equal(alone.routes[:, 0], together.routes[:, row])


def test_threads_do_not_change_a_bit(nano: Nano) -> None:
    model, ids = native(open_source(nano(dtype=torch.float32))), tokens(3, 5)
    one = in_blocks(model, ids, ones(5))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(in_blocks(model, ids, ones(5)).logits, one.logits)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("window", [0, 300])
def test_a_context_of_several_stretches(window: int, nano: Nano) -> None:
    """Longer than what attention takes at once, and than the buffers it starts with."""
    source = open_source(nano(dtype=torch.float32, windows=(0, window, 0)))
    ids = tokens(2, 640)
    mask = torch.ones(2, 640, dtype=torch.bool)
    mask[1, :270] = False  # a whole stretch that it does not see
    wanted = Model(source).forward(ids, mask=mask)
    found = in_blocks(native(source), ids, [500, *ones(140)], mask)
    agree(found, wanted, mask)


Change = Callable[[Cache], Cache]


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.select([2, 0]), [2, 0]),
        (lambda cache: cache.fork(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["select", "fork"],
)
def test_caches_change_hands(change: Change, rows: list[int], nano: Nano) -> None:
    """States made natively, selected, and used by either way."""
    source = open_source(nano(dtype=torch.float32))
    ids, more = tokens(3, 6), tokens(len(rows), 4, seed=1)
    wanted = Model(source).forward(torch.cat([ids[rows], more], 1)).logits[:, 6:]
    model = native(source)
    cache = model.new_cache()
    for part in ids.split(1, 1):
        model.forward(part, cache=cache)
    for blocks in ([4], [1, 2, 1], ones(4)):
        own = change(cache)
        outs = [model.forward(part, cache=own) for part in more.split(blocks, 1)]
        found = joined(outs).logits
        assert (found - wanted).norm() < SUMS * wanted.norm()
    assert cache.length == 6  # what was selected from is as it was


def test_batches_join(nano: Nano) -> None:
    """A shorter batch beside a longer one: padded on the left, in windows as well."""
    source = open_source(nano(dtype=torch.float32, windows=(5, 0, 9)))
    model, exact = native(source), Model(source)
    parts, more = [tokens(2, 13), tokens(3, 4, seed=1)], tokens(5, 6, seed=2)
    wanted = [
        exact.forward(torch.cat([part, own], 1)).logits[:, part.shape[1] :]
        for part, own in zip(parts, more.split([2, 3]), strict=True)
    ]
    caches: list[Cache] = []
    for part in parts:
        caches.append(model.new_cache())
        for column in part.split(1, 1):
            model.forward(column, cache=caches[-1])
    both = caches[0].join(caches[1])
    found = joined([model.forward(column, cache=both) for column in more.split(1, 1)]).logits
    assert (found - torch.cat(wanted)).norm() < SUMS * torch.cat(wanted).norm()


def test_the_bundled_model_says_the_same(bundled: Path) -> None:
    """Greedy, as the exact reference: with fp32 between products, and as ``generate`` has it."""
    checkpoint = open_model(str(bundled))
    tokenizer = Tokenizer.of(checkpoint)
    prompts = [
        tokenizer.chat([{"role": "user", "content": text}])
        for text in ("Compute 12 + 30.", "Reverse abc.", "Compute 7 * 8.")
    ]
    say = partial(complete, prompts=prompts, max_new_tokens=24, stop_ids=tokenizer.stop_ids)
    wanted = say(Model(checkpoint))
    assert all(completion.tokens for completion in wanted)
    for dtype in (torch.float32, torch.bfloat16):
        assert say(native(checkpoint, dtype)) == wanted


def test_states_of_another_batch_are_refused(nano: Nano) -> None:
    model = native(open_source(nano(dtype=torch.float32)))
    cache = model.new_cache()
    model.forward(tokens(3, 4), cache=cache)
    with pytest.raises(ValueError, match=r"2 sequences of torch.float32 continue states of 3"):
        model.forward(tokens(2, 1), cache=cache)
    wide = Model(open_source(nano(dtype=torch.float32)))
    other = wide.new_cache()
    wide.forward(tokens(3, 4), cache=other)
    with pytest.raises(ValueError, match=r"continue states of 3 of torch.float64"):
        model.forward(tokens(3, 1), cache=other)


def test_who_watches_sees_blocks(nano: Nano) -> None:
    """An observer is shown what torch computes: the native step has nothing to show."""
    model, sites = native(open_source(nano(dtype=torch.float32))), set[str]()
    model.forward(
        tokens(2, 1),
        cache=model.new_cache(),
        observer=lambda layer, site, rows, expert: sites.add(site),
    )
    assert {"qkv_proj", "o_proj", "router"} <= sites


@pytest.fixture(scope="module", params=["everything", "experts"])
def quantized(
    request: pytest.FixtureRequest, nano: Nano, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    """All matrices in 4 and 8 bits, or experts only beside bf16."""
    folder: Path = tmp_path_factory.mktemp("step")
    rules = {"experts": 4, "attention": 8, "embedding": 8}
    kind = "gguf"
    if request.param == "experts":
        rules, kind = {"experts": 4}, "safetensors"
    text = "".join(RULE.format(*rule) for rule in rules.items())
    (folder / "recipe.toml").write_text(f'description = "step"\n{text}')
    arguments = ["--recipe", folder / "recipe.toml", "--format", kind, "-o", folder / "out", "-q"]
    assert run([str(part) for part in ("quantize", nano(windows=(0, 0, 0)), *arguments)]) == 0
    return open_model(str(folder / "out"))


@pytest.mark.parametrize("real", [1, 3, 4, 5])
@pytest.mark.parametrize("threads", [2, 5])
def test_threads_share_packed_matrices(real: int, threads: int, quantized: Checkpoint) -> None:
    """Of seven rows some are padding still: fewer reach the experts than are there."""
    model, ids = native(quantized), tokens(7, 4)
    mask = torch.ones(7, 4, dtype=torch.bool)
    mask[real:, :3] = False
    one = in_blocks(model, ids, ones(4), mask)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = in_blocks(model, ids, ones(4), mask)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.logits[mask], one.logits[mask])


@pytest.mark.parametrize("isa", library.supported_isas())
def test_packed_matrices(isa: str, quantized: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "options", partial(library.options, isa=isa))
    ids = tokens(6, 8)
    wanted, fast = Model(quantized).forward(ids), native(quantized)
    found = in_blocks(fast, ids, [3, *ones(5)])
    # Where a choice of the router is close, rounding may change it, and all that follows.
    assert errors(found, wanted).median() < ROUNDED
    assert errors(found, fast.forward(ids)).median() < SAME_ROUNDING
    monkeypatch.setenv(table.ENVIRONMENT, "native")
    agree(in_blocks(native(quantized), ids, [3, *ones(5)]), wanted)


def test_the_default_of_generate(quantized: Checkpoint) -> None:
    """States in bf16, activations in int8: no further from what is exact than blocks are."""
    ids = tokens(6, 8)
    wanted, model = Model(quantized).forward(ids), native(quantized, torch.bfloat16)
    steps, blocks = in_blocks(model, ids, ones(8)), model.forward(ids)
    assert errors(steps, wanted).median() < 1.2 * errors(blocks, wanted).median()


def refused(model: Model) -> str:
    model.forward(tokens(1, 1), cache=model.new_cache())
    return model.step_refusal


def test_refusals(nano: Nano, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(nano())
    general = "for resident weights and fast kernels only"
    assert refused(Model(source)) == general
    assert refused(Model(source, torch.bfloat16)) == general
    assert refused(Model(source, torch.bfloat16, resident=False, fast=True)) == general
    monkeypatch.setenv(table.ENVIRONMENT, "reference")
    assert refused(Model(source, torch.bfloat16, fast=True)) == "ZAYA_KERNELS=reference"
    monkeypatch.delenv(table.ENVIRONMENT)
    monkeypatch.setattr(decode, "load", lambda: (None, "no library in here"))
    assert refused(Model(source, torch.bfloat16, fast=True)) == "no library in here"
    monkeypatch.undo()
    assert refused(Model(source, torch.float16, fast=True)) == "for fp32 and bf16 only"


def test_matrices_of_two_minds(quantized: Checkpoint) -> None:
    """Rounded activations for some matrices, not for others: told, and computed by blocks."""
    model = Model(quantized, torch.bfloat16, fast=True)
    packed = model.weights.expert(1, 2)
    packed.gate.fast = False  # pyright: ignore
    assert refused(model) == "some matrices round activations, others do not"
