"""Statistics survive the way through llama.cpp's file, and no damaged or foreign file passes."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from nano import Nano
from zaya_convert import imatrix
from zaya_convert import stats as files
from zaya_convert.checkpoint import Checkpoint
from zaya_convert.config import ModelConfig
from zaya_convert.errors import InputError, OutputError, UsageError
from zaya_convert.gguf_header import read_gguf
from zaya_convert.models import open_model
from zaya_convert.runtime.walk import SITE_OF, SITES
from zaya_convert.stats import Stats, identity, widths

LAYERS, EXPERTS, TOKENS = 3, 6, 100
SMALL: dict[str, Any] = {"layers": LAYERS, "windows": (0,) * LAYERS, "experts": EXPERTS}
ROWS = [0, 5, 40, 20, 10, 15]  # of the experts of every layer; ten tokens are skipped
ATTENTION = ("attn_q", "attn_k", "cca_val_proj1", "cca_val_proj2")

Arrays = dict[str, np.ndarray]
Change = Callable[[Arrays], object]  # in place


@pytest.fixture(scope="module")
def model(nano: Nano) -> Checkpoint:
    return open_model(str(nano("hybrid", **SMALL)))


@pytest.fixture(scope="module")
def config(model: Checkpoint) -> ModelConfig:
    return model.config


@pytest.fixture(scope="module")
def stats(model: Checkpoint) -> Stats:
    draw = torch.Generator().manual_seed(3)
    counts = torch.tensor([[*ROWS, TOKENS - sum(ROWS)]] * LAYERS)
    arrays: dict[str, Tensor] = {
        "counts": counts,
        "tokens.ids": torch.arange(TOKENS, dtype=torch.int32) % 90,
        "tokens.lengths": torch.tensor([60, 40], dtype=torch.int32),
    }
    for layer in range(LAYERS):
        for site, width in widths(model.config).items():
            shape = (EXPERTS, width) if site in files.EXPERT_SITES else (width,)
            moments = torch.rand(shape, generator=draw).exp2() * 10
            if site in files.EXPERT_SITES:
                moments[counts[layer, :-1] == 0] = 0
            arrays[f"layers.{layer}.{site}.second_moment"] = moments
            arrays[f"layers.{layer}.{site}.absmax"] = moments.sqrt() * 3
    facts = {
        "description": "data/of mine", "tokens_digest": "t", "model": identity(model), "rounds": 1,
        "not_finite": 0, "settings": {"min_tokens": 16},
    }  # fmt: skip
    return Stats(arrays, facts, "digest of the statistics")


@pytest.fixture(scope="module")
def written(stats: Stats, config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "imatrix.gguf"
    imatrix.write(stats, config, path)
    return path


def entries(stats: Stats) -> Arrays:
    """What llama-imatrix would write of these statistics."""
    arrays: Arrays = {}
    for layer in range(LAYERS):
        for site in SITES:
            moments = stats.arrays[f"layers.{layer}.{site}.second_moment"]
            if site in files.EXPERT_SITES:
                name = "ffn_down_exps" if site == "down_proj" else "ffn_gate_up_exps"
                rows = stats.counts[layer, :-1, None]
                names = [f"blk.{2 * layer + 1}.{name}.weight"]
            else:
                rows = torch.tensor([TOKENS])
                own = ATTENTION if site == "qkv_proj" else ("attn_output",)
                names = [f"blk.{2 * layer}.{name}.weight" for name in own]
            for name in names:
                arrays[f"{name}.in_sum2"] = (moments * rows).numpy()
                arrays[f"{name}.counts"] = rows.float().numpy()
    return arrays


def foreign(path: Path, arrays: Arrays, kind: str = "imatrix", **own: Any) -> Path:
    """A file by the gguf package, in whichever order the arrays are."""
    writer = gguf.GGUFWriter(path, "zaya")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["/home/someone/wiki.train.raw", "C:\\text\\more.txt"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for key, value in own.items():
        writer.add_array(f"zaya_convert.{key}", value)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_moments(found: Stats, expected: Stats) -> None:
    for layer in range(LAYERS):
        for site in SITES:
            name = f"layers.{layer}.{site}.second_moment"
            assert found.arrays[name].dtype == torch.float32
            torch.testing.assert_close(found.arrays[name], expected.arrays[name], rtol=3e-7, atol=0)


# ---- there and back -----------------------------------------------------------------------------


def test_a_round_trip(stats: Stats, model: Checkpoint, written: Path) -> None:
    found = imatrix.read(written, model)
    assert_same_moments(found, stats)
    assert torch.equal(found.counts, stats.counts)
    assert (found.tokens, found.min_tokens) == (TOKENS, 16)
    assert found.skip_rate == stats.skip_rate > 0
    assert found.below() == stats.below()
    assert found.facts["description"] == "data/of mine"
    assert len(found.digest) == 64
    found.check_fits(model)
    for part, site in SITE_OF.items():
        for expert in range(EXPERTS) if site in files.EXPERT_SITES else [-1]:
            mine, theirs = stats.of(1, part, expert), found.of(1, part, expert)
            assert (mine is None) == (theirs is None) == (expert == ROWS.index(0))
            if mine is not None and theirs is not None:
                assert mine.count == theirs.count
                torch.testing.assert_close(mine.second_moment, theirs.second_moment)


def test_it_says_what_it_lacks(model: Checkpoint, written: Path) -> None:
    found = imatrix.read(written, model)
    assert found.moments_only
    assert not found.has_sensitivity
    with pytest.raises(InputError, match="second moments only"):
        _ = found.sequences


def test_the_gguf_package_reads_it(stats: Stats, written: Path) -> None:
    reader = gguf.GGUFReader(written)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["data/of mine"]
    assert reader.fields["imatrix.chunk_count"].contents() == 1
    assert reader.fields["imatrix.chunk_size"].contents() == 512
    assert reader.fields["zaya_convert.calibration"].contents() == stats.digest
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    expected = entries(stats)
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].shape == array.shape
        np.testing.assert_allclose(found[name], array, rtol=2e-7)


def test_the_same_bytes_and_nothing_else(
    stats: Stats, config: ModelConfig, written: Path, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "imatrix.gguf"
    for _ in range(2):
        imatrix.write(stats, config, path)
        assert path.read_bytes() == written.read_bytes()
    assert [file.name for file in path.parent.iterdir()] == ["imatrix.gguf"]


def test_what_was_read_can_be_written(
    model: Checkpoint, config: ModelConfig, written: Path, tmp_path: Path
) -> None:
    imatrix.write(imatrix.read(written, model), config, tmp_path / "again")
    again = imatrix.read(tmp_path / "again", model)
    assert_same_moments(again, imatrix.read(written, model))


def test_sums_that_fp32_cannot_hold(stats: Stats, config: ModelConfig, tmp_path: Path) -> None:
    name = "layers.2.o_proj.second_moment"
    huge = replace(stats, arrays={**stats.arrays, name: stats.arrays[name] * 1e36})
    with pytest.raises(InputError, match="layer 2, o_proj: is too large"):
        imatrix.write(huge, config, tmp_path / "x")
    assert not any(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(stats: Stats, config: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        imatrix.write(stats, config, tmp_path / "file" / "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError):
        imatrix.write(stats, config, tmp_path / "folder")
    assert {file.name for file in tmp_path.iterdir()} == {"file", "folder"}


# ---- files by others ----------------------------------------------------------------------------


def test_a_file_by_others(stats: Stats, model: Checkpoint, tmp_path: Path) -> None:
    arrays = entries(stats)
    arrays["blk.1.ffn_gate_inp.weight.in_sum2"] = np.full(7, -1, np.float32)  # nobody's business
    arrays["output.weight.counts"] = np.full(1, np.nan, np.float32)
    found = imatrix.read(foreign(tmp_path / "x", dict(sorted(arrays.items()))), model, min_tokens=8)
    assert_same_moments(found, stats)
    assert torch.equal(found.counts[:, :-1], stats.counts[:, :-1])
    assert not found.counts[:, -1].any()  # it says nothing of the skip expert
    assert (found.tokens, found.min_tokens) == (TOKENS, 8)
    assert found.facts["description"] == "imatrix of wiki.train.raw, more.txt"
    found.check_fits(model)  # of which model, it does not say


def test_blocks_that_are_whole_layers(stats: Stats, model: Checkpoint, tmp_path: Path) -> None:
    def combined(name: str) -> str:
        return re.sub(r"\d+", lambda block: str(int(block[0]) // 2), name, count=1)

    arrays = {combined(name): array for name, array in entries(stats).items()}
    assert_same_moments(imatrix.read(foreign(tmp_path / "x", arrays), model), stats)


def test_what_was_converted_from_the_old_format(
    stats: Stats, model: Checkpoint, tmp_path: Path
) -> None:
    """llama-imatrix keeps one count for all experts then, and one row of sums."""
    arrays = entries(stats)
    for name in list(arrays):
        if "_exps" in name and name.endswith(".in_sum2"):
            counts = np.maximum(stats.counts[0, :-1, None].numpy(), 1)
            arrays[name] = (arrays[name] / counts * 40).astype(np.float32).reshape(-1)
            arrays[name.replace("in_sum2", "counts")] = np.full(1, 40, np.float32)
    found = imatrix.read(foreign(tmp_path / "x", arrays), model)
    torch.testing.assert_close(
        found.arrays["layers.1.down_proj.second_moment"],
        stats.arrays["layers.1.down_proj.second_moment"],
    )
    assert bool((found.counts[:, :-1] == 40).all())


def test_of_matrices_with_the_same_inputs_the_first_counts(
    stats: Stats, model: Checkpoint, tmp_path: Path
) -> None:
    arrays = entries(stats)
    for factor, name in enumerate(ATTENTION, 1):
        arrays[f"blk.2.{name}.weight.in_sum2"] = arrays["blk.0.attn_q.weight.in_sum2"] * factor
    once = stats.arrays["layers.0.qkv_proj.second_moment"]
    for factor, name in enumerate(ATTENTION, 1):
        found = imatrix.read(foreign(tmp_path / name, arrays), model)
        moments = found.arrays["layers.1.qkv_proj.second_moment"]
        torch.testing.assert_close(moments, once * factor)
        for suffix in ("in_sum2", "counts"):
            del arrays[f"blk.2.{name}.weight.{suffix}"]
    with pytest.raises(InputError, match="has no entry " + r"blk\.2\.attn_q\.weight or "):
        imatrix.read(foreign(tmp_path / "none", arrays), model)


# ---- what is refused ----------------------------------------------------------------------------


def setting(name: str, value: float, at: int = 0) -> Change:
    def change(arrays: Arrays) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name].flat[at] = value

    return change


def removing(*names: str) -> Change:
    return lambda arrays: [arrays.pop(name) for name in names]


def shaping(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda arrays: arrays.update({name: np.ascontiguousarray(change(arrays[name]))})


def nobody(arrays: Arrays) -> None:
    for name in arrays:
        if "_exps" in name:
            arrays[name] = np.zeros_like(arrays[name])


def larger(arrays: Arrays) -> None:
    for suffix in ("in_sum2", "counts"):
        name = f"blk.{2 * LAYERS}.attn_output.weight.{suffix}"
        arrays[name] = arrays[name.replace(str(2 * LAYERS), "0")]


Q, UP, DOWN, OUT = (
    f"blk.{name}.weight."
    for name in ("0.attn_q", "1.ffn_gate_up_exps", "1.ffn_down_exps", "4.attn_output")
)
DAMAGE: dict[str, tuple[Change, str]] = {
    "negative": (setting(OUT + "in_sum2", -1e-3), "4.attn_output.weight has a sum of squares that"),
    "nan": (setting(UP + "in_sum2", np.nan, 200), "negative or not finite"),
    "infinite": (setting("blk.0.attn_k.weight.in_sum2", np.inf), "negative or not finite"),
    "fraction": (setting(DOWN + "counts", 2.5, 1), "count that is not a whole number"),
    "negative count": (setting(Q + "counts", -1), "count that is not a whole number"),
    "count of nan": (setting(Q + "counts", np.nan), "count that is not a whole number"),
    "count of inf": (setting(Q + "counts", np.inf), "count that is not a whole number"),
    "squares of nothing": (setting(UP + "in_sum2", 1.0), "where it counted no rows"),
    "no rows": (
        lambda a: a.update({OUT + k: np.zeros_like(a[OUT + k]) for k in ("counts", "in_sum2")}),
        "4.attn_output.weight received nothing",
    ),
    "no counts": (removing(Q + "counts"), "0.attn_q.weight has no .counts"),
    "no sums": (removing(DOWN + "in_sum2"), "1.ffn_down_exps.weight has no .in_sum2"),
    "no entry": (
        removing(OUT + "in_sum2", OUT + "counts"),
        "has no entry blk.4.attn_output.weight",
    ),
    "half": (shaping(Q + "in_sum2", lambda a: a.astype(np.float16)), "is of type F16 and F32"),
    "width": (shaping(OUT + "in_sum2", lambda a: a[:-1]), "has shapes ["),
    "experts": (shaping(UP + "in_sum2", lambda a: a[1:]), f"the model [{EXPERTS}, "),
    "transposed": (shaping(UP + "in_sum2", lambda a: a.T), f"the model [{EXPERTS}, "),
    "flat": (shaping(UP + "in_sum2", lambda a: a.reshape(-1)), f"the model [{EXPERTS}, "),
    "many counts": (shaping(Q + "counts", lambda a: a.repeat(2)), "has shapes ["),
    "one count": (shaping(UP + "counts", lambda a: a[1:2]), "has shapes ["),
    "disagreement": (setting(DOWN + "counts", 41, 2), "experts of layer 0 disagree"),
    "nobody": (nobody, "no expert received anything"),
    "larger": (larger, f"is of a model with more than {LAYERS} layers"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(stats: Stats, model: Checkpoint, tmp_path: Path, name: str) -> None:
    change, says = DAMAGE[name]
    arrays = entries(stats)
    change(arrays)
    with pytest.raises(InputError, match=re.escape(says)) as refused:
        imatrix.read(foreign(tmp_path / "x.gguf", arrays), model)
    assert str(refused.value).startswith("x.gguf: ")
    assert len(refused.value.problems) == 1


def test_every_problem_is_told(stats: Stats, model: Checkpoint, tmp_path: Path) -> None:
    arrays = entries(stats)
    for name in ("nan", "width", "no counts"):
        DAMAGE[name][0](arrays)
    with pytest.raises(InputError) as refused:
        imatrix.read(foreign(tmp_path / "x", arrays), model)
    assert len(refused.value.problems) >= 3


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"skipped": [1, 2]}, r"skipped is of type \[i32\]"),
        ({"min_tokens": [3]}, r"min_tokens is of type \[i32\], not u64"),
    ],
)
def test_keys_of_ours_that_others_wrote(
    stats: Stats, model: Checkpoint, tmp_path: Path, own: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        imatrix.read(foreign(tmp_path / "x", entries(stats), **own), model)


def test_more_skipped_than_there_were(
    stats: Stats, model: Checkpoint, config: ModelConfig, tmp_path: Path
) -> None:
    counts = stats.counts.clone()
    counts[1, -1] = TOKENS + 1
    wrong = replace(stats, arrays={**stats.arrays, "counts": counts})
    imatrix.write(wrong, config, tmp_path / "x")
    with pytest.raises(InputError, match="skipped is not a number of tokens for each layer"):
        imatrix.read(tmp_path / "x", model)


def test_another_model(stats: Stats, nano: Nano, written: Path, tmp_path: Path) -> None:
    other = open_model(str(nano("hybrid", seed=1, **SMALL)))
    with pytest.raises(InputError, match="another model"):
        imatrix.read(written, other).check_fits(other)
    by_others = imatrix.read(foreign(tmp_path / "x", entries(stats)), other)
    by_others.check_fits(other)  # the shapes fit, which is all that can be said
    smaller = open_model(str(nano("hybrid")))
    with pytest.raises(InputError, match="has shapes"):
        imatrix.read(written, smaller)


def test_cut_short(model: Checkpoint, written: Path, tmp_path: Path) -> None:
    data, header = written.read_bytes(), read_gguf(written)
    last = max(tensor.end for tensor in header.tensors.values())
    path = tmp_path / "x"
    for size in (40, 200, last - 1):
        path.write_bytes(data[:size])
        with pytest.raises(InputError, match="truncated"):
            imatrix.read(path, model)


def test_what_kind_of_file(stats: Stats, written: Path, tmp_path: Path) -> None:
    assert imatrix.recognise(written)
    assert not imatrix.recognise(tmp_path / "nothing")
    assert not imatrix.recognise(tmp_path)
    for content in (b"", b"GG", b"\1\0\0\0\0\0\0\0", b"\1\0\0\0\7\0\0\0.weight.weight"[:10]):
        (tmp_path / "x").write_bytes(content)
        assert not imatrix.recognise(tmp_path / "x")
    stats.write(tmp_path / "ours")
    assert not imatrix.recognise(tmp_path / "ours")
    foreign(tmp_path / "model.gguf", {"token_embd.weight": np.ones(3, np.float32)}, "model")
    with pytest.raises(InputError, match=r"model\.gguf: is a GGUF file, but not an imatrix"):
        imatrix.recognise(tmp_path / "model.gguf")


def test_the_old_format(tmp_path: Path) -> None:
    name = b"blk.0.attn_k.weight"
    start = struct.pack("<II", 256, len(name)) + name + struct.pack("<II8f", 1, 8, *range(8))
    (tmp_path / "imatrix.dat").write_bytes(start)
    with pytest.raises(InputError, match=r"imatrix\.dat: .* old format; convert it: llama-imatrix"):
        imatrix.recognise(tmp_path / "imatrix.dat")


def test_uses(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    imatrix.check_uses(path, {"rtn", "imatrix"}, allocates=False)
    for name in ("gptq", "gptaq"):
        with pytest.raises(UsageError, match=f"{name} runs .*; use --method imatrix"):
            imatrix.check_uses(path, {"rtn", name}, allocates=False)
    with pytest.raises(UsageError, match="takes sensitivities"):
        imatrix.check_uses(path, {"imatrix"}, allocates=True)


def test_statistics_of_our_own_form_have_tokens(stats: Stats, tmp_path: Path) -> None:
    none = torch.zeros(0, dtype=torch.int32)
    Stats({**stats.arrays, "tokens.ids": none, "tokens.lengths": none}, stats.facts).write(
        tmp_path / "x"
    )
    with pytest.raises(InputError, match="no tokens"):
        files.read(tmp_path / "x")
