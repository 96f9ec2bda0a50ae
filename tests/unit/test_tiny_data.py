"""The bundled checkpoint's task, tokenizer and shipped files agree with each other."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from tools.tiny.data import (
    SPLITS,
    Problem,
    Step,
    aggregation_example,
    draw_problem,
    single_example,
    split_of,
    tell,
    write_trace,
)
from tools.tiny.prose import prose_text
from tools.tiny.tokenizer import build_tokenizer
from zaya_convert.rsa.answers import extract_boxed, reasoning_of
from zaya_convert.rsa.prompts import (
    aggregate_message,
    message_for,
    problem_message,
    refine_message,
)

BUNDLED = Path(__file__).resolve().parents[2] / "zaya_convert" / "bundled" / "zaya1-tiny"

_LINE = re.compile(r"^([A-Z]):(\d\d)([-+*])(\d+)=(\d\d)$")


def rows_of(name: str) -> list[dict[str, str]]:
    text = (BUNDLED / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))


def answer_from_words(text: str) -> str:
    """The answer worked out from the wording alone, by none of the generator's code."""
    story = text.split("modulo")[0]
    value: int | None = None
    for sentence in re.split(r"[.?]", story):
        number = re.search(r"\d+", sentence)
        if number is None:
            continue
        operand = int(number.group())
        if value is None:
            value = operand
        elif re.search(r"Subtract|gives away|down", sentence):
            value -= operand
        elif re.search(r"Multiply|times", sentence):
            value *= operand
        else:
            assert re.search(r"Add|finds|up by", sentence), sentence
            value += operand
    assert value is not None
    return f"{value % 100:02d}"


def check_trace(text: str, slips_allowed: bool) -> int:
    """Checks the response's lines against each other and the box; the number of slips."""
    response = text.rsplit("<think>\n", 1)[1]
    slips, value = 0, None
    for line in reasoning_of(response).splitlines():
        match = _LINE.match(line)
        assert match, line
        _, before, operation, operand, after = match.groups()
        assert value is None or before == value
        left, right = int(before), int(operand)
        result = {"+": left + right, "-": left - right, "*": left * right}[operation]
        slips += result % 100 != int(after)
        value = after
    assert extract_boxed(response) == value
    assert slips_allowed or slips == 0
    return slips


@pytest.mark.parametrize("seed", range(40))
def test_answers_follow_from_the_wording(seed: int) -> None:
    rng = random.Random(seed)
    problem = draw_problem(rng, "validation")
    assert answer_from_words(tell(problem, rng)) == problem.answer


def test_traces_are_consistent_and_slip_at_the_wanted_rate() -> None:
    rng = random.Random(1)
    assert all(check_trace(single_example(rng, "train", 0.0).text, False) == 0 for _ in range(50))
    texts = [single_example(rng, "train", 0.1).text for _ in range(400)]
    steps = sum(text.rsplit("<think>", 1)[1].count("=") for text in texts)
    rate = sum(check_trace(text, True) for text in texts) / steps
    assert 0.07 < rate < 0.13


def test_trace_of_a_known_problem() -> None:
    problem = Problem(47, (Step("+", 38), Step("*", 3), Step("-", 60)))
    assert problem.canonical == "47+38*3-60"
    assert write_trace(problem, problem.values()) == "A:47+38=85\nB:85*3=55\nC:55-60=95\n"
    assert problem.answer == "95"
    assert problem.values({0: 1}) == (47, 86, 58, 98)


def test_hidden_rules_mute_only_results_no_tail_shows() -> None:
    rng = random.Random(3)
    muted = 0
    for _ in range(200):
        example = aggregation_example(rng, "train", 0.0, 0.1, hidden=2)
        context = example.text[: example.response_at]
        for start, end in example.mute:
            muted += 1
            line = example.text[example.text.rfind("\n", 0, start) + 1 : end]
            assert re.fullmatch(r"[A-Z]:\d\d#\d=\d\d", line)
            assert line not in context
    assert muted > 20


def test_splits_partition_the_problems() -> None:
    rng = random.Random(2)
    for split in SPLITS:
        for _ in range(20):
            assert split_of(draw_problem(rng, split).canonical) == split
            assert split_of(prose_text(rng, split)) == split


@given(st.text(alphabet="ab{}\\ ", max_size=12))
def test_extract_boxed_finds_what_was_boxed(inner: str) -> None:
    plain = inner.replace("\\", "").replace("{", "").replace("}", "")
    assert extract_boxed(f"\\boxed{{0}} then \\boxed{{{plain}}} end") == plain.strip()
    extract_boxed(inner)  # whatever it is, it must not fail


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("no box 12", None),
        (r"\boxed{12}", "12"),
        (r"\boxed{1} and \boxed{ 2 }", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed{3} then \boxed{4", "3"),
        (r"\boxed{4 then \boxed{5}", "5"),
        (r"\boxed{\boxed{6}}", r"\boxed{6}"),
        (r"\boxed{}", ""),
    ],
)
def test_extract_boxed(text: str, expected: str | None) -> None:
    assert extract_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\n</think>\n\\boxed{1}", "a\nb\n"),
        ("<think>\na</think>b</think>", "a"),
        ("cut off", "cut off"),
        ("uses <think> later</think>", "uses <think> later"),
    ],
)
def test_reasoning_of(text: str, expected: str) -> None:
    assert reasoning_of(text) == expected


def test_prompts_hold_the_problem_all_tails_and_the_answer_format() -> None:
    tails = ["first\nidea", "second", "third"]
    for message in (problem_message("P?"), refine_message("P?", "t"), message_for("P?", tails)):
        assert message.startswith("P?\n")
        assert message.endswith("\\boxed{}.")
    message = aggregate_message("P?", tails)
    positions = [message.index(f"Candidate {n}:\n{tail}") for n, tail in enumerate(tails, 1)]
    assert positions == sorted(positions)
    assert message_for("P?") == problem_message("P?")
    assert message_for("P?", ["t"]) == refine_message("P?", "t")
    with pytest.raises(ValueError, match="at least one"):
        aggregate_message("P?", [])


@given(st.text(max_size=60).filter(lambda text: "\u2581" not in text))
def test_tokenizer_is_lossless(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_tokenizer_has_the_promised_shape(tokenizer: Tokenizer) -> None:
    names = (
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<|im_start|>",
        "<|im_end|>",
        "<think>",
        "</think>",
    )
    assert [tokenizer.token_to_id(name) for name in names] == list(range(8))
    assert tokenizer.token_to_id("<0x00>") == 8
    assert tokenizer.encode("x").ids[0] == 2
    assert tokenizer.encode("2026", add_special_tokens=False).tokens == list("2026")
    words = tokenizer.encode(aggregate_message("P?", ["t"]), add_special_tokens=False).tokens
    assert len(words) < 1.6 * len(aggregate_message("P?", ["t"]).split())


def test_a_tokenizer_can_be_built_again() -> None:
    rng = random.Random(0)
    texts = [single_example(rng, "train", 0.0).text for _ in range(200)]
    built = build_tokenizer(texts)
    text = texts[0]
    assert built.decode(built.encode(text).ids[1:], skip_special_tokens=False) == text


def test_shipped_problems_are_right_and_held_out() -> None:
    rows = rows_of("problems")
    assert len(rows) >= 256
    assert len({row["id"] for row in rows}) == len({row["problem"] for row in rows}) == len(rows)
    for row in rows:
        assert answer_from_words(row["problem"]) == row["answer"]
        assert split_of(canonical_of(row["problem"])) == "problems"


@pytest.mark.parametrize("split", ["calibration", "validation"])
def test_shipped_texts_are_held_out_and_fit_the_checkpoint(
    split: str, tokenizer: Tokenizer
) -> None:
    path = BUNDLED / "data" / f"{split}.jsonl"
    assert path.stat().st_size <= 400_000
    config = json.loads((BUNDLED / "config.json").read_text())
    assert tokenizer.get_vocab_size() < config["vocab_size"]
    texts = [row["text"] for row in rows_of(split)]
    encodings = tokenizer.encode_batch(texts)
    assert sum(len(e.ids) for e in encodings) >= 60_000
    assert max(max(e.ids) for e in encodings) < config["vocab_size"]
    assert max(len(e.ids) for e in encodings) <= config["max_position_embeddings"]
    chats = [text for text in texts if text.startswith("<|im_start|>")]
    assert any("Candidate 2:" in text for text in chats)
    for text in chats:
        check_trace(text, slips_allowed=True)
        problem = text.split("user\n", 1)[1].split("\n", 1)[0]
        assert split_of(canonical_of(problem)) == split
    prose = [text for text in texts if not text.startswith("<|im_start|>")]
    assert prose
    assert all(split_of(text) == split for text in prose)


def canonical_of(text: str) -> str:
    """The bare chain read back from the wording."""
    chain = ""
    for sentence in re.split(r"[.?]", text.split("Count modulo")[0]):
        number = re.search(r"\d+", sentence)
        if number is None:
            continue
        sign = "+"
        if re.search(r"Subtract|gives away|down", sentence):
            sign = "-"
        elif re.search(r"Multiply|times", sentence):
            sign = "*"
        chain += (sign if chain else "") + number.group()
    return chain


def test_shipped_weights_have_the_hybrid_layout() -> None:
    path = BUNDLED / "model.safetensors"
    assert path.stat().st_size <= 24_000_000
    with safe_open(path, framework="numpy") as file:  # headers only
        names = set(file.keys())
        biases = file.get_slice("model.layers.0.mlp.gate.balancing_biases")
        embedding = file.get_slice("model.embed_tokens.weight")
        assert biases.get_dtype() == "F32"
        assert biases.get_shape() == [17]
        assert embedding.get_dtype() == "BF16"
        assert (
            embedding.get_shape()[0]
            == json.loads((BUNDLED / "config.json").read_text())["vocab_size"]
        )
    assert "lm_head.weight" not in names
    assert "model.layers.0.mlp.gate.router_states_scale" not in names
    assert "model.layers.1.mlp.gate.router_states_scale" in names
    assert path.stat().st_mode & 0o777 == 0o644


def test_model_card_states_its_figures() -> None:
    card = (BUNDLED / "README.md").read_text(encoding="utf-8")
    for heading in ("## Accuracy", "## Routing", "## Training", "## Data", "## Licence"):
        assert heading in card
    for figure in (
        r"single sample[^\n]*0\.\d{3}",
        r"round 2[^\n]*0\.\d{3}",
        r"perplexity[^\n]*\d\.\d+",
    ):
        assert re.search(figure, card), figure
