"""Generation: reproducible, independent of the batch, and stopped where it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nano import Nano
from zaya_convert.checkpoint import open_source
from zaya_convert.errors import InputError, UsageError
from zaya_convert.runtime.generate import (
    Decoder,
    Sampling,
    Step,
    Task,
    choose,
    complete,
    generate,
    logprobs,
)
from zaya_convert.runtime.model import Model, Output

PROMPTS = [[5, 6, 7, 8], [9], [11, 12, 13, 14, 15, 16, 17]]
HOT = Sampling(temperature=1.5, top_p=0.95, seed=3)


@pytest.fixture(scope="module")
def model(nano: Nano) -> Model:
    return Model(open_source(nano("hybrid", dtype=torch.float32)))


def texts(
    model: Model, prompts: list[list[int]], streams: list[tuple[int, ...]]
) -> list[list[int]]:
    found = complete(model, prompts, max_new_tokens=12, sampling=HOT, streams=streams)
    return [completion.tokens for completion in found]


def test_a_batch_equals_its_sequences(model: Model) -> None:
    together = texts(model, PROMPTS, [(0,), (1,), (2,)])
    alone = [texts(model, [p], [(i,)])[0] for i, p in enumerate(PROMPTS)]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == 3


def test_streams_and_seeds_name_the_noise(model: Model) -> None:
    assert (
        texts(model, PROMPTS[:1] * 2, [(7, 1), (7, 1)])[0] == texts(model, PROMPTS[:1], [(7, 1)])[0]
    )
    first, second = texts(model, PROMPTS[:1] * 2, [(7, 1), (7, 2)])
    assert first != second
    default = complete(model, PROMPTS, max_new_tokens=12, sampling=HOT)
    assert [c.tokens for c in default] == texts(model, PROMPTS, [(0,), (1,), (2,)])


def test_prefill_chunks_change_nothing(model: Model) -> None:
    whole = complete(model, PROMPTS, max_new_tokens=8, sampling=HOT)
    for chunk in (1, 3):
        parts = complete(model, PROMPTS, max_new_tokens=8, sampling=HOT, prefill_chunk=chunk)
        assert [c.tokens for c in parts] == [c.tokens for c in whole]


def test_sequences_stop_on_their_own(model: Model) -> None:
    free = complete(model, PROMPTS, max_new_tokens=12, sampling=HOT)
    stop = free[0].tokens[3]
    steps = list(generate(model, PROMPTS, max_new_tokens=12, sampling=HOT, stop_ids={stop}))
    for index, completion in enumerate(free):
        tokens = [s.token for s in steps if s.sequence == index]
        cut = completion.tokens
        if stop in cut:
            cut = cut[: cut.index(stop) + 1]
        assert tokens == cut
        last = [s.finished for s in steps if s.sequence == index]
        assert last == [""] * (len(cut) - 1) + ["stop" if stop in cut else "length"]
    stopped = complete(model, PROMPTS, max_new_tokens=12, sampling=HOT, stop_ids={stop})
    assert stop not in stopped[0].tokens
    assert stopped[0].finished == "stop"


def test_the_context_ends_a_sequence(tmp_path: Path, nano: Nano) -> None:
    short = Model(open_source(nano("hybrid", dtype=torch.float32, max_positions=9)))
    result = complete(short, PROMPTS, max_new_tokens=50)
    assert [len(c.tokens) for c in result] == [5, 8, 2]
    assert {c.finished for c in result} == {"length"}
    with pytest.raises(InputError, match="prompt 1 has 9 tokens; the model's context is 9"):
        complete(short, [[1], [4] * 9], max_new_tokens=1)
    with pytest.raises(InputError, match="prompt 0 is empty"):
        complete(short, [[]], max_new_tokens=1)


def test_nothing_to_do(model: Model) -> None:
    assert complete(model, [], max_new_tokens=5) == []
    assert complete(model, PROMPTS, max_new_tokens=0)[0].tokens == []


def test_greedy_takes_the_most_probable(model: Model) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 1.0, 0.0]])
    assert choose(logits, Sampling(), None).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0, top_k=2), {0, 1}),
        (Sampling(1.0, top_p=0.5), {0}),
        (Sampling(1.0, top_p=0.51), {0, 1}),
        (Sampling(1.0, top_p=0.85, top_k=3), {0, 1, 2}),
        (Sampling(1.0, top_p=0.05), {0}),
        (Sampling(1.0), {0, 1, 2, 3}),
    ],
)
def test_filters_keep_what_they_should(sampling: Sampling, kept: set[int]) -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    # Noise that favours one token beyond all others: it is chosen if and only if it was kept.
    chosen = {
        i
        for i in range(4)
        if int(choose(logits, sampling, torch.eye(4, dtype=torch.float64)[i : i + 1] * 100)) == i
    }
    assert chosen == kept


def test_next_to_no_temperature_is_greedy() -> None:
    logits = torch.tensor([[-80.0, 3.0, 60.0, 59.0]])
    noise = torch.eye(4, dtype=torch.float64)[:1]
    assert choose(logits, Sampling(5e-324), noise).tolist() == [2]


def test_samples_follow_the_probabilities(model: Model) -> None:
    from zaya_convert.runtime.generate import _key, _noise

    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(4000, -1)
    sampling = Sampling(1.0, seed=1)
    noise = _noise([(_key(1, (i,)), 0) for i in range(4000)], 3)
    shares = torch.bincount(choose(logits, sampling, noise), minlength=3) / 4000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.03)


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}])
def test_senseless_settings_are_usage_errors(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**bad)  # pyright: ignore


def tokens_of(steps: list[Step], sequence: int) -> list[int]:
    return [step.token for step in steps if step.sequence == sequence]


def test_sequences_join_and_leave_between_steps(nano: Nano) -> None:
    """With a sliding layer, which keeps fewer columns than a row has tokens."""
    model = Model(open_source(nano("hybrid", dtype=torch.float32, windows=(0, 5, 0))))
    mixed = [HOT, Sampling(), Sampling(0.8, top_k=20, seed=9), Sampling(1.2, top_p=0.9)]
    prompts = [*PROMPTS, list(range(20, 34))]
    tasks = [Task(prompts[i], 14, how, (i, 7)) for i, how in enumerate(mixed)]
    alone = [
        complete(model, [t.prompt], max_new_tokens=14, sampling=t.sampling, streams=[t.stream])[0]
        for t in tasks
    ]
    decoder = Decoder(model, prefill_chunk=3)
    steps: list[Step] = []
    assert decoder.add(tasks[:1]) == [0]
    for _ in range(4):
        steps += decoder.step()
    assert decoder.add(tasks[1:3]) == [1, 2]
    steps += decoder.step() + decoder.step()
    decoder.remove([1])
    assert decoder.add(tasks[3:]) == [3]
    while len(decoder):
        steps += decoder.step()
    for i in (0, 2, 3):
        assert tokens_of(steps, i) == alone[i].tokens
    assert tokens_of(steps, 1) == alone[1].tokens[:2]


def test_others_step_between_the_chunks_of_a_prompt(model: Model) -> None:
    tasks = [Task(PROMPTS[0], 12, HOT, (0,)), Task([5, 6, 7] * 10, 4, HOT, (1,))]
    alone = [list(generate(model, [task.prompt], max_new_tokens=task.max_new_tokens, sampling=HOT,
                           streams=[task.stream])) for task in tasks]  # fmt: skip
    decoder = Decoder(model, 8)
    decoder.add(tasks[:1])
    entry, steps = decoder.adding(tasks[1:]), list[Step]()
    for _ in entry:
        steps += decoder.step()
    assert [step.sequence for step in steps] == [0] * 4  # as many as the prompt has chunks
    while len(decoder):
        steps += decoder.step()
    for i, expected in enumerate(alone):
        assert tokens_of(steps, i) == [step.token for step in expected]
    given_up = decoder.adding(tasks[1:])
    next(given_up)
    given_up.close()
    assert not len(decoder)


def test_a_batch_that_never_empties_forgets_the_longest_row(model: Model) -> None:
    decoder = Decoder(model)
    decoder.add([Task([5] * 40, 2, Sampling())])
    for _ in range(6):
        decoder.step()
        decoder.add([Task([9], 3, Sampling())])
    assert decoder._cache is not None
    assert decoder._cache.length <= 4


def test_equal_prompts_are_run_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda ids, **how: sizes.append(len(ids)) or forward(ids, **how)
    )
    found = texts(model, [[5, 6], [7], [5, 6]], [(0,), (1,), (0,)])
    assert sizes[:2] == [2, 3]
    assert found[0] == found[2] == texts(model, [[5, 6]], [(0,)])[0]


def test_logprobs_are_those_of_the_unfiltered_model(model: Model) -> None:
    decoder = Decoder(model)
    decoder.add([Task(PROMPTS[0], 4, HOT), Task(PROMPTS[1], 2, HOT)])
    tokens, found = list(PROMPTS[0]), []
    while steps := decoder.step():
        tokens.append(steps[0].token)
        found.append(logprobs(decoder.logits, [step.token for step in steps])[0])
    known = model.forward(torch.tensor([tokens])).logits[0, len(PROMPTS[0]) - 1 :].log_softmax(-1)
    for row, token, logprob in zip(known, tokens[len(PROMPTS[0]) :], found, strict=False):
        assert logprob == pytest.approx(float(row[token]), abs=1e-5)
    assert len(found) == 4


def test_nothing_to_do_is_nothing_done(model: Model) -> None:
    assert not list(generate(model, PROMPTS, max_new_tokens=0))
    assert not list(generate(model, [], max_new_tokens=3))
    decoder = Decoder(model)
    assert decoder.add([]) == []
    assert decoder.step() == []


def test_a_common_beginning_is_run_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    stem = list(range(20, 40))
    prompts = [[9], [*stem, 5], [*stem, 6, 7, 8], [*stem, 5, 11], [3, 4], [1, 2, 3]]
    streams = [(i,) for i in range(len(prompts))]
    alone = [texts(model, [p], [s])[0] for p, s in zip(prompts, streams, strict=True)]
    columns: list[int] = []
    forward = Model.forward

    def counted(self: Model, ids: torch.Tensor, **options: Any) -> Output:
        columns.append(ids.numel())
        return forward(self, ids, **options)

    monkeypatch.setattr(Model, "forward", counted)
    assert texts(model, prompts, streams) == alone
    # the stem, three endings, the others padded to three columns; then decode steps
    assert sum(columns[:5]) == 20 + 1 + 3 + 2 + 3 * 3
