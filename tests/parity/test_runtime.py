"""Every way of running the same tokens gives the same logits: the runtime against itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parity.random_models import BASE, favour_skip, write_checkpoint
from zaya_convert.checkpoint import Checkpoint, open_source
from zaya_convert.config import ModelConfig
from zaya_convert.errors import InputError
from zaya_convert.layout import TensorKey
from zaya_convert.runtime.cache import Cache
from zaya_convert.runtime.model import Model, Output

SAME = 1e-6  # the exact mode gives equal bits here; other BLAS libraries may round elsewhere
PLAIN = 1e-4  # fp32 accumulated in fp32
TOKENS = 100


def tokens(config: ModelConfig, count: int = TOKENS, rows: int = 1, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(4, config.vocab_rows, (rows, count), generator=draw)


def chunked(model: Model, ids: Tensor, size: int, mask: Tensor | None = None) -> Output:
    cache, parts = model.new_cache(), []
    for piece in ids.split(size, dim=1):
        seen = None if mask is None else mask[:, : cache.length + piece.shape[1]]
        parts.append(model.forward(piece, cache=cache, mask=seen))
    assert cache.length == ids.shape[1]
    return Output(
        torch.cat([part.logits for part in parts], dim=1),
        torch.cat([part.routes for part in parts], dim=2),
        torch.cat([part.weights for part in parts], dim=2),
    )


def worst(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("size", [1, 3, 7, 64])
def test_chunks_equal_the_whole(source: Checkpoint, size: int, exact: bool) -> None:
    model = Model(source, exact=exact)
    ids = tokens(source.config)
    whole, parts = model.forward(ids), chunked(model, ids, size)
    assert worst(whole.logits, parts.logits) <= (SAME if exact else PLAIN)
    assert torch.equal(whole.routes, parts.routes)


@pytest.mark.parametrize("size", [1, 7, 60])
def test_left_padded_batch_equals_single_sequences(source: Checkpoint, size: int) -> None:
    model = Model(source)
    ids, lengths = tokens(source.config, 60, rows=3), (60, 35, 1)
    batch, mask = torch.zeros_like(ids), torch.zeros(3, 60, dtype=torch.bool)
    for row, length in enumerate(lengths):
        batch[row, 60 - length :] = ids[row, :length]
        mask[row, 60 - length :] = True
    out = chunked(model, batch, size, mask)
    for row, length in enumerate(lengths):
        alone = model.forward(ids[row : row + 1, :length])
        assert worst(out.logits[row, 60 - length :], alone.logits[0]) <= SAME
        assert torch.equal(out.routes[:, row, 60 - length :], alone.routes[:, 0])
    assert bool((out.routes[:, ~mask] == -1).all())


def test_decoding_after_padding_needs_no_mask(source: Checkpoint) -> None:
    model, ids = Model(source), tokens(source.config, 12)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = torch.arange(17)[None] >= 5
    cache = model.new_cache()
    model.forward(padded[:, :15], cache=cache, mask=mask[:, :15])
    last = [model.forward(padded[:, i : i + 1], cache=cache).logits for i in (15, 16)]
    assert worst(torch.cat(last, dim=1), model.forward(ids).logits[:, -2:]) <= SAME


def test_streaming_weights_change_nothing(source: Checkpoint) -> None:
    ids = tokens(source.config, 50)
    for dtype in (torch.float32, torch.bfloat16):
        kept = Model(source, dtype).forward(ids)
        read = Model(source, dtype, resident=False).forward(ids)
        assert torch.equal(kept.logits, read.logits)
        assert torch.equal(kept.routes, read.routes)


def test_head_in_blocks(source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(source.config, 20)
    whole = Model(source).forward(ids)
    monkeypatch.setattr("zaya_convert.runtime.weights._HEAD_BLOCK_BYTES", 7 * 64 * 8)
    model = Model(source, resident=False)
    assert len(list(model.weights.head_blocks())) == -(-source.config.vocab_rows // 7)
    assert worst(model.forward(ids).logits, whole.logits) <= SAME


def test_evaluate_equals_forward(source: Checkpoint) -> None:
    model, done = Model(source, resident=False), []
    sequences = [tokens(source.config, n, seed=n)[0] for n in (40, 1, 17)]
    result = model.evaluate(sequences, lambda i, n: done.append((i, n)))
    assert done == [(i + 1, source.config.layers) for i in range(source.config.layers)]
    routes = result.routes.split([40, 1, 17], dim=1)
    for ids, hidden, chosen in zip(sequences, result.hidden, routes, strict=True):
        alone = model.forward(ids[None])
        assert worst(model.logits(hidden), alone.logits[0]) <= SAME
        assert torch.equal(chosen, alone.routes[:, 0])


def test_evaluate_reads_each_expert_once(
    source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[TensorKey] = []
    original = Checkpoint.read

    def count(self: Checkpoint, key: TensorKey) -> object:
        read.append(key)
        return original(self, key)

    monkeypatch.setattr(Checkpoint, "read", count)
    sequences = [tokens(source.config, 30, seed=n)[0] for n in range(3)]
    Model(source, resident=False).evaluate(sequences)
    assert len(read) == len(set(read))


def test_last_only(source: Checkpoint) -> None:
    model, ids = Model(source), tokens(source.config, 9)
    out = model.forward(ids, last_only=True)
    assert out.logits.shape == (1, 1, source.config.vocab_rows)
    assert worst(out.logits[:, 0], model.forward(ids).logits[:, -1]) <= SAME


def test_selecting_and_forking_a_cache(source: Checkpoint) -> None:
    model, ids = Model(source), tokens(source.config, 30, rows=3)
    cache = model.new_cache()
    model.forward(ids[:, :25], cache=cache)
    swapped = cache.select([2, 0])
    tail = torch.stack([ids[2, 25:], ids[0, 25:]])
    out = model.forward(tail, cache=swapped).logits
    whole = model.forward(ids).logits[:, 25:]
    assert worst(out, whole[[2, 0]]) <= SAME
    forked = cache.select([1]).fork(2)
    out = model.forward(ids[1:2, 25:].expand(2, -1), cache=forked).logits
    assert worst(out, whole[[1, 1]]) <= SAME
    # The first cache was not disturbed by its descendants.
    assert cache.length == 25
    assert worst(model.forward(ids[:, 25:], cache=cache).logits, whole) <= SAME


def test_sliding_layers_drop_what_they_left_behind() -> None:
    config = replace(BASE, windows=(0, 17, 0))
    sliding, full = Cache(config).keys_values[1], Cache(config).keys_values[0]
    for step in range(500):
        column = torch.full((1, 2, 1, 4), float(step))
        keys, _ = sliding.append(column, column)
        assert keys[0, 0, :, 0].tolist() == list(range(max(0, step - 16), step + 1))
        assert full.append(column, column)[0].shape[2] == step + 1
    assert sliding.buffer is not None
    assert sliding.buffer.shape[3] <= 64


def test_skipped_rows_reach_no_expert(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, BASE, change=favour_skip(BASE, 0.2))
    source = open_source(folder)
    seen: list[tuple[int, str, int, int]] = []
    sequences = [tokens(BASE, 50)[0], tokens(BASE, 33, seed=2)[0]]
    result = Model(source).evaluate(
        sequences,
        observer=lambda layer, site, rows, expert: seen.append((layer, site, len(rows), expert)),
    )
    assert 5 < int((result.routes == BASE.experts).sum()) < 200
    for layer in range(BASE.layers):
        counts = torch.bincount(result.routes[layer], minlength=BASE.experts + 1).tolist()
        for site in ("gate_up_proj", "down_proj"):
            found = {e: n for at, s, n, e in seen if (at, s) == (layer, site)}
            assert found == {e: n for e, n in enumerate(counts[:-1]) if n}
        for site in ("qkv_proj", "o_proj", "router"):
            assert sum(n for at, s, n, _ in seen if (at, s) == (layer, site)) == 83


def test_observed_rows_leave_out_padding(source: Checkpoint) -> None:
    seen: dict[str, int] = {}

    def observe(layer: int, site: str, rows: Tensor, expert: int) -> None:
        if layer == 0:
            seen[site] = seen.get(site, 0) + len(rows)

    mask = torch.arange(10)[None] >= 4
    Model(source).forward(tokens(source.config, 10), mask=mask, observer=observe)
    assert (seen["qkv_proj"], seen["o_proj"], seen["router"]) == (6, 6, 6)
    assert seen["gate_up_proj"] == seen["down_proj"] <= 6


def test_router_weight_is_the_unbiased_probability(tmp_path: Path) -> None:
    def push(key: TensorKey, value: Tensor) -> Tensor:
        return value.index_fill(0, torch.tensor([3]), 5.0) if "balancing" in key.part else value

    plain = open_source(write_checkpoint(tmp_path / "a", BASE))
    pushed = open_source(write_checkpoint(tmp_path / "b", BASE, change=push))
    ids = tokens(BASE, 40)
    out = Model(pushed).forward(ids)
    assert bool((out.routes == 3).all())
    assert bool((out.weights < 1).all())
    free = Model(plain).forward(ids)
    same = free.routes[0] == 3
    assert torch.equal(out.weights[0][same], free.weights[0][same])


@pytest.mark.parametrize("state", ["keys_values", "conv", "delayed"])
def test_each_state_matters(source: Checkpoint, state: str) -> None:
    model, ids = Model(source), tokens(source.config, 20)
    cache = model.new_cache()
    model.forward(ids[:, :10], cache=cache)
    fresh = model.new_cache()
    if state == "keys_values":
        for layer in cache.keys_values:
            assert layer.buffer is not None
            layer.buffer.zero_()
    else:
        setattr(cache, state, getattr(fresh, state))
    out = model.forward(ids[:, 10:], cache=cache).logits
    assert worst(out, model.forward(ids).logits[:, 10:]) > 1e-2


def test_bad_input_is_named(source: Checkpoint) -> None:
    model = Model(source)
    with pytest.raises(InputError, match=r"token ids must lie in 0\.\.159"):
        model.forward(torch.tensor([[160]]))
    with pytest.raises(InputError, match="at least one token"):
        model.forward(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(InputError, match="nothing to evaluate"):
        model.evaluate([])
    with pytest.raises(InputError, match="mask has shape"):
        model.forward(torch.zeros(1, 3, dtype=torch.long), mask=torch.ones(1, 2))
