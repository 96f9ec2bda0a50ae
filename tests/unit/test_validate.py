"""The proof finds what is wrong, and only that."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from nano import Nano
from rounding import nearest
from zaya_convert import data, report
from zaya_convert.convert import execute
from zaya_convert.errors import InputError
from zaya_convert.models import open_model
from zaya_convert.plan import make_plan
from zaya_convert.validate import Bounds, validate


@pytest.fixture(scope="module")
def int4(nano_hybrid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("validate") / "int4"
    execute(make_plan(open_model(str(nano_hybrid)), nearest(4), "compressed-tensors"), out)
    return out


def _sequences(folder: Path, tokens: int = 300) -> data.Sequences:
    return data.load_sequences(open_model(str(folder)), None, tokens=tokens, length=100)


def test_a_model_against_itself_is_exact(nano_hybrid: Path) -> None:
    model = open_model(str(nano_hybrid))
    found = validate(model, model, _sequences(nano_hybrid))
    assert (found.kl_mean, found.kl_max, found.top1_agreement) == (0, 0, 1)
    assert found.router_agreement_by_layer == [1.0] * model.config.layers
    assert found.perplexity_reference == found.perplexity_candidate
    assert all(row.sqnr_db == float("inf") for row in found.tensors)
    assert found.verdict == "pass"


def test_the_other_layout_is_exact(nano_hybrid: Path, nano_legacy: Path) -> None:
    a, b = open_model(str(nano_hybrid)), open_model(str(nano_legacy))
    assert validate(a, b, _sequences(nano_hybrid)).kl_max == 0


def test_figures_of_int4(nano_hybrid: Path, int4: Path) -> None:
    reference, candidate = open_model(str(nano_hybrid)), open_model(str(int4))
    found = validate(reference, candidate, _sequences(nano_hybrid))
    assert found.kl_mean > 0
    assert found.reference_digest_matches is True
    assert found.tokens == 300
    assert found.bytes == sum(info.bytes for info in candidate.infos.values())
    experts = [row for row in found.tensors if row.expert >= 0]
    assert len(experts) == 3 * reference.config.layers * reference.config.experts
    assert {row.bits for row in experts} == {4}
    assert all(10 < row.sqnr_db < 40 for row in experts)
    # An independent figure for one matrix.
    key = next(k for k in reference.infos if str(k) == experts[0].name + ".weight")
    a, b = reference.read_float(key, torch.float64), candidate.read_float(key, torch.float64)
    sqnr = 10 * torch.log10(a.square().sum() / (a - b).square().sum())
    assert experts[0].sqnr_db == pytest.approx(float(sqnr), abs=1e-4)


@pytest.mark.parametrize(
    "bounds",
    [
        Bounds(max_kl=1e-12),
        Bounds(max_kl_p99=1e-12),
        Bounds(min_top1=1.01),
        Bounds(min_router=1.01),
        Bounds(max_perplexity_ratio=0.1),
    ],
    ids=str,
)
def test_every_bound_can_fail(bounds: Bounds, nano_hybrid: Path, int4: Path) -> None:
    models = open_model(str(nano_hybrid)), open_model(str(int4))
    found = validate(*models, _sequences(nano_hybrid, 100), bounds=bounds)
    assert found.verdict == "fail"
    assert len([check for check in found.checks if not check.passed]) == 1


def test_the_wrong_reference_fails(nano: Nano, int4: Path) -> None:
    other = nano("hybrid", seed=7)
    found = validate(open_model(str(other)), open_model(str(int4)), _sequences(other, 100))
    assert found.reference_digest_matches is False
    assert found.verdict == "fail"


def test_another_architecture_is_refused(nano: Nano, int4: Path) -> None:
    other = nano("hybrid", experts=6)
    with pytest.raises(InputError, match="experts: reference 6"):
        validate(open_model(str(other)), open_model(str(int4)), _sequences(other, 100))


def test_report_forms_agree(nano_hybrid: Path, int4: Path) -> None:
    models = open_model(str(nano_hybrid)), open_model(str(int4))
    bounds = Bounds(max_kl=100.0, min_top1=2.0)
    found = validate(*models, _sequences(nano_hybrid, 100), bounds=bounds)
    as_json = json.loads(json.dumps(report.to_json(found), allow_nan=False))
    assert as_json["verdict"] == "fail"
    assert as_json["kl_mean"] == found.kl_mean
    assert len(as_json["sqnr_db_by_expert"]) == models[0].config.layers * models[0].config.experts
    suite = ElementTree.fromstring(report.to_junit(found))
    assert suite.get("failures") == "1"
    assert len(suite.findall("testcase")) == len(found.checks)
    page = report.to_html(replace(found, data="<script>alert(1)</script>"))
    assert "<script>alert" not in page
    assert "FAIL top-1 agreement" in page
    assert "verdict: fail" in report.to_text(found)


def test_data_files(nano_hybrid: Path, tmp_path: Path) -> None:
    model = open_model(str(nano_hybrid))
    good = tmp_path / "ids.jsonl"
    good.write_text('{"ids": [1, 2, 3, 4, 5]}\n\n{"ids": [6, 7]}\n')
    found = data.load_sequences(model, str(good), tokens=100, length=3)
    assert [s.tolist() for s in found.ids] == [[1, 2, 3], [4, 5], [6, 7]]
    assert found.tokens == 7
    limited = data.load_sequences(model, str(good), tokens=3, length=3)
    assert limited.tokens == 3
    assert limited.digest != found.digest
    for text, message in [
        ('{"ids": [1, 99999]}', "outside"),
        ('{"ids": [1, -5]}', "outside"),
        ('{"ids": [1]}\n{"ids": [1, 99999999999999999999]}', "bad.jsonl:2: token id .* outside"),
        ('{"ids": [1, 1' + "0" * 400 + "]}", "bad.jsonl:1: token id .* outside"),
        ('{"ids": 5}', "bad.jsonl:1: ids must be a list of integers"),
        ('{"ids": [true]}', "bad.jsonl:1: ids must be a list of integers"),
        ('{"ids": ' + "[" * 100_000 + "]" * 100_000 + "}", "bad.jsonl:1: not valid JSON"),
        ('[{"ids": [1]}]', "bad.jsonl:1: expected a JSON object"),
        ("{oops", "bad.jsonl:1.*JSON"),
        ('{"words": 1}', "needs one of"),
        ('{"text": "hello"}', "tokenizer"),
        ("", "no text"),
    ]:
        bad = tmp_path / "bad.jsonl"
        bad.write_text(text)
        with pytest.raises(InputError, match=message):
            data.load_sequences(model, str(bad), tokens=10, length=5)


def _with_tokenizer(folder: Path, into: Path, text: str) -> data.Sequences:
    """Sequences without ``--data`` for a copy of a checkpoint with this tokenizer."""
    shutil.copytree(folder, into)
    (into / "tokenizer.json").write_text(text)
    return data.load_sequences(open_model(str(into)), None, tokens=60, length=30)


def test_what_the_bundled_text_is_to_a_checkpoint(
    nano: Nano, bundled: Path, tmp_path: Path
) -> None:
    own = (bundled / "tokenizer.json").read_text()
    fits = nano(vocab_rows=768)
    same = _with_tokenizer(fits, tmp_path / "same", own)
    assert same.description == "bundled validation text"
    other = _with_tokenizer(fits, tmp_path / "other", own + "\n")
    assert other.description.startswith("bundled validation text (arithmetic; pass --data")
    assert other.digest == same.digest
    beyond = _with_tokenizer(nano(), tmp_path / "beyond", own)  # 740 tokens, 96 rows
    assert beyond.description.startswith("random token ids (the tokenizer goes beyond")
    assert max(int(ids.max()) for ids in beyond.ids) < 96
    shipped = data.load_sequences(open_model(None), None, tokens=60, length=30)
    assert (shipped.description, shipped.digest) == (same.description, same.digest)


def test_jsonl_of_text(bundled: Path, tmp_path: Path) -> None:
    model = open_model(str(bundled))
    file = tmp_path / "text.jsonl"
    file.write_bytes('{"text": "one\u2028two\x85"}\r\n{"text": "three"}\n'.encode())
    found = data.load_sequences(model, str(file), tokens=100, length=50)
    assert (len(found.ids), found.description) == (2, "text.jsonl")
    deep = "[" * 900 + "]" * 900
    for line in (
        '{"text": "\\ud800"}',
        '{"messages": [{"role": "user", "content": "\\ud800"}]}',
        '{"messages": [5, {"role": "user"}], "messages": 1}',
        f'{{"text": {deep}}}',
    ):
        file.write_text('{"text": "good"}\n' + line)
        with pytest.raises(InputError, match=r"text\.jsonl:2: "):
            data.load_sequences(model, str(file), tokens=100, length=50)
