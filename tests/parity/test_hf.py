"""Artifacts in transformers' model with packed weights, against the same model dequantized."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tolerances
from parity.random_models import BASE, VARIANTS, favour_skip, write_checkpoint
from parity.test_oracle import restless
from zaya_convert import hf
from zaya_convert.checkpoint import Checkpoint, open_source
from zaya_convert.convert import execute
from zaya_convert.errors import InputError, UsageError
from zaya_convert.layout import TensorKey
from zaya_convert.models import open_model
from zaya_convert.oracle import _load_matrix_by_matrix  # pyright: ignore[reportPrivateUsage]
from zaya_convert.plan import make_plan
from zaya_convert.recipe import Recipe, Rule
from zaya_kernels import native

pytest.importorskip("transformers", reason="needs the extra: pip install '.[oracle]'")

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.bfloat16)
TOKENS = 96
INT4 = Rule("experts", 4, 32)
# packing, rules: what every kind of file holds
ARTIFACTS: dict[str, tuple[str, tuple[Rule, ...]]] = {
    "compressed-tensors": ("compressed-tensors", (INT4, Rule("attention", 8, 32))),
    "compressed-tensors int3 per channel": (
        "compressed-tensors", (Rule("experts", 3, -1), Rule("attention", 5, 64))
    ),
    "compressed-tensors, bits by expert": (
        "compressed-tensors",
        (Rule("*experts.[0-4].*", 8, 32), Rule("*experts.7.up_proj", 8, 32),
         Rule("*experts.9.down_proj", keep=True), INT4),
    ),
    "auto-round": ("auto-round", (INT4, Rule("attention", 4, 32))),
    "gguf": ("gguf", (INT4, Rule("attention", 8, 32), Rule("embedding", 8, 32))),
    "gguf Q4_1": (
        "gguf", (INT4, Rule("attention", type="Q4_1", method="absmax"), Rule("embedding", 8, 32))
    ),
    "onnx": ("onnx", (INT4, Rule("attention", 8, 32), Rule("embedding", 8, 32))),
    "onnx asymmetric": ("onnx", (Rule("experts", 4, 32, False), Rule("attention", 8, 32))),
    "source": ("", ()),
}  # fmt: skip
NEEDS = {"gguf": "gguf", "onnx": "onnx"}
ONNX_CAN = {"head_dim": 32, "rotary_dim": 16}  # as narrow as a head may be there
MODEL = replace(BASE, **ONNX_CAN)


def change(key: TensorKey, value: Tensor) -> Tensor:
    """Greedy continuations that wander, and a skip expert that is chosen."""
    return favour_skip(MODEL, 0.7)(key, restless(key, value))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("hf") / "source"
    return open_source(write_checkpoint(folder, MODEL, seed=5, change=change))


@pytest.fixture(scope="module")
def artifacts(
    source: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    folder, made = tmp_path_factory.mktemp("artifacts"), {"source": source.path}

    def make(name: str) -> Path:
        packing, rules = ARTIFACTS[name]
        if packing in NEEDS:
            pytest.importorskip(NEEDS[packing])
        if name not in made:
            path = folder / re.sub(r"\W+", "-", name)
            execute(make_plan(source, Recipe("t", "", rules), packing), path)
            made[name] = path
        return made[name]

    return make


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Warnings are errors, except where a test expects them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "matrices held as")
        yield


def tokens(count: int = TOKENS, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(4, MODEL.vocab_rows, (1, count), generator=draw)


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model(ids, **options).logits.float()


# one expert whose gate and up are of two grids
NOT_PACKED = {"compressed-tensors-bits-by-expert": "3 of int4 .* 3 of int8"}


def load(path: Path, dtype: torch.dtype, **options: Any) -> Any:
    if path.name in NOT_PACKED:
        found = f"held as .* no kernel takes as they are: {NOT_PACKED[path.name]}"
        with pytest.warns(UserWarning, match=found):
            return hf.load_in_transformers(path, dtype, **options)
    return hf.load_in_transformers(path, dtype, **options)


def dequantized(path: Path, dtype: torch.dtype) -> Any:
    """transformers' own code throughout, on the floats that the file stands for."""
    return _load_matrix_by_matrix(open_model(str(path)), dtype)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """In the median of tokens: one that a rounding error routes otherwise outweighs the others."""
    error = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    # Every one of three layers rounds a few times what the next one reads.
    return float(error.median()) <= 8 * tolerances.kernel(dtype, MODEL.hidden)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ARTIFACTS)
def test_logits(name: str, dtype: torch.dtype, artifacts: Callable[[str], Path]) -> None:
    path, ids = artifacts(name), tokens()
    model = load(path, dtype)
    wanted = logits_of(dequantized(path, dtype), ids)
    assert close(logits_of(model, ids), wanted, dtype)
    assert float(wanted.std()) > 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["compressed-tensors", "gguf", "onnx asymmetric"])
def test_generate(name: str, dtype: torch.dtype, artifacts: Callable[[str], Path]) -> None:
    path, prompt = artifacts(name), tokens(20, seed=7)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 24, "do_sample": False,
               "eos_token_id": None}  # fmt: skip
    found = load(path, dtype).generate(prompt, **options)
    reference = dequantized(path, dtype)
    if dtype == torch.float32:
        assert torch.equal(found, reference.generate(prompt, **options))
    # In bf16 two words can be as good as each other, and so can two experts: nearly every word is
    # the reference's best, or within a rounding error of it.
    logits = logits_of(reference, found)[0, len(prompt[0]) - 1 : -1]
    chosen = logits.gather(1, found[0, len(prompt[0]) :, None])[:, 0]
    slack = 8 * tolerances.kernel(dtype, MODEL.hidden) * logits.abs().amax(1)
    assert float((logits.amax(1) - chosen <= slack).float().mean()) > 0.9
    assert len(found[0, len(prompt[0]) :].unique()) > 2


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_variants(variant: str, tmp_path: Path) -> None:
    config = replace(VARIANTS[variant], **ONNX_CAN)
    checkpoint = open_source(write_checkpoint(tmp_path / "source", config, seed=3))
    rules = (INT4, Rule("attention", 8, 32), Rule("embedding", 8, 32))
    execute(make_plan(checkpoint, Recipe("t", "", rules), "onnx"), tmp_path / "a")
    model: Any = hf.load_in_transformers(tmp_path / "a", torch.float32)
    assert isinstance(model.lm_head, hf.PackedLinear)
    assert (model.lm_head.bias is not None) == config.lm_head_bias
    ids = torch.randint(4, config.vocab_rows, (1, 50))
    wanted = logits_of(dequantized(tmp_path / "a", torch.float32), ids)
    assert close(logits_of(model, ids), wanted, torch.float32)


def test_left_padding(artifacts: Callable[[str], Path]) -> None:
    path, ids = artifacts("compressed-tensors"), tokens(60)[0]
    batch, mask = torch.zeros(2, 60, dtype=torch.long), torch.ones(2, 60, dtype=torch.long)
    batch[0], batch[1, 25:], mask[1, :25] = ids, ids[:35], 0
    wanted = logits_of(dequantized(path, torch.float32), batch, attention_mask=mask)
    found = logits_of(load(path, torch.float32), batch, attention_mask=mask)
    assert close(found[mask == 1], wanted[mask == 1], torch.float32)


def packed_bytes(model: Any) -> dict[str, int]:
    """Bytes of quantized matrices by owner, a shared one counted once."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for name, buffer in model.named_buffers():
        if "packed" in name and buffer.data_ptr() not in seen:
            seen.add(buffer.data_ptr())
            kind = "experts" if "experts" in name else "attention" if "attn" in name else "head"
            sizes[kind] = sizes.get(kind, 0) + buffer.nbytes
    return sizes


def test_what_is_quantized_stays_codes(artifacts: Callable[[str], Path]) -> None:
    model = load(artifacts("gguf"), torch.float32)
    sizes, config = packed_bytes(model), open_model(str(artifacts("gguf"))).config
    weights = config.layers * config.experts * 3 * config.hidden * config.expert_width
    assert weights * 4.5 / 8 <= sizes["experts"] < weights * 4.5 / 8 * 4.1  # columns padded to 128
    assert sizes["head"] < 2.2 * config.vocab_rows * config.hidden  # one for embedding and head
    assert not any(p.ndim == 3 and "experts" in name for name, p in model.named_parameters())
    assert all(p.numel() < 20_000 for p in model.parameters())
    assert isinstance(model.model.embed_tokens, hf.PackedEmbedding)


def test_skipped_tokens_reach_no_expert(
    artifacts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(artifacts("compressed-tensors"), torch.float32)
    seen: list[Tensor] = []
    bank = hf.ExpertBank.forward

    def watch(self: hf.ExpertBank, x: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
        seen.append(ids)
        return bank(self, x, ids, shares)

    monkeypatch.setattr(hf.ExpertBank, "forward", watch)
    logits_of(model, tokens())
    ids = torch.stack(seen)
    assert ids.shape == (MODEL.layers, TOKENS)
    share = float((ids == -1).float().mean())
    assert 0.02 < share < 0.6
    seen.clear()
    for layer in model.model.layers:  # everything is skipped
        layer.mlp.gate.balancing_biases[-1] = 10.0
    monkeypatch.setattr(native, "_run", lambda *_: pytest.fail("an expert was computed"))
    logits_of(model, tokens())
    assert bool((torch.stack(seen) == -1).all())


def test_biases_of_the_router_are_those_of_the_file(artifacts: Callable[[str], Path]) -> None:
    model = load(artifacts("compressed-tensors"), torch.bfloat16)
    for layer in model.model.layers:
        biases = layer.mlp.gate.balancing_biases
        assert biases.dtype == torch.float32
        assert float(biases[-1]) == pytest.approx(0.7)


def test_experts_of_a_float_model(source: Checkpoint) -> None:
    reference = dequantized(source.path, torch.float32)
    ids = tokens()
    wanted = logits_of(reference, ids)
    hf.register()
    reference.set_experts_implementation(hf.NAME)
    assert close(logits_of(reference, ids), wanted, torch.float32)


def test_fast_rounds_activations(artifacts: Callable[[str], Path]) -> None:
    path, ids = artifacts("compressed-tensors"), tokens()
    if native.can_run_fast(hf.Request(fast=True, layout="tiles")):
        pytest.skip("the native library is not here")
    wanted = logits_of(load(path, torch.float32), ids)
    found = logits_of(load(path, torch.float32, fast=True), ids)
    error = float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())
    assert 1e-3 < error < 0.1


def test_converting_the_model_leaves_the_bytes(artifacts: Callable[[str], Path]) -> None:
    model = load(artifacts("onnx asymmetric"), torch.float32)
    before = {name: b.clone() for name, b in model.named_buffers() if "packed" in name}
    model.to(torch.bfloat16)
    assert all(torch.equal(before[name], b) for name, b in model.named_buffers() if name in before)
    assert len(before) > 10


def test_what_cannot_be(artifacts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = artifacts("compressed-tensors")
    with pytest.raises(UsageError, match="not saved again"):
        load(path, torch.float32).save_pretrained("somewhere")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "meta"):
        with pytest.raises(UsageError, match=f"no device '{device}'"):
            hf.load_in_transformers(path, device=device)
    with pytest.raises(InputError, match="no such folder"):
        hf.load_in_transformers(path / "nothing")
    monkeypatch.setattr("zaya_convert.oracle.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs transformers"):
        hf.load_in_transformers(path)


def test_the_documented_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "artifacts.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.S)
    (code,) = (example for example in examples if "load_in_transformers(" in example)
    rules = (INT4, Rule("attention", 8, 32))
    plan = make_plan(open_model(None), Recipe("t", "", rules), "compressed-tensors")
    execute(plan, tmp_path / "a")
    assert code.count('"out/zaya1-tiny-int4"') == 2
    exec(code.replace("out/zaya1-tiny-int4", str(tmp_path / "a")), {})
    assert r"\boxed{96}" in capsys.readouterr().out
