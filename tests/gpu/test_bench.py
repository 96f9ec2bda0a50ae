"""``bench --gpu`` at toy size, in triton's interpreter: its results, not its times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from zaya_convert.bench import gpu
from zaya_kernels.triton import configs, launch

pytest.importorskip("triton", reason="triton is not installed (extra: gpu)")
# Triton decides when it is imported, which another test may have done: so only where all agree.
if not launch.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)


def test_the_whole_gpu_report_in_the_interpreter(tmp_path: Path) -> None:
    assert gpu.require_device() == "interpreter"
    found = gpu.measure(gpu.SMALL, lambda text: None)
    assert found["correctness"]["failed"] == found["correctness_tuned"]["failed"] == 0
    assert len(found["correctness"]["rows"]) == 36
    assert {row["what"] for row in found["speed"]} == {"expert FFN", "head"}
    assert all(row["seconds"] > 0 for row in found["speed"] + found["speed_tuned"])
    assert {row["kind"] for row in found["tried"]} == {"decode", "few", "many"}
    (tmp_path / "r.json").write_text(json.dumps(found))
    tuned = configs.load(tmp_path / "r.json")
    candidates = {row["kind"]: [] for row in found["tried"]}
    for row in found["tried"]:
        candidates[row["kind"]].append(row["tile"])
    assert all(configs.to_json(tuned)[kind] in tiles for kind, tiles in candidates.items())
    assert "36 of 36 forms are right" in gpu.to_text(found)


def test_wrong_kernels_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu.launch.linear
    monkeypatch.setattr(gpu.launch, "linear", lambda x, weight: right(x, weight) * 1.05)
    rows = list(gpu.correctness(torch.device("cpu"), gpu.SMALL.forms[:1]))
    assert {row["op"] for row in rows if not row["ok"]} == {"linear"}
