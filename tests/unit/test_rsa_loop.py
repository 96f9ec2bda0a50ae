"""The loop: what it reduces to, what it depends on, how long its prompts get."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from zaya_convert.errors import InputError, OutputError, OutputExistsError, UsageError
from zaya_convert.models import open_model
from zaya_convert.rsa import records
from zaya_convert.rsa.generator import SEED_BITS, Answer, Request, rollout_seed
from zaya_convert.rsa.local import LocalGenerator, prompt_ids
from zaya_convert.rsa.loop import Round, draw, run
from zaya_convert.rsa.problems import Problem
from zaya_convert.rsa.prompts import message_for, problem_message
from zaya_convert.rsa.settings import PRESETS, Settings
from zaya_convert.rsa.tails import TailCutter
from zaya_convert.runtime.generate import Sampling, complete
from zaya_convert.runtime.model import Model
from zaya_convert.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

PROBLEMS = [
    Problem("a", "Start with 14. Add 5. Multiply by 2. What is the result?", "38"),
    Problem("b", "A dial shows 40. Turn it up by 7. What does it show?", "47"),
    Problem("c", "Start with 8. Subtract 3. What is the result?", "05"),
]
SMALL = Settings(candidates=3, tails=2, rounds=2, budget=24, tail=8)


class Echo:
    """Answers by rule: long texts that name their seed, so that every rollout can be told."""

    name = "echo"

    def __init__(self, tokenizer: Tokenizer, length: int = 40, text: str = "") -> None:
        self.tokenizer, self.length, self.text = tokenizer, length, text
        self.asked: list[str] = []

    def generate(
        self,
        requests: Sequence[Request],
        *,
        budget: int,
        sampling: Sampling,
        progress: Callable[[int], None] = lambda tokens: None,
    ) -> list[Answer]:
        self.asked += [request.message for request in requests]
        found = []
        for request in requests:
            text = self.text or f"{request.seed} " * self.length
            ids = self.tokenizer.encode(text, add_bos=False)[:budget]
            found.append(Answer(self.tokenizer.decode(ids), tuple(ids), 1, len(ids), "length"))
            progress(len(ids))
        return found


@pytest.fixture(scope="module")
def tokenizer(bundled: Path) -> Tokenizer:
    return Tokenizer.of(open_model(str(bundled)))


@pytest.fixture(scope="module")
def generator(bundled: Path, tokenizer: Tokenizer) -> LocalGenerator:
    return LocalGenerator(Model(open_model(str(bundled))), tokenizer)


@pytest.fixture(scope="module")
def cutter(tokenizer: Tokenizer) -> TailCutter:
    return TailCutter(tokenizer)


@pytest.fixture(scope="module")
def rounds(generator: LocalGenerator, cutter: TailCutter) -> list[Round]:
    return run(generator, cutter, PROBLEMS, SMALL, seed=5)


def test_seeds_are_31_bits_and_all_different() -> None:
    seeds = {rollout_seed(s, p, r, c) for s in range(3) for p in range(9) for r in (0, 1)
             for c in range(9)}  # fmt: skip
    assert len(seeds) == 3 * 9 * 2 * 9
    assert all(0 <= seed < 2**SEED_BITS for seed in seeds)


def test_draws_are_uniform_without_replacement() -> None:
    drawn = [draw(SMALL, 3, (0, p, 1, c)) for p in range(400) for c in range(3)]
    assert all(len(set(d)) == 2 for d in drawn)
    for pair in [(a, b) for a in range(3) for b in range(3) if a != b]:
        assert 130 < drawn.count(pair) < 270  # of 200
    assert draw(SMALL, 0, (0, 0, 0, 0)) == ()


def test_only_the_round_before_is_seen(rounds: list[Round]) -> None:
    assert [len(found) for found in rounds] == [3, 3, 3]
    for before, found in pairwise(rounds):
        for row, population in zip(found, before, strict=True):
            assert len({c.problem for c in row}) == 1
            assert all(max(c.sources) < len(population) for c in row)


def test_no_rounds_are_parallel_sampling(
    generator: LocalGenerator, cutter: TailCutter, rounds: list[Round], tokenizer: Tokenizer
) -> None:
    (only,) = run(generator, cutter, PROBLEMS, replace(SMALL, rounds=0), seed=5)
    assert only == rounds[0]
    for index, row in enumerate(only):
        prompt = prompt_ids(tokenizer, problem_message(PROBLEMS[index].text))
        for candidate in row:
            (alone,) = complete(
                generator.engine, [prompt], max_new_tokens=24, sampling=Sampling(1.0),
                stop_ids=tokenizer.stop_ids, streams=[(candidate.seed,)],
            )  # fmt: skip
            assert tuple(alone.tokens) == candidate.answer.tokens


def test_one_tail_is_markovian_continuation(
    generator: LocalGenerator, cutter: TailCutter, tokenizer: Tokenizer
) -> None:
    settings = replace(SMALL, tails=1)
    found = run(generator, cutter, PROBLEMS[:1], settings, seed=5)
    for index, problem in enumerate(PROBLEMS[:1]):
        for chain in range(3):
            text = problem.text
            message = message_for(text)
            for number in range(3):  # each chain by itself, from its own last tokens alone
                candidate = found[number][index][chain]
                assert candidate.sources == ((chain,) if number else ())
                (alone,) = generator.generate(
                    [Request(message, candidate.seed)], budget=24, sampling=Sampling(1.0)
                )
                assert alone.text == candidate.answer.text
                message = message_for(text, [cutter.cut(alone, 8, "reasoning")])


def test_a_tail_as_long_as_the_budget_is_full_chain_rsa(
    tokenizer: Tokenizer, cutter: TailCutter
) -> None:
    echo = Echo(tokenizer)
    settings = replace(SMALL, tail=24)
    found = run(echo, cutter, PROBLEMS, settings)
    for row in found[0] + found[1]:
        for candidate in row:
            assert candidate.tail == candidate.answer.text  # nothing was cut
    whole = [c.answer.text for c in found[0][0]]
    first = found[1][0][0]
    assert echo.asked[9] == message_for(PROBLEMS[0].text, [whole[i] for i in first.sources])


def test_batches_change_nothing(
    generator: LocalGenerator, cutter: TailCutter, rounds: list[Round]
) -> None:
    few = LocalGenerator(generator.engine, generator.tokenizer, rows=4)
    assert _tokens(run(few, cutter, PROBLEMS, SMALL, seed=5)) == _tokens(rounds)
    alone = run(few, cutter, PROBLEMS[:1], replace(SMALL, rounds=1), seed=5)
    assert _tokens(alone) == [found[:1] for found in _tokens(rounds[:2])]
    other = run(few, cutter, PROBLEMS[:1], replace(SMALL, rounds=0), seed=6)
    assert _tokens(other)[0] != _tokens(rounds)[0][:1]


def _tokens(rounds: Sequence[Round]) -> list[list[list[tuple[int, ...] | None]]]:
    return [[[c.answer.tokens for c in row] for row in found] for found in rounds]


def test_forced_prompts_come_from_the_other_run(
    tokenizer: Tokenizer, cutter: TailCutter, rounds: list[Round]
) -> None:
    echo = Echo(tokenizer)
    run(echo, cutter, PROBLEMS, SMALL, seed=5, forced=rounds)
    tails = [rounds[1][0][i].tail for i in rounds[2][0][0].sources]
    assert echo.asked[18] == message_for(PROBLEMS[0].text, tails)


@pytest.mark.parametrize(
    "text",
    [
        "", "A:14+5=19\nB:19*2=38\n" * 9, "\u20ac\U0001f600" * 40, "\ufffd" * 60,
        "<|im_end|>" * 20 + "x", "<|im_<|im_end|>end|>" * 30, " " * 100, "é" * 50,
    ],
)  # fmt: skip
@pytest.mark.parametrize("carry", ["reasoning", "answer"])
def test_prompts_stay_within_problem_plus_tails(
    tokenizer: Tokenizer, cutter: TailCutter, text: str, carry: str
) -> None:
    settings = Settings(candidates=4, tails=4, rounds=4, budget=96, tail=13, carry=carry)
    echo = Echo(tokenizer, text=text or "")
    run(echo, cutter, PROBLEMS[:1], settings)
    question = len(prompt_ids(tokenizer, PROBLEMS[0].text))
    frame = len(prompt_ids(tokenizer, message_for("", ["x"] * 4)))
    ends = [i for i in tokenizer.encode(echo.asked[0], add_bos=False) if i in tokenizer.stop_ids]
    assert not ends
    for message in echo.asked:
        ids = prompt_ids(tokenizer, message)
        assert len(ids) <= question + 4 * settings.tail + frame
        # the user's turn ends once: no tail can end it
        assert sum(tokenizer.decode([i], skip_special=False) == "<|im_end|>" for i in ids) == 1


def test_half_characters_leave_no_trace(tokenizer: Tokenizer, cutter: TailCutter) -> None:
    ids = tokenizer.encode("a\U0001f600bc", add_bos=False)
    answer = Answer("", tuple(ids), 0, len(ids), "length")
    tails = {cutter.cut(answer, size, "reasoning") for size in range(2, len(ids) + 1)}
    assert tails <= {"c", "bc", "\U0001f600bc", "a\U0001f600bc"}


def test_the_answer_is_carried_when_asked(tokenizer: Tokenizer, cutter: TailCutter) -> None:
    text = "one\ntwo\n</think>\n\\boxed{07}"
    ids = tokenizer.encode(text, add_bos=False)
    for tokens in (tuple(ids), None):
        answer = Answer(text, tokens, 0, len(ids), "stop")
        assert cutter.cut(answer, 40, "reasoning") == "one\ntwo\n"
        carried = cutter.cut(answer, 40, "answer")
        assert carried.endswith("\\boxed{07}")
        assert "think" not in carried


def test_a_prompt_that_leaves_no_room(generator: LocalGenerator) -> None:
    long = Request("word " * 3000, 1)
    with pytest.raises(InputError, match="fewer or shorter tails"):
        generator.generate([long], budget=4, sampling=Sampling())


def test_the_last_round_may_be_another(tokenizer: Tokenizer, cutter: TailCutter) -> None:
    settings = replace(SMALL, final_candidates=1, final_sampling=Sampling(0.6, 0.95, 40))
    found = run(Echo(tokenizer), cutter, PROBLEMS, settings)
    assert [len(row) for rounds in found for row in rounds] == [3] * 6 + [1] * 3
    assert settings.sampling_of(2) == Sampling(0.6, 0.95, 40)
    assert settings.sampling_of(1) == Sampling(1.0)


def test_presets_are_the_reports() -> None:
    report, proxy, light = PRESETS["report"], PRESETS["proxy"], PRESETS["light"]
    assert (report.candidates, report.tails, report.rounds) == (16, 4, 2)
    assert (report.budget, report.tail) == (40960, 4096)
    assert PRESETS["deployment"].budget == 16384
    assert (light.candidates, light.budget) == (8, 8192)
    assert (proxy.candidates, proxy.tails, proxy.rounds, proxy.budget) == (32, 4, 8, 32768)
    assert proxy.size(8) == 1
    assert proxy.sampling_of(8) == Sampling(0.6, 0.95, 40)


@pytest.mark.parametrize(
    "change",
    [{"tails": 4}, {"tail": 25}, {"candidates": 0}, {"rounds": -1}, {"carry": "all"},
     {"select": "best"}],
)  # fmt: skip
def test_settings_that_make_no_sense(change: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        replace(SMALL, **change)


HEAD = records.header(SMALL.to_dict(), seed=5, problems="abc", model={"engine": "x"})


def test_a_run_goes_on_from_its_file(
    tmp_path: Path, generator: LocalGenerator, cutter: TailCutter, rounds: list[Round]
) -> None:
    path = tmp_path / "new" / "run.jsonl"
    with records.open_run(path, HEAD, resume=False) as file:
        run(generator, cutter, PROBLEMS, replace(SMALL, rounds=0), seed=5, keep=file.append)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(whole + lines[1] + lines[2][:-9])  # a round that was interrupted
    with records.open_run(path, HEAD, resume=True) as file:
        assert file.rounds == rounds[:1]
        again = run(
            generator, cutter, PROBLEMS, SMALL, seed=5, done=file.rounds[:], keep=file.append
        )
    assert again == rounds
    assert path.read_bytes().startswith(whole)
    with records.open_run(path, HEAD, resume=True) as file:
        assert file.rounds == rounds


def test_a_file_of_another_run_is_refused(tmp_path: Path, rounds: list[Round]) -> None:
    path = tmp_path / "run.jsonl"
    with records.open_run(path, HEAD, resume=False) as file:
        file.append(rounds[0])
        with (
            pytest.raises(OutputExistsError, match="another run"),
            records.open_run(path, HEAD, resume=True),
        ):
            pass
    with pytest.raises(OutputExistsError), records.open_run(path, HEAD, resume=False):
        pass
    other = replace(SMALL, tail=9).to_dict()
    head = records.header(other, seed=5, problems="abc", model={"engine": "x"})
    with (
        pytest.raises(InputError, match=r"settings.tail: 8 there, 9 here"),
        records.open_run(path, head, resume=True),
    ):
        pass
    foreign = tmp_path / "notes.jsonl"
    for text in ('{"a": 1}\n', "a line without an end"):
        foreign.write_text(text)
        with (
            pytest.raises(InputError, match="no file of"),
            records.open_run(foreign, HEAD, resume=True),
        ):
            pass
        assert foreign.read_text() == text


def test_nothing_changes_before_a_round_is_done(tmp_path: Path, rounds: list[Round]) -> None:
    path = tmp_path / "run.jsonl"
    with records.open_run(path, HEAD, resume=False):
        assert path.exists()  # and is locked
    assert not path.exists()
    path.write_text("what was there")
    with records.open_run(path, HEAD, resume=False, overwrite=True) as file:
        assert not file.rounds
    assert path.read_text() == "what was there"
    with records.open_run(path, HEAD, resume=False, overwrite=True) as file:
        file.append(rounds[0])
    with records.open_run(path, HEAD, resume=True) as file:
        assert file.rounds == rounds[:1]
    whole = path.read_bytes()
    path.write_bytes(whole[:50])  # killed while it wrote the first round
    with records.open_run(path, HEAD, resume=True) as file:
        assert not file.rounds
        file.append(rounds[0])
    assert path.read_bytes() == whole
    with (
        pytest.raises(OutputError, match="no file"),
        records.open_run(Path("/dev/null"), HEAD, resume=True),
    ):
        pass


def test_a_damaged_file_is_refused(tmp_path: Path, rounds: list[Round]) -> None:
    path = tmp_path / "run.jsonl"
    with records.open_run(path, HEAD, resume=False) as file:
        file.append(rounds[0])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    with pytest.raises(InputError, match="not whole"), records.open_run(path, HEAD, resume=True):
        pass
    row = json.loads(lines[2])
    changes = [
        {"problem": None},
        {"boxed": "8"},
        {"tokens": row["tokens"][:-1]},
        {"new_tokens": -1},
    ]
    for change in changes:
        other = json.dumps(row | change).encode() + b"\n"
        path.write_bytes(b"".join([*lines[:2], other, *lines[3:]]))
        with pytest.raises(InputError, match="changed"), records.open_run(path, HEAD, resume=True):
            pass
    path.write_bytes(b"".join([*lines[:2], b"{}\n", *lines[2:]]))
    with pytest.raises(InputError, match="damaged"), records.open_run(path, HEAD, resume=True):
        pass
