"""Calibration documents: what becomes of files, names and the model's own words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from nano import Nano
from zaya_convert.checkpoint import Checkpoint
from zaya_convert.data import (
    CALIBRATION,
    Sequences,
    digest_of,
    find,
    joined,
    load_documents,
)
from zaya_convert.errors import InputError
from zaya_convert.hub import fetch_dataset
from zaya_convert.models import open_model
from zaya_convert.runtime.tokenizer import Tokenizer
from zaya_convert.traces import self_generated

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 768  # of the bundled tokenizer


@pytest.fixture(scope="module")
def tiny(bundled: Path) -> Checkpoint:
    return open_model(str(bundled))


@pytest.fixture(scope="module")
def tokenizer(bundled: Path) -> Tokenizer:
    return Tokenizer.of(open_model(str(bundled)))


@pytest.fixture(scope="module")
def bare(nano: Nano) -> Checkpoint:
    """A model without a tokenizer."""
    return open_model(str(nano("hybrid")))


@pytest.fixture(scope="module")
def stranger(nano: Nano, bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model with a tokenizer of its own and no chat template."""
    folder = tmp_path_factory.mktemp("stranger") / "model"
    shutil.copytree(nano("hybrid", vocab_rows=ROWS), folder)
    settings = json.loads((bundled / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = json.loads((bundled / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3))  # other bytes
    return open_model(str(folder))


def load(checkpoint: Checkpoint, data: object, **changes: Any) -> Sequences:
    options: dict[str, Any] = {"length": 16, "pack": False, "tokens": 64, **changes}
    return load_documents(checkpoint, None if data is None else str(data), **options)


def ids_of(found: Sequences) -> list[list[int]]:
    return [ids.tolist() for ids in found.ids]


def lines(path: Path, *entries: Any) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


# ---- files --------------------------------------------------------------------------------------


def test_a_text_is_one_document(tiny: Checkpoint, tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "Add 12 and 30.\nThen double it.\n\n" * 4
    (tmp_path / "a.txt").write_text(text)
    found = load(tiny, tmp_path / "a.txt")
    whole = tokenizer.encode(text)
    assert len(whole) > 32
    assert [token for ids in ids_of(found) for token in ids] == whole
    assert [len(ids) for ids in found.ids[:-1]] == [16] * (len(found.ids) - 1)
    assert all(ids.dtype == torch.int64 for ids in found.ids)
    assert found.description == "a.txt"
    assert found.tokens == len(whole)


def test_a_line_is_a_document(tiny: Checkpoint, tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    path = lines(
        tmp_path / "a.jsonl",
        {"text": "one two"},
        {"messages": messages, "source": "mine"},
        {"ids": [5, 6, 7]},
    )
    with path.open("a") as file:
        file.write("\n  \n" + json.dumps({"ids": [8, 9]}) + "\n")
    found = load(tiny, path, length=1000)
    assert ids_of(found) == [
        tokenizer.encode("one two"),
        tokenizer.chat(messages, add_generation_prompt=False),
        [5, 6, 7],
        [8, 9],
    ]


def test_documents_are_cut_and_single_tokens_left_out(bare: Checkpoint, tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl", {"ids": [*range(9)]}, {"ids": [1]}, {"ids": []}, {"ids": [*range(6)]}
    )
    assert ids_of(load(bare, path, length=4)) == [
        [0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3], [4, 5],
    ]  # fmt: skip


@pytest.mark.parametrize("length", [2, 4, 7, 100])
def test_packing_keeps_every_token_in_order(bare: Checkpoint, tmp_path: Path, length: int) -> None:
    documents = [[*range(9)], [1], [], [20, 21, 22], [90]]
    path = lines(tmp_path / "a.jsonl", *({"ids": ids} for ids in documents))
    found = load(bare, path, length=length, pack=True)
    whole = [token for ids in documents for token in ids]
    assert [token for ids in ids_of(found) for token in ids] == whole
    sizes = [len(ids) for ids in found.ids]
    assert all(size == length for size in sizes[:-1])  # only the last is not full
    assert 2 <= sizes[-1] <= length
    assert found.description == "a.jsonl, packed"


def test_every_document_is_taken_whatever_tokens_says(bare: Checkpoint, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", *({"ids": [n, n + 1]} for n in range(50)))
    assert len(load(bare, path, tokens=4).ids) == 50


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"ids": [3, 96]}, r"a.jsonl:2: token id 96 is outside the model's 96 embedding rows"),
        ({"ids": [3, -1]}, r"a.jsonl:2: token id -1 is outside"),
        ({"ids": [3, 1.5]}, r"a.jsonl:2: ids must be a list of integers"),
        ({"text": "hello"}, r"a.jsonl:2: needs a tokenizer"),
        ({"messages": []}, r"a.jsonl:2: needs a tokenizer"),
        ({"prompt": "hello"}, r"a.jsonl:2: needs one of ids, messages, text"),
        ([1, 2], r"a.jsonl:2: expected a JSON object"),
    ],
    ids=str,
)
def test_bad_lines_are_named(bare: Checkpoint, tmp_path: Path, entry: Any, says: str) -> None:
    path = lines(tmp_path / "a.jsonl", {"ids": [1, 2]}, entry)
    with pytest.raises(InputError, match=says):
        load(bare, path)


@pytest.mark.parametrize("entries", [[], [{"ids": []}], [{"ids": [4]}]], ids=str)
@pytest.mark.parametrize("pack", [False, True])
def test_nothing_to_run(bare: Checkpoint, tmp_path: Path, entries: list[Any], pack: bool) -> None:
    with pytest.raises(InputError, match=r"a.jsonl: holds no text to run"):
        load(bare, lines(tmp_path / "a.jsonl", *entries), pack=pack)


# ---- bundled sets -------------------------------------------------------------------------------


def test_the_set_is_chosen_by_the_tokenizer(tiny: Checkpoint, stranger: Checkpoint) -> None:
    own = load(tiny, None, length=1000)
    assert own.description == "bundled calibration set zaya1-tiny"
    assert own.digest == load(tiny, "zaya1-tiny", length=1000).digest
    assert own.digest == digest_of(own.ids)
    general = load(stranger, None, length=100_000)
    assert general.description == "bundled calibration set general"
    assert len(general.ids) == len(CALIBRATION["general"].read_text().splitlines())


def test_conversations_without_a_template_are_paragraphs(
    stranger: Checkpoint, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.of(stranger)
    assert not tokenizer.template
    first = json.loads(CALIBRATION["general"].read_text().splitlines()[0])["messages"]
    expected = tokenizer.encode("\n\n".join(message["content"] for message in first))
    assert ids_of(load(stranger, "general", length=100_000))[0] == expected
    # For a file of one's own that would be a guess.
    with pytest.raises(InputError, match="no chat template"):
        load(stranger, lines(tmp_path / "a.jsonl", {"messages": first}))


def test_packed_bundled_sets(tiny: Checkpoint) -> None:
    packed, plain = load(tiny, None, pack=True, length=64), load(tiny, None, length=100_000)
    assert packed.description == "bundled calibration set zaya1-tiny, packed"
    assert torch.equal(torch.cat(packed.ids), torch.cat(plain.ids)[: packed.tokens])
    assert plain.tokens - packed.tokens <= 1
    assert {len(ids) for ids in packed.ids[:-1]} == {64}


def test_random_ids_without_a_tokenizer(bare: Checkpoint) -> None:
    found = load(bare, None, tokens=64, length=16)
    assert [len(ids) for ids in found.ids] == [16] * 4
    assert found.description == "random token ids (no tokenizer), seed 0"
    assert int(torch.cat(found.ids).max()) < 96
    assert found.digest == load(bare, None).digest
    other = load(bare, None, seed=1)
    assert other.digest != found.digest
    assert other.description.endswith("seed 1")


def test_random_ids_when_the_tokenizer_does_not_fit(
    nano: Nano, bundled: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(nano("hybrid"), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled / name, folder)
    small = open_model(str(folder))
    assert "goes beyond the model's 96 embedding rows" in load(small, None).description
    with pytest.raises(InputError, match="outside the model's 96 embedding rows"):
        load(small, "general")  # asked for by name, it is a mistake


def test_joined() -> None:
    first, second = (Sequences([torch.tensor([n, n + 1])], f"set {n}", "") for n in (1, 5))
    both = joined(first, second)
    assert ids_of(both) == [[1, 2], [5, 6]]
    assert both.description == "set 1 + set 5"
    assert both.digest == digest_of(both.ids)
    assert digest_of([torch.tensor([1, 2]), torch.tensor([3])]) != digest_of(
        [torch.tensor([1]), torch.tensor([2, 3])]
    )


# ---- data sets of the Hub -----------------------------------------------------------------------


class Hub:
    """Stands in for the network; keeps what was asked for."""

    def __init__(self, path: Path, files: list[str]) -> None:
        self.path, self.files = path, files
        self.asked: list[tuple[Any, ...]] = []
        self.error: Exception | None = None

    def list_repo_files(self, repo: str, *, repo_type: str, revision: str | None) -> list[str]:
        self.asked.append(("list", repo, repo_type, revision))
        if self.error:
            raise self.error
        return self.files

    def download(self, repo: str, file: str, *, repo_type: str, revision: str | None) -> str:
        self.asked.append(("file", repo, file, repo_type, revision))
        if self.error:
            raise self.error
        return str(self.path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    files = ["README.md", "test.jsonl", "a.parquet", "data/train-0.jsonl", "data/train-1.jsonl"]
    fake = Hub(lines(tmp_path / "a.jsonl", {"ids": [1, 2, 3]}), files)
    api = SimpleNamespace(list_repo_files=fake.list_repo_files)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
    return fake


@pytest.mark.parametrize(
    ("name", "repo", "revision", "file"),
    [
        ("org/name/a.jsonl", "org/name", None, "a.jsonl"),
        ("org/name/data/a b.txt", "org/name", None, "data/a b.txt"),
        ("org/name@v1.0/a.jsonl", "org/name", "v1.0", "a.jsonl"),
        ("o.r-g/n_a.me@0123abcd/data/x.txt", "o.r-g/n_a.me", "0123abcd", "data/x.txt"),
    ],
)
def test_names_of_files(hub: Hub, name: str, repo: str, revision: str | None, file: str) -> None:
    assert fetch_dataset(f"hf://datasets/{name}") == hub.path
    assert hub.asked == [("file", repo, file, "dataset", revision)]


@pytest.mark.parametrize(("name", "revision"), [("org/name", None), ("org/name@main", "main")])
def test_the_training_split_comes_first(hub: Hub, name: str, revision: str | None) -> None:
    assert fetch_dataset(f"hf://datasets/{name}") == hub.path
    assert hub.asked == [
        ("list", "org/name", "dataset", revision),
        ("file", "org/name", "data/train-0.jsonl", "dataset", revision),
    ]


def test_any_text_without_a_training_split(hub: Hub) -> None:
    hub.files = ["z.txt", "b.jsonl", "a.parquet"]
    fetch_dataset("hf://datasets/org/name")
    assert hub.asked[-1][2] == "b.jsonl"
    hub.files = ["a.parquet", "README.md"]
    with pytest.raises(InputError, match=r"hf://datasets/org/name: holds no .jsonl or .txt file"):
        fetch_dataset("hf://datasets/org/name")


@pytest.mark.parametrize(
    "name",
    [
        "hf://datasets/org", "hf://datasets/", "hf://org/name", "hf://datasets/org/name@",
        "hf://datasets/org/name/", "hf://datasets/org/name@v1@v2", "hf://datasets/org/na me",
    ],
)  # fmt: skip
def test_names_of_nothing(hub: Hub, name: str) -> None:
    with pytest.raises(InputError, match="is not of the form hf://datasets/org/name") as caught:
        find(name)
    assert str(caught.value).startswith(name)
    assert hub.asked == []


class Response:
    """As much of an answer as the library's errors look at."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.request, self.status_code = None, 404


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (LocalEntryNotFoundError("long\nstory"), "the Hub cannot be reached"),
        (ConnectionError("no route\nmore"), "cannot be fetched: no route"),
        (HfHubHTTPError("404 not found\nmore", response=Response()), "cannot be fetched: 404"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
@pytest.mark.parametrize("name", ["hf://datasets/org/name", "hf://datasets/org/name/a.txt"])
def test_what_the_hub_refuses_is_one_line(hub: Hub, error: Exception, says: str, name: str) -> None:
    hub.error = error
    with pytest.raises(InputError, match=says) as caught:
        find(name)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["hf://datasets/org/name", "hf://datasets/org/name@v1/a.jsonl"])
def test_offline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library itself, and nothing in its cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(InputError, match=name) as caught:
        fetch_dataset(name)
    assert "\n" not in str(caught.value)


def test_a_fetched_data_set_is_a_file_like_any(hub: Hub, bare: Checkpoint) -> None:
    found = load(bare, "hf://datasets/org/name/a.jsonl")
    assert ids_of(found) == [[1, 2, 3]]
    assert found.description == "a.jsonl"


# ---- traces -------------------------------------------------------------------------------------


def prompts() -> Sequences:
    draw = torch.Generator().manual_seed(9)
    ids = [torch.randint(96, (n,), generator=draw) for n in (40, 3, 12, 5)]
    return Sequences(ids, "prompts", digest_of(ids))


@pytest.mark.parametrize("tokens", [2, 50, 300])
def test_traces_begin_with_prompts_and_add_up(bare: Checkpoint, tokens: int) -> None:
    seen: list[tuple[str, int, int]] = []
    found = self_generated(
        bare, prompts(), tokens=tokens, length=24,
        progress=lambda what, done, of: seen.append((what, done, of)),
    )  # fmt: skip
    assert tokens <= found.tokens <= tokens + 1
    assert all(2 <= len(ids) <= 24 for ids in found.ids)
    starts = [ids[:12].tolist() for ids in prompts().ids]  # at most half of a trace
    for index, ids in enumerate(found.ids[:-1]):  # the last is cut
        start = starts[index % len(starts)]
        assert ids[: len(start)].tolist() == start
        assert len(ids) > len(start)
    assert seen[-1] == ("writing traces", tokens, tokens)
    assert found.digest == digest_of(found.ids)
    assert found.description == "self-generated traces, seed 0"


def test_traces_are_reproducible_by_seed(bare: Checkpoint) -> None:
    one, two, other = (
        self_generated(bare, prompts(), tokens=200, length=20, seed=seed) for seed in (3, 3, 4)
    )
    assert one.digest == two.digest
    assert one.digest != other.digest
    assert other.description.endswith("seed 4")
    # Prompts come again with noise of their own.
    texts = [tuple(ids.tolist()) for ids in one.ids]
    assert len(set(texts)) == len(texts)


def test_traces_stop_where_the_model_does(tiny: Checkpoint) -> None:
    documents = load_documents(tiny, None, length=64, pack=False, tokens=0)
    found = self_generated(tiny, documents, tokens=240, length=100)
    stop = Tokenizer.of(tiny).stop_ids
    assert stop
    answers = [ids[32:] for ids in found.ids]
    assert not any(int(token) in stop for ids in answers for token in ids)
    assert min(len(ids) for ids in found.ids[:-1]) < 100  # some answers end by themselves


def test_traces_stay_inside_the_context(nano: Nano) -> None:
    short = open_model(str(nano("hybrid", max_positions=20)))
    found = self_generated(short, prompts(), tokens=100, length=64)
    assert max(len(ids) for ids in found.ids) <= 20
    assert found.tokens >= 100


@pytest.mark.parametrize("length", [2, 3])
def test_the_shortest_traces(bare: Checkpoint, length: int) -> None:
    found = self_generated(bare, prompts(), tokens=20, length=length)
    assert {len(ids) for ids in found.ids[:-1]} == {length}
