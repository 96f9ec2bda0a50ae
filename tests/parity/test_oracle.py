"""The runtime against transformers' ``ZayaForCausalLM``, on models with no trivial parameter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parity.random_models import BASE, VARIANTS, favour_skip, write_checkpoint
from zaya_convert import oracle
from zaya_convert.checkpoint import Checkpoint, open_source
from zaya_convert.errors import InputError, UsageError
from zaya_convert.layout import TensorKey
from zaya_convert.runtime.generate import complete
from zaya_convert.runtime.model import Model

pytest.importorskip("transformers", reason="the oracle needs the extra: pip install '.[oracle]'")

ORACLE = 1e-4  # largest logit difference to transformers, both fp32, logits of order one
TOKENS = 512


def tokens(count: int, rows: int, seed: int = 1) -> Tensor:
    return torch.randint(4, rows, (1, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model(ids, **options).logits.float()


def worst(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_fp32_logits_and_skips(source: Checkpoint) -> None:
    ids = tokens(TOKENS, source.config.vocab_rows)
    out = Model(source).forward(ids)
    reference = logits_of(oracle.load_oracle(source.path), ids)
    assert 0.5 < float(reference.std()) < 5
    assert worst(out.logits, reference) <= ORACLE
    skips = (out.routes == source.config.experts).float().mean()
    assert 0.02 < float(skips) < 0.6
    assert len(out.routes.unique()) > source.config.experts // 2
    assert worst(Model(source, exact=False).forward(ids).logits, reference) <= ORACLE


def test_forced_skips(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, BASE, seed=5, change=favour_skip(BASE, 10.0))
    source = open_source(tmp_path)
    ids = tokens(100, BASE.vocab_rows)
    out = Model(source).forward(ids)
    assert bool((out.routes == BASE.experts).all())
    assert worst(out.logits, logits_of(oracle.load_oracle(tmp_path), ids)) <= ORACLE


def test_left_padded_batch(source: Checkpoint) -> None:
    if source.config.attention_bias:
        pytest.skip("transformers leaks the bias of padded columns into its convolutions")
    ids = tokens(60, source.config.vocab_rows)[0]
    batch, mask = torch.zeros(2, 60, dtype=torch.long), torch.ones(2, 60, dtype=torch.bool)
    batch[0], batch[1, 25:] = ids, ids[:35]
    mask[1, :25] = False
    out = Model(source).forward(batch, mask=mask)
    reference = logits_of(oracle.load_oracle(source.path), batch, attention_mask=mask.long())
    assert worst(out.logits[mask], reference[mask]) <= ORACLE


def test_bf16_is_transformers_bf16(source: Checkpoint) -> None:
    ids = tokens(200, source.config.vocab_rows)
    out = Model(source, dtype=torch.bfloat16).forward(ids)
    reference = logits_of(oracle.load_oracle(source.path, torch.bfloat16), ids)
    exact = Model(source).forward(ids)
    # Far closer to transformers' bf16 than bf16 is to fp32: the same roundings at the same places.
    assert float((out.logits - reference).abs().mean()) <= 0.1 * float(
        (exact.logits - reference).abs().mean()
    )


def restless(key: TensorKey, value: Tensor) -> Tensor:
    """Random tied models repeat one token; with mixed signs in the last norm they wander."""
    if key.part == "norm.weight":
        value[::2] *= -1
    return value


@pytest.mark.parametrize("variant", ["e16", "e24-sliding"])
def test_greedy_decoding(tmp_path: Path, variant: str) -> None:
    source = open_source(write_checkpoint(tmp_path, VARIANTS[variant], seed=3, change=restless))
    prompt = tokens(20, source.config.vocab_rows, seed=7)
    theirs = oracle.load_oracle(tmp_path).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    ours = complete(Model(source), prompt.tolist(), max_new_tokens=32)
    assert ours[0].tokens == theirs[0, 20:].tolist()
    assert len(set(ours[0].tokens)) > 4


def drop_eda(key: TensorKey, value: Tensor) -> Tensor:
    return torch.zeros_like(value) if key.part.endswith("router_states_scale") else value


def drop_biases(key: TensorKey, value: Tensor) -> Tensor:
    return torch.zeros_like(value) if key.part.endswith("balancing_biases") else value


def shift_temp(key: TensorKey, value: Tensor) -> Tensor:
    return value * 1.05 if key.part.endswith("temp") else value


def shift_residual_bias(key: TensorKey, value: Tensor) -> Tensor:
    return value + 0.05 if key.part.endswith("residual_bias") else value


@pytest.mark.parametrize("change", [drop_eda, drop_biases, shift_temp, shift_residual_bias])
def test_a_changed_parameter_shows_in_both(
    tmp_path: Path, change: Callable[[TensorKey, Tensor], Tensor]
) -> None:
    ids = tokens(64, BASE.vocab_rows)
    plain = open_source(write_checkpoint(tmp_path / "plain", BASE, seed=3))
    changed = open_source(write_checkpoint(tmp_path / "changed", BASE, seed=3, change=change))
    ours = Model(changed).forward(ids).logits
    assert worst(ours, Model(plain).forward(ids).logits) > 100 * ORACLE
    assert worst(ours, logits_of(oracle.load_oracle(changed.path), ids)) <= ORACLE


def test_oracle_restores_the_skip_bias(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, BASE, change=favour_skip(BASE, 0.3))
    model: Any = oracle.load_oracle(folder)
    assert [float(layer.mlp.gate.balancing_biases[-1]) for layer in model.model.layers] == [
        pytest.approx(0.3)
    ] * BASE.layers


def test_oracle_refuses_an_incomplete_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path, VARIANTS["biased-untied"])
    source = open_source(folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        text.replace('"lm_head_bias": true', '"lm_head_bias": false')
    )
    monkeypatch.setattr(oracle, "open_model", lambda _: source)
    with pytest.raises(InputError, match=r"unexpected key lm_head\.bias"):
        oracle.load_oracle(folder)


def test_oracle_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs transformers: pip install .*oracle"):
        oracle.load_oracle(tmp_path)
