"""transformers' model on the Triton kernels: on a GPU, or in triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parity.random_models import BASE, favour_skip, write_checkpoint
from zaya_convert import hf
from zaya_convert.checkpoint import open_source
from zaya_convert.convert import execute
from zaya_convert.models import open_model
from zaya_convert.oracle import _load_matrix_by_matrix  # pyright: ignore[reportPrivateUsage]
from zaya_convert.plan import make_plan
from zaya_convert.recipe import Recipe, Rule
from zaya_kernels.triton import launch

pytest.importorskip("triton", reason="triton is not installed (extra: gpu)")
pytest.importorskip("transformers", reason="needs the extra: pip install '.[oracle]'")
if not launch.interpreting() and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cpu" if launch.interpreting() else "cuda"


@torch.no_grad()
def test_logits_and_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "s", BASE, seed=3, change=favour_skip(BASE, 0.15))
    rules = (Rule("experts", 4, 32), Rule("attention", 3, -1))
    plan = make_plan(open_source(folder), Recipe("t", "", rules), "compressed-tensors")
    execute(plan, tmp_path / "a")
    calls: list[int] = []
    into = launch.moe_ffn_into

    def watch(out: torch.Tensor, *arguments: Any) -> None:
        calls.append(len(out))
        into(out, *arguments)

    monkeypatch.setattr(launch, "moe_ffn_into", watch)
    model: Any = hf.load_in_transformers(tmp_path / "a", torch.float32, DEVICE)
    assert model.model.layers[0].mlp.experts.banks[0].packed_0.device.type == DEVICE
    ids = torch.randint(4, BASE.vocab_rows, (1, 24), generator=torch.Generator().manual_seed(1))
    found = model(ids.to(DEVICE)).logits.cpu()
    assert calls == [24] * BASE.layers
    reference: Any = _load_matrix_by_matrix(open_model(str(tmp_path / "a")), torch.float32)
    torch.testing.assert_close(found, reference(ids).logits, rtol=1e-3, atol=1e-3)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(ids)
    ours = model.generate(ids.to(DEVICE), attention_mask=mask.to(DEVICE), **options)
    assert torch.equal(ours.cpu(), reference.generate(ids, attention_mask=mask, **options))
