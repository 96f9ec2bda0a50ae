"""The parity test: exactly nothing for the same model, and the right evidence for every damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rounding import nearest
from zaya_convert.checkpoint import Checkpoint
from zaya_convert.convert import execute
from zaya_convert.errors import InputError
from zaya_convert.layout import PART_BY_NAME, TensorKey
from zaya_convert.models import open_model
from zaya_convert.plan import make_plan
from zaya_convert.rsa import forced, judgement, report, texts, yardstick
from zaya_convert.rsa.generator import Answer, Request
from zaya_convert.rsa.local import LocalGenerator
from zaya_convert.rsa.pairs import RoundPair
from zaya_convert.rsa.parity import Plan, parity, weight_figures
from zaya_convert.rsa.problems import Problem, read
from zaya_convert.rsa.results import ParityReport
from zaya_convert.rsa.settings import Settings
from zaya_convert.rsa.sides import Arithmetic, Side
from zaya_convert.rsa.statistics import Interval
from zaya_convert.rsa.verdict import Bounds
from zaya_convert.runtime.cache import Cache
from zaya_convert.runtime.generate import Sampling
from zaya_convert.runtime.model import Model, Output
from zaya_convert.runtime.tokenizer import Tokenizer
from zaya_convert.validate import compare_weights

pytestmark = pytest.mark.usefixtures("one_thread")

Run = Callable[..., ParityReport]

BOTH_ROUNDS = Settings(candidates=2, tails=2, rounds=1, budget=72, tail=40)
FIRST_ROUND = replace(BOTH_ROUNDS, rounds=0)  # enough where traces tell


_ALIKE = RoundPair(
    0, None, None, None, Interval(1, 1, 1), None, None, 1, 1, 1, 1, 1, 0, [], 1, 1, 1
)
_SHELL = ParityReport(
    "reference", "candidate", "engine", "float32", 8, "", FIRST_ROUND, [0], False, [_ALIKE], None,
    1, 2000, 1000, 0.1, 3, {},
)  # fmt: skip


@dataclass
class Instead:
    """Gives another tensor for the one that was read."""

    value: Tensor

    def of(self, value: Any) -> Tensor:
        return self.value

    def of_moments(self, moments: Tensor) -> Tensor:
        return moments


class SkipGivesInput(Model):
    """An engine in which the skip expert hands on its input: what one other runtime does."""

    def _experts(self, *arguments: Any) -> Any:
        inner = self._moe

        def moe(h: Tensor, ids: Tensor, weights: Tensor, fetch: Any) -> Tensor:
            out = inner(h, ids, weights, fetch)
            skipped = ids < 0
            out[skipped] = h[skipped] * weights[skipped, None]
            return out

        self._moe = moe
        try:
            return super()._experts(*arguments)
        finally:
            self._moe = inner


class ForgetsConvolution(Model):
    """An engine that loses the convolutions' columns between two blocks."""

    def forward(self, ids: Tensor, *, cache: Cache | None = None, **options: Any) -> Output:
        if cache is not None:
            cache.conv = [None] * len(cache.conv)
        return super().forward(ids, cache=cache, **options)


@pytest.fixture(scope="module")
def model(bundled: Path) -> Checkpoint:
    return open_model(str(bundled))


@pytest.fixture(scope="module")
def plan(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return Plan(
        read(bundled / "data" / "problems.jsonl", 8),
        FIRST_ROUND,
        trace_tokens=3000,
        bounds=Bounds(margin=0.2, min_tokens=500),
        runs=tmp_path_factory.mktemp("runs"),
    )


@pytest.fixture(scope="module")
def run(model: Checkpoint, plan: Plan) -> Run:
    """Compare a checkpoint, or an engine on the reference's own weights, with the reference."""

    def of(
        name: str, checkpoint: Checkpoint | None = None, engine: Any = None, **changes: Any
    ) -> ParityReport:
        weights = checkpoint or model

        def side(name: str, weights: Checkpoint, engine: Any = None) -> Side:
            def load() -> LocalGenerator:
                runs = engine or Arithmetic().model(weights)
                return LocalGenerator(runs, Tokenizer.of(weights))

            return Side(name, load, weights, identity={"digest": name})

        return parity(
            side("reference", model), side(name, weights, engine), replace(plan, **changes)
        )

    return of


def failed(found: ParityReport) -> str:
    return "\n".join(check.name for check in found.checks if check.outcome == "fail")


def pointed_at(found: ParityReport) -> str:
    return "\n".join(found.findings)


def swapped(model: Checkpoint, layer: int, one: int, other: int) -> Checkpoint:
    turn = {one: other, other: one}
    changes = {
        key: Instead(model.read_float(TensorKey(layer, key.part, turn[key.expert]), torch.bfloat16))
        for key in model.infos
        if key.layer == layer and key.expert in turn
    }
    return replace(model, scaling=changes)


def rounded(model: Checkpoint, bits: int) -> Checkpoint:
    experts = [key for key in model.infos if PART_BY_NAME[key.part].role == "expert"]
    return yardstick.rounded(model, dict.fromkeys(experts, bits))


@pytest.fixture(scope="module")
def itself(run: Run) -> ParityReport:
    return run("reference", settings=BOTH_ROUNDS)


def test_the_reference_against_itself_is_exactly_zero(itself: ParityReport) -> None:
    assert itself.verdict == "pass", itself.checks
    for row in itself.rounds:
        assert row.accuracy_reference == row.accuracy_candidate
        assert row.difference is not None
        assert (row.difference.value, row.difference.low, row.difference.high) == (0, 0, 0)
        assert (row.identical_traces, row.identical_tails, row.identical_prompts) == (1, 1, 1)
        assert row.first_divergence == []
        assert row.tokens_reference == row.tokens_candidate
        # a rollout without an answer agrees with nothing, its own copy included
        assert row.agreement.value == row.answered_reference == row.answered_candidate
    found, engine, votes = itself.candidate_figures, itself.engine_figures, itself.votes
    assert found is not None
    assert engine is not None
    assert votes is not None
    assert (found.kl_mean, found.kl_p99, found.kl_max, found.top1_agreement) == (0, 0, 0, 1)
    assert set(found.router_agreement_by_layer) == {1.0}
    assert found.skip_rate == itself.skip_rate_reference > 0
    assert (engine.kl_max, engine.beyond.value, engine.router_agreement) == (0, 0, 1)
    assert (votes.only_reference, votes.only_candidate, votes.mcnemar_p) == (0, 0, 1)
    assert not itself.findings


def test_the_yardstick_is_what_a_candidate_is_held_against(itself: ParityReport) -> None:
    assert itself.yardstick_figures is not None
    assert itself.yardstick_figures.kl_mean > 0
    assert set(itself.yardstick_matrices) == {3}


def test_int8_passes(run: Run, model: Checkpoint, tmp_path: Path) -> None:
    execute(make_plan(model, nearest(8), "compressed-tensors"), tmp_path / "int8")
    found = run("int8", open_model(str(tmp_path / "int8")))
    assert found.verdict == "pass", failed(found)
    assert found.candidate_figures is not None
    assert found.candidate_figures.kl_mean > 0


def test_two_bit_experts_fail(run: Run, model: Checkpoint) -> None:
    found = run("int2", rounded(model, 2))
    assert found.verdict == "fail"
    assert "KL divergence, mean, beyond that of 3 bits" in failed(found)
    assert "engine" not in failed(found)
    experts = sum(PART_BY_NAME[key.part].role == "expert" for key in model.infos)
    assert found.yardstick_matrices == {3: experts}
    assert "leave the reference's" in pointed_at(found)


@pytest.mark.parametrize(("layer", "one", "other"), [(0, 3, 7), (1, 3, 7), (2, 0, 15)])
def test_two_swapped_experts_fail(
    run: Run, model: Checkpoint, layer: int, one: int, other: int
) -> None:
    found = run(f"swapped{layer}", swapped(model, layer, one, other))
    assert found.verdict == "fail"
    assert "every tensor is the reference's" in failed(found)
    assert "engine" not in failed(found)
    (line,) = (line for line in found.findings if line.startswith("weights:"))
    assert f"layer {layer} has" in line
    assert f"expert {one} (" in line
    assert f"expert {other} (" in line
    assert "attention" not in line


def changed(model: Checkpoint, name: str, change: Callable[[Tensor], Tensor]) -> Checkpoint:
    (key,) = (key for key in model.infos if str(key) == name)
    return replace(model, scaling={**model.scaling, key: Instead(change(model.read_float(key)))})


def judged(**figures: Any) -> ParityReport:
    """A report of nothing but these figures."""
    found = replace(_SHELL, **figures, checks=[])
    found.checks.extend(judgement.checks(found, Bounds()))
    return replace(found, findings=judgement.findings(found, Bounds()))


def transposed_head(weight: Tensor) -> Tensor:
    weight = weight.clone()
    weight[:64, :64] = weight[:64, :64].T.clone()
    return weight


@pytest.mark.parametrize(
    ("name", "change", "check", "shown"),
    [
        (
            "mlp.experts.9.down_proj.weight",
            lambda w: w * 1.5,
            "row",
            "expert 9 (5.9 dB, gain 1.49)",
        ),
        ("mlp.experts.2.up_proj.weight", lambda w: w.flip(0), "tensor", "expert 2 ("),
        ("self_attn.qkv_proj.q_proj.weight", transposed_head, "row", "q_proj ("),
        ("self_attn.qk_norm.temp", torch.ones_like, "row", "qk_norm.temp ("),
        ("mlp.gate.balancing_biases", torch.zeros_like, "tensor", "balancing_biases (0.0 dB"),
        ("post_mlp_residual_scale.residual_scale", lambda w: w * 2, "row", "residual_scale ("),
    ],
)
def test_every_tensor_is_looked_at(
    model: Checkpoint, name: str, change: Callable[[Tensor], Tensor], check: str, shown: str
) -> None:
    damaged = changed(rounded(model, 4), f"model.layers.1.{name}", change)
    errors, _ = compare_weights(model, damaged, lambda *progress: None)
    found = judged(weights=weight_figures(errors, Bounds()))
    assert f"every {check}" in failed(found)
    (line,) = (line for line in found.findings if line.startswith("weights:"))
    assert "layer 1 has" in line
    assert shown in line


def test_a_rounded_router_is_named(model: Checkpoint) -> None:
    name = "model.layers.2.mlp.gate.router_mlp.fc1.weight"
    coarse = changed(model, name, lambda w: (w * 64).round() / 64)
    errors, _ = compare_weights(model, coarse, lambda *progress: None)
    found = judged(weights=weight_figures(errors, Bounds()))
    (line, *_) = judgement._weight_findings(found)  # pyright: ignore[reportPrivateUsage]
    assert "router_mlp.fc1, which quantizers leave alone, differs (" in line


def test_honest_rounding_keeps_every_row(model: Checkpoint) -> None:
    for bits in (3, 4):
        errors, _ = compare_weights(model, rounded(model, bits), lambda *progress: None)
        assert not weight_figures(errors, Bounds()).strangers


def test_another_tokenizer_is_no_other_model_but_fails(bundled: Path, tmp_path: Path) -> None:
    files = {p.name: p.read_bytes() for p in bundled.iterdir() if p.suffix in (".json", ".jinja")}
    config = json.loads(files["config.json"])
    own = Tokenizer.parse(files, config)
    problems = [Problem("1", "Compute 2+3.", None)]

    def beside(**other: bytes) -> texts.TextFigures:
        changed = {name: other.get(name.partition(".")[0], text) for name, text in files.items()}
        return texts.compare(own, Tokenizer.parse(changed, config), problems)

    assert beside().differences == 0
    data = json.loads(files["tokenizer.json"])
    vocabulary = data["model"]["vocab"]
    vocabulary["Q"], vocabulary["Z"] = vocabulary["Z"], vocabulary["Q"]
    swapped = beside(tokenizer=json.dumps(data).encode())
    assert (swapped.tokens, swapped.examples, swapped.prompts) == (2, ["Q", "Z"], 0)
    assert beside(chat_template=files["chat_template.jinja"] + b"!").prompts == 1
    other_end = beside(generation_config=b'{"eos_token_id": 7}')
    assert (other_end.stops_candidate, other_end.differences) == ([7], 1)
    assert beside(generation_config=b'{"eos_token_id": [5, 7]}').differences == 0
    found = judged(texts=swapped)
    assert failed(found).startswith("tokenizer, chat template and stop tokens")
    assert "tokenizer: 2 tokens have another number or are missing: 'Q', 'Z'" in pointed_at(found)


def test_a_wrong_skip_expert_fails(run: Run, model: Checkpoint) -> None:
    found = run("skip", engine=SkipGivesInput(model))
    assert found.verdict == "fail"
    assert failed(found).startswith("engine against our runtime")
    assert "tokens that take the skip expert differ most" in pointed_at(found)
    assert "states are lost" not in pointed_at(found)


def test_lost_states_fail(run: Run, model: Checkpoint) -> None:
    found = run("forgets", engine=ForgetsConvolution(model))
    assert found.verdict == "fail"
    assert "engine against our runtime" in failed(found)
    assert "states are lost or wrong between blocks" in pointed_at(found)
    assert "seen first by the router of layer 0" in pointed_at(found)
    assert found.engine_figures is not None
    assert found.engine_figures.whole_beyond == 0
    assert found.engine_figures.first_column > 0  # type: ignore[operator]


def test_routers_that_lost_their_biases_fail(run: Run, model: Checkpoint) -> None:
    part = "mlp.gate.balancing_biases"
    changes = {
        key: Instead(torch.zeros(info.shape))
        for key, info in model.infos.items()
        if key.part == part and key.layer == 1
    }
    found = run("biases", replace(model, scaling=changes))
    assert found.verdict == "fail"
    assert "in the worst layer (1)" in failed(found)
    assert "routing: layer 1 sends" in pointed_at(found)


def test_another_arithmetic_of_the_same_weights_is_no_fault(run: Run, model: Checkpoint) -> None:
    found = run("fp32", engine=Arithmetic(exact=False).model(model))
    assert found.verdict == "pass", failed(found)
    assert found.engine_figures is not None
    assert found.engine_figures.kl_mean > 0


def test_too_little_evidence_is_inconclusive(run: Run, plan: Plan) -> None:
    found = run("reference", problems=plan.problems[:2], runs=None)
    assert found.verdict == "inconclusive"
    short = run("reference", settings=replace(plan.settings, budget=3, tail=3), runs=None)
    assert short.verdict == "inconclusive"
    undecided = [check.name for check in short.checks if check.outcome == "undecided"]
    assert undecided == ["evidence (teacher-forced tokens)"]
    assert short.generated_tokens < plan.bounds.min_tokens < short.trace_tokens


def test_a_reference_without_answers_is_judged_by_its_tokens(
    run: Run, plan: Plan, model: Checkpoint
) -> None:
    riddles = [Problem(str(i), f"Say {i}.", None) for i in range(8)]
    settings = replace(plan.settings, budget=20, tail=20)
    few = replace(plan.bounds, min_tokens=200)
    same = run("reference", problems=riddles, settings=settings, bounds=few)
    assert same.rounds[0].answered_reference < 1
    assert same.verdict == "pass"
    fine = run("int8", rounded(model, 8), problems=riddles, settings=settings, bounds=few)
    assert fine.rounds[0].identical_traces < 1 or fine.candidate_figures.kl_mean > 0  # type: ignore[union-attr]
    assert fine.verdict == "pass", failed(fine)
    other = run("int2", rounded(model, 2), problems=riddles, settings=settings, bounds=few)
    assert other.verdict == "fail"
    assert "answer" not in failed(other)


def test_bounds_take_the_place_of_the_yardstick(run: Run, plan: Plan) -> None:
    strict = Bounds(max_kl=0, max_kl_p99=0, min_top1=1, min_router=1, min_tokens=1, margin=0.2)
    assert run("reference", bounds=strict).verdict == "pass"
    found = run("fp32", bounds=replace(strict, max_kl=-1.0))
    assert failed(found) == "KL divergence, mean"


def test_forced_prompts_are_the_same_for_both(run: Run, model: Checkpoint) -> None:
    found = run("int2", rounded(model, 2), forced=True, settings=BOTH_ROUNDS)
    assert [row.identical_prompts for row in found.rounds] == [1, 1]
    assert found.rounds[1].identical_traces < 1


def test_the_report_in_every_form(run: Run, model: Checkpoint) -> None:
    found = run("int2", rounded(model, 2), settings=BOTH_ROUNDS)
    facts = report.to_json(found)
    contract = {"rounds", "answer_agreement", "mcnemar_p", "kl_mean", "router_agreement",
                "first_divergence", "problems", "tokens", "verdict"}  # fmt: skip
    assert contract <= set(facts)
    assert facts["first_divergence"]["rollouts"] > 0
    assert "verdict: fail" in report.to_text(found)
    page = report.to_html(found)
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    junit = report.to_junit(found)
    assert f'failures="{len(failed(found).splitlines())}"' in junit


def test_cached_and_whole_readings_agree(model: Checkpoint) -> None:
    engine = Arithmetic().model(model)
    ids = torch.arange(7, 60)
    traces = [forced.Trace(ids[:size], prompt, i, 0) for i, (size, prompt) in
              enumerate([(9, 4), (30, 1), (53, 52), (20, 11)])]  # fmt: skip
    own = forced.evaluate(engine, traces)
    for blocks in (forced.whole(engine, traces), forced.cached(engine, traces)):
        (reading,) = forced.compare([(engine, own)], blocks)
        assert float(reading.kl.max()) == 0
        assert torch.equal(reading.routes, own.routes)
        assert torch.equal(reading.weights, own.weights)


class Server:
    """What a server is to the test: answers, and log-probabilities, and nothing of the model."""

    name = "server"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._local = LocalGenerator(Arithmetic().model(checkpoint), Tokenizer.of(checkpoint))

    def generate(self, *arguments: Any, **options: Any) -> list[Answer]:
        return self._local.generate(*arguments, **options)


def served(run_plan: Plan, model: Checkpoint, weights: Checkpoint, told: bool) -> ParityReport:
    """A server of ``weights``, which are told to the test or not."""

    def load() -> LocalGenerator:
        return LocalGenerator(Arithmetic().model(model), Tokenizer.of(model))

    reference = Side("reference", load, model, identity={"digest": "reference"})
    there = Side("server", lambda: Server(weights), weights if told else None)
    return parity(reference, there, replace(run_plan, runs=None))


def test_a_server_is_judged_by_its_log_probabilities(plan: Plan, model: Checkpoint) -> None:
    coarse = rounded(model, 2)
    found = served(plan, model, coarse, told=True)
    assert "KL divergence of sampled tokens, mean" in failed(found)
    assert found.candidate_figures is None
    assert found.sampled is not None
    assert found.sampled_engine is not None
    # it is our own runtime that serves: all of the divergence is the weights'
    assert found.sampled_engine.kl.value < 1e-9 < found.sampled.kl.value
    assert "same weights" not in failed(found)
    alike = served(plan, model, model, told=False)
    assert alike.verdict == "pass", failed(alike)
    assert alike.sampled is not None
    assert alike.sampled.kl.value < 1e-9
    assert alike.checks[1].name == "evidence (sampled tokens)"
    assert alike.checks[1].value == alike.sampled.tokens
    assert alike.weights is None


def test_a_server_that_was_given_the_references_tails(plan: Plan, model: Checkpoint) -> None:
    forced_plan = replace(plan, forced=True, settings=BOTH_ROUNDS, problems=plan.problems[:3])
    found = served(forced_plan, model, rounded(model, 2), told=True)
    assert found.rounds[0].identical_tails < 1  # so its own tails would have made other prompts
    assert found.sampled_engine is not None
    assert found.sampled_engine.kl.value < 1e-9


def test_other_prompts_are_pointed_at(run: Run, model: Checkpoint) -> None:
    class Longer(Server):
        def generate(self, *arguments: Any, **options: Any) -> list[Answer]:
            answers = super().generate(*arguments, **options)
            return [replace(answer, prompt_tokens=answer.prompt_tokens + 1) for answer in answers]

    plan = Plan(
        read(model.path / "data" / "problems.jsonl", 2), replace(FIRST_ROUND, budget=8, tail=8)
    )
    one, other = (
        Side(kind.__name__, lambda kind=kind: kind(model), model) for kind in (Server, Longer)
    )
    found = parity(one, other, plan)
    assert found.rounds[0].other_prompts == 1
    assert "prompts: 100.0% of round 0" in pointed_at(found)
    assert not parity(one, one, plan).rounds[0].other_prompts


def test_models_of_other_shapes_are_refused_at_once(model: Checkpoint, plan: Plan) -> None:
    def never() -> LocalGenerator:
        raise AssertionError("it is not to be opened")

    fewer = replace(model, config=replace(model.config, experts=model.config.experts - 1))
    one, other = Side("reference", never, model), Side("other", never, fewer)
    with pytest.raises(InputError, match="different models"):
        parity(one, other, plan)


class Broken(Model):
    """An engine whose logits are not numbers."""

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.full_like(super().logits(hidden), torch.nan)


def test_values_that_are_no_numbers(run: Run, model: Checkpoint) -> None:
    tokenizer = Tokenizer.of(model)
    traces = [forced.Trace(torch.tensor(tokenizer.encode("1+1=2")), 2, 0, 0)]
    judge, broken = Arithmetic().model(model), Broken(model)
    own = forced.evaluate(judge, traces)
    (reading,) = forced.compare([(judge, own)], forced.whole(broken, traces))
    assert reading.kl.isinf().all()
    with pytest.raises(InputError, match="not numbers"):
        LocalGenerator(broken, tokenizer).generate(
            [Request("1+1", 1)], budget=2, sampling=Sampling(1.0)
        )
