"""``bench``: what it prints, draws and refuses; nothing here is about how fast anything is."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from cli.running import Run, Zaya
from zaya_convert.bench import measure, report
from zaya_convert.bench.decode import Read
from zaya_convert.models import open_model
from zaya_convert.runtime.model import Model
from zaya_kernels import library
from zaya_kernels.triton import configs

pytest_plugins = ["cli.fixtures"]

needs_library = pytest.mark.skipif(not library.supported_isas(), reason=library.load()[1])


@needs_library
def test_kernels(zaya: Zaya, tmp_path: Path) -> None:
    page = tmp_path / "k.svg"
    run = zaya("bench", "--kernels", "--small", "--rounds", 1, "--json", "--plot", page)
    assert run.code == 0, run.err
    cases = run.json()["kernels"]
    assert len(cases) == 15
    for case in cases:
        kinds = {figure["kind"] for figure in case["figures"]}
        names = [figure["name"] for figure in case["figures"]]
        assert {"ours", "ceiling"} <= kinds
        assert names[:2] == ["native_fast", "native"]
        for figure in case["figures"]:
            assert 0 < figure["fastest"] <= figure["seconds"] <= figure["slowest"]
            assert figure["times"] > 0
            assert (figure["share"] is None) == (figure["kind"] == "ceiling")
    assert run.json()["machine"]["threads"] == 1
    drawn = ElementTree.parse(page).getroot()
    bars = [e for e in drawn if e.tag.endswith("rect")]
    assert len(bars) == 1 + sum(len(case["figures"]) for case in cases)
    assert list(tmp_path.iterdir()) == [page]


def test_shares_are_of_the_ceiling() -> None:
    def call(seconds: float) -> measure.Call:
        return lambda: clock.append(clock[-1] + seconds)

    clock = [0.0]
    read = measure.Contender("read", [call(1.0)], measure.CEILING)
    case = measure.Case("c", 10**9, 10**9, [measure.Contender("own", [call(2.0)]), read])
    dense = measure.Contender("dense", [call(1.0)], measure.CEILING, 4 * 10**9)
    computed = measure.Case("c", 10**9, 10**9, [measure.Contender("own", [call(2.0)]), dense])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure.time, "perf_counter", lambda: clock[-1])
        by_read, by_speed = measure.run(case, 3), measure.run(computed, 3)
    own, limit = by_read.figures
    assert (own.seconds, own.gigabytes, own.gigaops, own.share) == (2.0, 0.5, 0.5, 0.5)
    assert (limit.gigabytes, limit.gigaops, limit.share) == (1.0, 0.0, None)
    own, limit = by_speed.figures
    assert (own.share, limit.gigaops, limit.gigabytes) == (0.125, 4.0, 0.0)
    assert (own.times, limit.times) == (1.0, 0.5)
    text = report.case_text(by_read)
    assert "50%" in text
    assert "2000.00 ms" in text


def test_ratios_are_taken_within_rounds() -> None:
    """A machine turns fast within a round: medians over all rounds would be 4.0 and 3.0 seconds."""
    clock = [0.0]

    def call(own: float, paces: Sequence[float]) -> measure.Call:
        turns = iter((1.0, *paces))  # the first warms up
        return lambda: clock.append(clock[-1] + own * next(turns))

    contenders = [
        measure.Contender("own", [call(2.0, (2.0, 2.0, 2.0, 1.0, 1.0))]),
        measure.Contender("peer", [call(3.0, (2.0, 2.0, 1.0, 1.0, 1.0))], measure.PEER),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure.time, "perf_counter", lambda: clock[-1])
        patch.setattr(measure, "_CALLS", 1)
        patch.setattr(measure, "_SETTLE", 0)
        found = measure.run(measure.Case("c", 1, 1, contenders), 5)
    assert [figure.seconds for figure in found.figures] == [4.0, 3.0]
    assert [figure.times for figure in found.figures] == [1.0, 1.5]


def test_decode(zaya: Zaya, artifact: Path, tmp_path: Path) -> None:
    page = tmp_path / "d.html"
    arguments = ("--tokens", 4, "--prompt-tokens", 9, "--plot", page)
    run = zaya("bench", "--decode", artifact, *arguments, "--json")
    assert run.code == 0, run.err
    found = run.json()["decode"]
    assert found["tokens"] == 4
    assert found["decode_best"] >= found["decode"] > 0
    assert found["prefill"] > 0
    assert set(found["batches"]) == {"4", "16"}
    assert (found["by_blocks"] is None) == (found["step"] != "native")
    assert found["resident_bytes"] <= found["peak_bytes"]
    assert 0 <= found["skipped"] < 1
    assert found["bytes_per_token"] < open_model(str(artifact)).bytes
    assert "tokens/s" in page.read_text()
    text = zaya("bench", "--decode", artifact, "--tokens", 2, "--prompt-tokens", 3)
    assert "MB a token" in text.out


def test_llama_bench_as_a_peer(zaya: Zaya, artifact: Path, tmp_path: Path) -> None:
    program = tmp_path / "build" / "llama-bench"
    program.parent.mkdir()
    arguments = ("bench", "--decode", artifact, "--tokens", 2, "--prompt-tokens", 3, "--rounds", 1)
    rows = [{"n_gen": 0, "avg_ts": 11.0}, {"n_gen": 2, "avg_ts": 7.5}]
    program.write_text(f"#!/bin/sh\necho '{json.dumps(rows)}'\n")
    program.chmod(0o755)
    run = zaya(*arguments, "--llama", tmp_path)
    assert "decode 7.5, prefill 11 tokens/s" in run.out
    program.write_text("#!/bin/sh\necho unknown architecture >&2; exit 1\n")
    run = zaya(*arguments, "--llama", tmp_path)
    refused(run, 3, "llama-bench cannot run it: unknown architecture")
    program.unlink()
    refused(zaya(*arguments, "--llama", tmp_path), 3, "has no llama-bench")


def test_bytes_of_a_token(artifact: Path) -> None:
    checkpoint = open_model(str(artifact))
    config = checkpoint.config
    weights = Read(Model(checkpoint, torch.bfloat16).weights)

    def size(experts: list[int]) -> int:
        regions = weights.of(experts)
        assert len({start for start, _ in regions}) == len(regions)
        return sum(length for _, length in regions)

    once = sum(
        info.numel * (4 if "balancing" in key.part else 2)
        for key, info in checkpoint.infos.items()
        if key.expert < 0 and (key.layer >= 0 or key.part == "embed_tokens.weight")
    )
    skips = [config.experts] * config.layers
    assert size(skips) == once
    expert = 3 * 2 * config.hidden * config.expert_width
    assert size([0, *skips[1:]]) == once + expert
    assert size([config.experts - 1] * config.layers) == once + config.layers * expert
    packed = Read(Model(checkpoint, torch.bfloat16, fast=True).weights)
    assert sum(length for _, length in packed.of(skips)) < once


def test_convert(zaya: Zaya, nano_hybrid: Path) -> None:
    run = zaya("bench", "--convert", nano_hybrid, "--rounds", 1)
    assert run.code == 0, run.err
    assert "of reading and hashing the input" in run.out


def refused(run: Run, code: int, message: str) -> None:
    assert run.code == code
    assert message in run.err
    assert run.out == ""
    assert len(run.err.splitlines()) <= 2


def test_what_is_refused(zaya: Zaya, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(zaya("bench"), 2, "give --kernels, --decode, --convert or --gpu")
    refused(zaya("bench", "--kernels", "--plot", "a.png"), 2, "draws .svg and .html, not a.png")
    run = zaya("bench", "--convert", "x", "--llama", tmp_path)
    refused(run, 2, "--llama is a peer of --kernels or of --decode")
    refused(zaya("bench", "--kernels", "--gpu"), 2, "--gpu is measured alone")
    refused(zaya("bench", "--kernels", "-o", "a.json"), 2, "-o is where --gpu writes")
    refused(zaya("bench", "--decode", tmp_path / "nothing"), 3, "no such folder")
    if library.supported_isas():
        run = zaya("bench", "--kernels", "--small", "--llama", tmp_path)
        refused(run, 3, "has no libggml-base.so")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(zaya("bench", "--gpu"), 2, "--gpu needs triton: pip install")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(zaya("bench", "--gpu"), 3, "no CUDA or ROCm device")


def test_tiles_of_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(configs.ENVIRONMENT, raising=False)
    monkeypatch.setattr(configs, "TUNED", tmp_path)
    name = "NVIDIA H100 80GB HBM3"
    assert configs.slug(name) == "nvidia-h100-80gb-hbm3"
    assert configs.for_device(name, "cuda", "90") == configs.FAMILIES["hopper"]
    other = configs.Tiles(configs.Decode(2, 32, 2), *[configs.Prefill(16, 32, 4, 4, 2)] * 2)
    own = {"device": name, "tiles": configs.to_json(other)}
    (tmp_path / "nvidia-h100-80gb-hbm3.json").write_text(json.dumps(own))
    assert configs.for_device(name, "cuda", "90") == other
    assert configs.for_device("another", "cuda", "90") == configs.FAMILIES["hopper"]
    whole = tmp_path / "report.json"
    whole.write_text(json.dumps({"device": {}, "tuned": own}))
    monkeypatch.setenv(configs.ENVIRONMENT, str(whole))
    assert configs.for_device("another", "hip", "gfx942") == other
    for broken in ("{", "{}", '{"tiles": {"decode": {}}}', "[]"):
        whole.write_text(broken)
        with pytest.raises(ValueError, match="holds no tiles"):
            configs.for_device(name, "cuda", "90")


@pytest.mark.parametrize("path", sorted(configs.TUNED.glob("*.json")), ids=lambda path: path.name)
def test_shipped_tiles_are_readable(path: Path) -> None:
    assert configs.slug(json.loads(path.read_text())["name"]) == path.stem
    configs.load(path)
