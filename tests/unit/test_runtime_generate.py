"""Generation: reproducible, independent of the batch, and stopped where it should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nano import Nano
from zaya_convert.checkpoint import open_source
from zaya_convert.errors import InputError, UsageError
from zaya_convert.runtime.generate import Sampling, choose, complete, generate
from zaya_convert.runtime.model import Model

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


def test_samples_follow_the_probabilities(model: Model) -> None:
    from zaya_convert.runtime.generate import _key, _noise

    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(4000, -1)
    sampling = Sampling(1.0, seed=1)
    noise = _noise([_key(1, (i,)) for i in range(4000)], 0, 3, sampling)
    shares = torch.bincount(choose(logits, sampling, noise), minlength=3) / 4000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.03)


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}])
def test_senseless_settings_are_usage_errors(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**bad)  # pyright: ignore
