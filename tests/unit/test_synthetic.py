"""Synthetic checkpoints: deterministic, sane, and stored in well-formed files."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import relayout as relayout_tool
import synthetic
from nano import Nano
from relayout import Entry, legacy_config, parse_size, write_files
from synthetic import nano_config, preset_config, synthetic_tensor, write_checkpoint
from zaya_convert.checkpoint import open_source
from zaya_convert.layout import TensorKey

EXPERT = TensorKey(1, "mlp.experts.up_proj.weight", 3)


def test_values_depend_on_seed_and_key_alone() -> None:
    one = synthetic_tensor(EXPERT, (64, 96), seed=5)
    assert torch.equal(one, synthetic_tensor(EXPERT, (64, 96), seed=5))
    assert not torch.equal(one, synthetic_tensor(EXPERT, (64, 96), seed=6))
    sibling = TensorKey(1, "mlp.experts.up_proj.weight", 4)
    assert not torch.equal(one, synthetic_tensor(sibling, (64, 96), seed=5))


def test_values_are_what_they_always_were() -> None:
    """Whoever quotes a figure for a synthetic model quotes a seed: it must keep its meaning."""
    values = synthetic_tensor(EXPERT, (4, 8))
    assert values.shape == (4, 8)
    assert values[0, :3].tolist() == pytest.approx([0.2758479, 0.3773101, -0.3262993], rel=1e-5)


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = synthetic_tensor(EXPERT, (100, 64))
    monkeypatch.setattr(synthetic, "_BLOCK", 64 * 7)
    assert len(list(synthetic.value_blocks(EXPERT, (100, 64), 0))) == 15
    assert torch.equal(whole, synthetic_tensor(EXPERT, (100, 64)))


def test_every_parameter_is_non_trivial(nano: Nano) -> None:
    flags = {"attention_bias": True, "lm_head_bias": True, "tied": False}
    model = open_source(nano("hybrid", dtype=torch.float32, **flags))
    for key in model.infos:
        value = model.read_float(key, torch.float32)
        assert torch.isfinite(value).all()
        assert len(value.unique()) > 0.7 * value.numel(), str(key)


def test_statistics_of_an_expert_look_real() -> None:
    values = synthetic_tensor(TensorKey(0, "mlp.experts.gate_proj.weight", 0), (1024, 4096))
    columns = values.square().mean(0).sqrt()
    ratio = columns / columns.median()
    assert 1 <= (ratio > 8).sum() <= 8
    assert 8 < ratio.max() < 110
    rows = values.square().mean(1).sqrt()
    assert 1.2 < rows.quantile(0.9) / rows.quantile(0.1) < 4
    # inputs of order one give outputs of order one
    torch.manual_seed(0)
    assert 0.5 < (torch.randn(8, 4096) @ values.T).std() < 2
    plain = values[:, ratio < 3] / columns[ratio < 3] / rows[:, None]
    assert 2.9 < (plain**4).mean() / (plain**2).mean() ** 2 < 5
    # rows are not copies of one another
    unit = values / values.norm(dim=1, keepdim=True)
    plain_unit = plain / plain.norm(dim=1, keepdim=True)
    assert torch.isfinite(unit).all()
    overlap = (plain_unit @ plain_unit.T).fill_diagonal_(0).abs().max()
    assert overlap < 0.2


def test_published_ranges() -> None:
    temp = torch.cat(
        [synthetic_tensor(TensorKey(i, "self_attn.qk_norm.temp"), (2,)) for i in range(40)]
    )
    assert 0.8 <= temp.min() < 2 < 8 < temp.max() <= 12.9
    scales = torch.stack(
        [
            synthetic_tensor(TensorKey(i, f"post_{where}_residual_scale.residual_scale"), (512,))
            for i in range(40)
            for where in ("attention", "mlp")
        ]
    )
    assert 2e-6 < scales.double().log().sum(0).exp().median() < 2e-5


def test_some_experts_are_outliers() -> None:
    norms = torch.tensor(
        [
            synthetic_tensor(TensorKey(i, "mlp.experts.down_proj.weight", e), (32, 32)).norm()
            for i in range(10)
            for e in range(16)
        ]
    )
    outliers = (norms > 4 * norms.median()).sum()
    assert 1 <= outliers <= 16


@pytest.fixture(scope="module")
def oracle():
    return pytest.importorskip("transformers")


def routes_and_logits(oracle, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Choices [layers, tokens] and logits in transformers, which forgets the last bias."""
    model = oracle.ZayaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = open_source(folder)
    biases = []
    for i, layer in enumerate(model.model.layers):
        biases.append(source.read_float(TensorKey(i, "mlp.gate.balancing_biases")))
        layer.mlp.gate.balancing_biases.copy_(biases[-1])
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, source.config.vocab_rows, (4, 64)))
    with torch.no_grad():
        out = model(ids, output_router_logits=True)
    choices = [
        (logits.softmax(-1) + bias).argmax(-1)
        for logits, bias in zip(out.router_logits, biases, strict=True)
    ]
    return torch.stack(choices), out.logits


@pytest.mark.parametrize("seed", [0, 1])
def test_a_forward_pass_is_finite_sane_and_spreads_its_routes(
    oracle, nano: Nano, seed: int
) -> None:
    routes, logits = routes_and_logits(oracle, nano("hybrid", seed=seed, layers=4))
    assert torch.isfinite(logits).all()
    assert 0.5 < logits.std() < 10
    assert logits.abs().max() < 60
    for layer in routes:
        share = torch.bincount(layer, minlength=9) / len(layer)
        assert (share > 0.01).sum() >= 4
        assert share.max() < 0.9


def test_skip_bias_sets_the_share_of_skips(oracle, nano: Nano) -> None:
    shares = [
        (routes_and_logits(oracle, nano("hybrid", skip_bias=bias, layers=2))[0] == 8)
        .float()
        .mean()
        .item()
        for bias in (-1.0, 0.0, 0.4, 2.0)
    ]
    assert shares[0] == 0
    assert 0 < shares[1] < shares[2] < 1
    assert shares[3] == 1


def test_the_library_reads_our_files(nano_sharded: Path) -> None:
    safe_open = pytest.importorskip("safetensors").safe_open
    ours, seen = open_source(nano_sharded), 0
    for path in ours.files:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            seen += sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
        length = int.from_bytes(path.read_bytes()[:8], "little")
        assert length % 8 == 0
    assert seen == sum(info.numel for info in ours.infos.values())


def test_given_tensors_are_stored(tmp_path: Path) -> None:
    def make(key: TensorKey, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.full(shape, len(str(key)) / 8, dtype=torch.float64)

    for layout in ("hybrid", "legacy"):
        write_checkpoint(tmp_path / layout, nano_config(), layout=layout, tensors=make)
        model = open_source(tmp_path / layout)
        for key in model.infos:
            assert (model.read_float(key, torch.float32) == len(str(key)) / 8).all()
    with pytest.raises(ValueError, match="shape"):
        write_checkpoint(tmp_path / "x", nano_config(), tensors=lambda k, s: torch.zeros(1))


def test_nothing_is_overwritten(nano_hybrid: Path, tmp_path: Path) -> None:
    before = (nano_hybrid / "config.json").read_bytes()
    with pytest.raises(FileExistsError):
        write_checkpoint(nano_hybrid, nano_config())
    assert (nano_hybrid / "config.json").read_bytes() == before


def test_an_interrupted_write_leaves_no_checkpoint(tmp_path: Path) -> None:
    def breaks(key: TensorKey, shape: tuple[int, ...]) -> torch.Tensor:
        if key.layer == 1:
            raise KeyboardInterrupt
        return torch.zeros(shape)

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "m", nano_config(), tensors=breaks)
    assert {path.name for path in (tmp_path / "m").iterdir()} == {"model.safetensors.partial"}


def test_a_chunk_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a: 3 bytes given, 4 planned"):
        write_files(tmp_path, [Entry("a", "F32", (1,), lambda: [b"abc"])], {})


@pytest.mark.parametrize(("count", "limit"), [(1, 10**9), (3, 200_000), (99, 1)])
def test_shard_bytes_is_an_upper_bound(tmp_path: Path, count: int, limit: int) -> None:
    write_checkpoint(tmp_path / "m", nano_config(), shard_bytes=limit)
    model = open_source(tmp_path / "m")
    assert len(model.files) >= count
    largest = max(info.bytes for info in model.infos.values()) * 2 * 8
    assert all(path.stat().st_size < max(limit, largest) + 20_000 for path in model.files)


def test_sizes_are_parsed() -> None:
    assert [parse_size(t) for t in ("4GB", "1.5 gb", "500MB", "7")] == [
        4 * 10**9, 15 * 10**8, 5 * 10**8, 7,
    ]  # fmt: skip
    for text in ("", "GB", "-1GB", "4XB", "4 GBs"):
        with pytest.raises(ValueError, match=r"size|float"):
            parse_size(text)


def test_presets() -> None:
    eight, narrow = preset_config("8b"), preset_config("74b-narrow", layers=5, hidden=256)
    assert (eight.layers, eight.hidden, eight.rotary_dim, eight.eos_ids) == (40, 2048, 64, (106,))
    assert set(eight.windows) == {0}
    assert (narrow.experts, narrow.heads, narrow.kv_heads, narrow.hidden) == (24, 16, 2, 256)
    assert narrow.windows == (0, 4097, 0, 4097, 0)
    assert narrow.rope_thetas == (5e6, 1e4, 5e6, 1e4, 5e6)
    with pytest.raises(ValueError, match="window of 1"):
        legacy_config(nano_config(windows=(0, 1, 0)))
    with pytest.raises(ValueError, match="windows"):
        nano_config(layers=2, windows=(0, 0, 0))


def test_command_lines(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    arguments = [
        "--preset", "74b-narrow", "--out", str(source), "--seed", "7", "--shard-size", "300KB",
        "--layers", "3", "--hidden", "64", "--expert-width", "32", "--vocab-rows", "100",
        "--window", "5", "--dtype", "float16", "--skip-bias", "0.5",
    ]  # fmt: skip
    result = CliRunner().invoke(synthetic.main, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(source)
    model = open_source(source)
    assert (model.config.hidden, model.config.windows) == (64, (0, 5, 0))
    assert len(model.files) > 1
    assert model.read_float(TensorKey(0, "mlp.gate.balancing_biases"))[-1] == 0.5
    assert CliRunner().invoke(synthetic.main, arguments).exit_code == 1
    result = CliRunner().invoke(relayout_tool.main, [str(source), str(target), "--to", "legacy"])
    assert result.exit_code == 0, result.output
    assert open_source(target).config == model.config
    os.remove(target / "config.json")  # noqa: PTH107
    result = CliRunner().invoke(relayout_tool.main, [str(target), str(source), "--to", "hybrid"])
    assert result.exit_code == 1
    assert "config.json" in result.output
