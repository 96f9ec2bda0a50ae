"""Tokenizers as GGUF metadata: what is said, what cannot be, and that it means the same again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from nano import Nano
from synthetic import nano_config
from zaya_convert.convert import execute
from zaya_convert.errors import InputError
from zaya_convert.export import packing
from zaya_convert.export.gguf.tokenizer import entries, side_files
from zaya_convert.gguf_header import GgufHeader
from zaya_convert.models import BUNDLED, open_model
from zaya_convert.plan import make_plan
from zaya_convert.runtime.tokenizer import Tokenizer
from zaya_convert.tokenizer_files import Files

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.h, llama_token_type
CONFIG = nano_config(vocab_rows=400, bos_id=None, pad_id=None, eos_ids=())

# The rule for splitting words of Llama 3, as its tokenizer.json has it.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

PIECES = (
    "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<bos>", "<pad>", "<unk>", "<0x0A>",
    "<0x41", "[PAD740]", "\n", "\n\n\n", "\r\n", "\t", " ", "  ", "▁", " ▁ ", "é", "日本語", "😀",
    "\u0301", "\x00", "the", " the", "Sunday", "hello", " hello", "12345", "don't", "!?", "user\n",
)  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join),
)


def said(files: Files, config: Any = CONFIG) -> dict[str, tuple[str, Any]]:
    """The metadata as kind and value by key, its prefix left out."""
    found, reason = entries(files, config)
    assert reason == ""
    assert len({key for key, _, _ in found}) == len(found)
    return {key.removeprefix("tokenizer."): (kind, value) for key, kind, value in found}


def header(found: Sequence[tuple[str, str, Any]]) -> GgufHeader:
    return GgufHeader(
        3, {key: value for key, _, value in found}, {key: kind for key, kind, _ in found}, {}, 32
    )


def again(files: Files, config: Any = CONFIG) -> Tokenizer:
    """The tokenizer after a way through metadata."""
    return Tokenizer.parse(side_files(header(entries(files, config)[0])), {})


def files_of(backend: tokenizers.Tokenizer, **settings: Any) -> dict[str, bytes]:
    return {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }


def edited(files: Files, change: Callable[[dict[str, Any]], object]) -> dict[str, bytes]:
    """The files with a changed ``tokenizer.json``."""
    raw = json.loads(files["tokenizer.json"])
    change(raw)
    return {**files, "tokenizer.json": json.dumps(raw).encode()}


def check_same(one: Tokenizer, two: Tokenizer, text: str) -> None:
    for bos in (None, True, False):
        ids = one.encode(text, bos)
        assert two.encode(text, bos) == ids
        for skip in (True, False):
            assert two.decode(ids, skip) == one.decode(ids, skip)


# --- byte-fallback BPE: what ZAYA1 has ---------------------------------------------------------


@pytest.fixture(scope="module")
def own() -> Files:
    return open_model(None).side_files()


@pytest.fixture(scope="module")
def pair(own: Files) -> tuple[Tokenizer, Tokenizer]:
    """The bundled tokenizer, and what became of it."""
    bundled = open_model(None)
    return Tokenizer.of(bundled), again(own, bundled.config)


def test_the_bundled_tokenizer(own: Files) -> None:
    config = open_model(None).config
    found = said(own, config)
    assert found["ggml.model"] == ("str", "gemma4")
    assert "ggml.pre" not in found
    kind, texts = found["ggml.tokens"]
    assert (kind, len(texts), len(set(texts))) == ("[str]", 768, 768)
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<|im_start|>", "<|im_end|>", "<think>"]
    assert texts[:9] == [*specials, "</think>", "<0x00>"]
    assert texts[740:] == [f"[PAD{i}]" for i in range(740, 768)]
    kind, types = found["ggml.token_type"]
    assert (kind, len(types)) == ("[i32]", 768)
    assert types[:9] == [CONTROL] * 3 + [UNKNOWN] + [CONTROL] * 2 + [USER_DEFINED] * 2 + [BYTE]
    assert types[740:] == [UNUSED] * 28
    assert Counter(types) == {
        NORMAL: 476, BYTE: 256, UNUSED: 28, CONTROL: 5, USER_DEFINED: 2, UNKNOWN: 1
    }  # fmt: skip
    assert [text for text, what in zip(texts, types, strict=True) if what == BYTE] == [
        f"<0x{i:02X}>" for i in range(256)
    ]
    kind, scores = found["ggml.scores"]
    assert (kind, len(scores)) == ("[f32]", 768)
    merges = json.loads(own["tokenizer.json"])["model"]["merges"]
    assert found["ggml.merges"] == ("[str]", [f"{left} {right}" for left, right in merges])


def test_special_tokens_and_template(own: Files) -> None:
    found = said(own, open_model(None).config)
    assert {key: entry for key, entry in found.items() if key.endswith("_id")} == {
        "ggml.bos_token_id": ("u32", 2),
        "ggml.eos_token_id": ("u32", 5),
        "ggml.unknown_token_id": ("u32", 3),
        "ggml.padding_token_id": ("u32", 0),
    }
    assert found["ggml.add_bos_token"] == ("bool", True)
    assert found["ggml.add_space_prefix"] == ("bool", False)
    template = (BUNDLED / "chat_template.jinja").read_text()
    assert found["chat_template"] == ("str", template)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_the_bundled_tokenizer_means_the_same_again(
    pair: tuple[Tokenizer, Tokenizer], text: str
) -> None:
    check_same(*pair, text)


@pytest.mark.parametrize("text", ["", *PIECES, "".join(PIECES), " ".join(PIECES)])
def test_texts_that_are_easily_lost(pair: tuple[Tokenizer, Tokenizer], text: str) -> None:
    check_same(*pair, text)


def test_what_else_is_kept(pair: tuple[Tokenizer, Tokenizer]) -> None:
    one, two = pair
    assert (two.size, two.bos_id, two.template) == (one.size, one.bos_id, one.template)
    messages = [{"role": "user", "content": "A:1+2=?\n\nB: é"}]
    assert two.chat(messages) == one.chat(messages)
    names = [one.backend.id_to_token(i) for i in range(one.size)]
    assert [two.backend.id_to_token(i) for i in range(two.size)] == names


def test_through_a_file(own: Files, tmp_path: Path) -> None:
    source = open_model(None)
    execute(make_plan(source, None, "gguf"), tmp_path / "x.gguf")
    opened = open_model(str(tmp_path / "x.gguf"))
    assert opened.has_tokenizer
    one, two = Tokenizer.of(source), Tokenizer.of(opened)
    assert two.stop_ids == one.stop_ids == {5}
    check_same(one, two, "".join(PIECES))


def test_merges_as_strings_are_merges(own: Files) -> None:
    """Older files have them so."""

    def join(raw: dict[str, Any]) -> None:
        raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]

    config = open_model(None).config
    assert said(edited(own, join), config) == said(own, config)


def test_without_a_beginning(own: Files) -> None:
    config = open_model(None).config
    files = edited(own, lambda raw: raw.update(post_processor=None))
    assert said(files, config)["ggml.add_bos_token"] == ("bool", False)
    assert again(files, config).encode("a") == Tokenizer.parse(own, {}).encode("a", add_bos=False)


@pytest.mark.parametrize(
    ("settings", "stop", "ids"),
    [
        ({}, {"eos_token_id": 1}, {"eos": 1}),
        ({}, {"eos_token_id": [1, 5]}, {"eos": 1, "eot": 5}),
        ({}, {"eos_token_id": [1, 5, 7]}, {"eos": 1, "eot": 5, "eom": 7}),
        ({}, {"eos_token_id": [-1, 768]}, {}),
        ({"eos_token": "<eos>"}, {}, {"eos": 1}),
        ({"eos_token": {"content": "<|im_end|>"}}, {}, {"eos": 5}),
        ({"eos_token": "<nowhere>"}, {}, {}),
    ],
)
def test_stop_tokens(
    own: Files, settings: dict[str, Any], stop: dict[str, Any], ids: dict[str, int]
) -> None:
    config = nano_config(vocab_rows=768, eos_ids=())
    files = {
        "tokenizer.json": own["tokenizer.json"],
        "tokenizer_config.json": json.dumps(settings).encode(),
        "generation_config.json": json.dumps(stop).encode(),
    }
    found = said(files, config)
    for name in ("eos", "eot", "eom"):
        assert found.get(f"ggml.{name}_token_id") == (("u32", ids[name]) if name in ids else None)


@pytest.mark.parametrize(
    ("settings", "template"),
    [
        ({"chat_template": "{{ messages }}"}, "{{ messages }}"),
        ({"chat_template": [{"name": "default", "template": "x"}, {"name": "rag"}]}, "x"),
        ({"chat_template": [{"name": "rag", "template": "y"}]}, ""),
        ({}, ""),
    ],
)
def test_templates(own: Files, settings: dict[str, Any], template: str) -> None:
    files = {
        "tokenizer.json": own["tokenizer.json"],
        "tokenizer_config.json": json.dumps(settings).encode(),
    }
    config = nano_config(vocab_rows=768)
    assert said(files, config).get("chat_template", ("str", "")) == ("str", template)
    assert again(files, config).template == template


def test_a_split_at_spaces_is_harmless(own: Files) -> None:
    """As ZAYA1-8B has it: the spaces are gone by then."""
    rule = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    config = open_model(None).config
    files = edited(own, lambda raw: raw.update(pre_tokenizer=rule))
    assert said(files, config) == said(own, config)
    for text in PIECES:
        check_same(Tokenizer.parse(files, {}), again(files, config), text)


# --- byte-level BPE ------------------------------------------------------------------------------


def byte_level(pattern: str = "", ignore_merges: bool = False) -> tokenizers.Tokenizer:
    """All bytes, some merges, and a word that no merges lead to."""
    merges = [
        ("h", "e"),
        ("l", "l"),
        ("Ġ", "t"),
        ("he", "ll"),
        ("Ġt", "he"),
        ("1", "2"),
        ("Ġ", "Ġ"),
    ]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate([*letters, *map("".join, merges), "Sunday"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])  # type: ignore[assignment]
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    return backend


RULES = {"gpt-2": "", "llama-bpe": LLAMA3, "qwen2": QWEN2}


@pytest.fixture(scope="module")
def level_pairs() -> dict[str, tuple[Tokenizer, Tokenizer]]:
    # llama.cpp takes whole words first under Llama 3's rule, and only there
    made = {n: files_of(byte_level(rule, n == "llama-bpe")) for n, rule in RULES.items()}
    return {name: (Tokenizer.parse(files, {}), again(files)) for name, files in made.items()}


@pytest.mark.parametrize("name", RULES)
def test_byte_level_is_said_with_its_rule(name: str) -> None:
    backend = byte_level(RULES[name], name == "llama-bpe")
    found = said(files_of(backend, eos_token="<|im_end|>"))
    assert found["ggml.model"] == ("str", "gpt2")
    assert found["ggml.pre"] == ("str", name)
    texts, types = found["ggml.tokens"][1], found["ggml.token_type"][1]
    size = backend.get_vocab_size()
    assert texts[:size] == [backend.id_to_token(i) for i in range(size)]
    assert Counter(types) == {NORMAL: size - 3, CONTROL: 2, USER_DEFINED: 1, UNUSED: 400 - size}
    assert found["ggml.merges"][1][:3] == ["h e", "l l", "Ġ t"]
    assert found["ggml.eos_token_id"] == ("u32", size - 2)
    assert found["ggml.add_bos_token"] == ("bool", False)


@pytest.mark.parametrize("name", RULES)
def test_byte_level_means_the_same_again(
    level_pairs: dict[str, tuple[Tokenizer, Tokenizer]], name: str
) -> None:
    for text in (*PIECES, "".join(PIECES), "don't 12345 Sunday", "é\n\n x"):
        check_same(*level_pairs[name], text)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, name=st.sampled_from([*RULES]))
def test_byte_level_on_any_text(
    level_pairs: dict[str, tuple[Tokenizer, Tokenizer]], text: str, name: str
) -> None:
    check_same(*level_pairs[name], text)


@pytest.mark.parametrize(("name", "whole_words"), [("gpt-2", True), ("llama-bpe", False)])
def test_whole_words_first_goes_with_the_rule(name: str, whole_words: bool) -> None:
    """Nothing in GGUF says it, so that other combinations would be read wrongly."""
    found, reason = entries(files_of(byte_level(RULES[name], whole_words)), CONFIG)
    assert [entry[2] for entry in found] == ["none"]
    assert reason


def test_byte_level_with_a_beginning() -> None:
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<|im_start|> $A",
        special_tokens=[("<|im_start|>", backend.token_to_id("<|im_start|>"))],
    )
    files = files_of(backend, bos_token="<|im_start|>")
    assert said(files)["ggml.add_bos_token"] == ("bool", True)
    check_same(Tokenizer.parse(files, {}), again(files), "the hello")


# --- what cannot be said -------------------------------------------------------------------------


def _unigram() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False))


def _word_piece() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))


def _no_fallback() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "▁": 1}, []))
    backend.normalizer = normalizers.Replace(" ", "▁")  # type: ignore[assignment]
    return backend


def _prepending() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "▁": 1}, [], byte_fallback=True))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    return backend


def _prefix_space() -> tokenizers.Tokenizer:
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    return backend


def _normalizing() -> tokenizers.Tokenizer:
    backend = byte_level(QWEN2)
    backend.normalizer = normalizers.NFC()  # type: ignore[assignment]
    return backend


UNSAYABLE = {
    "unigram": (_unigram, "is no BPE"),
    "word piece": (_word_piece, "is no BPE"),
    "no fallback": (_no_fallback, "neither byte-fallback nor byte-level"),
    "a space before all": (_prepending, "neither byte-fallback nor byte-level"),
    "a space before words": (_prefix_space, "no name for how its tokenizer splits words"),
    "normalized text": (_normalizing, "no name for how"),
    "another rule": (lambda: byte_level(r"\p{L}+|\s"), "no name for how"),
}


@pytest.mark.parametrize("name", UNSAYABLE)
def test_what_cannot_be_said_is_left_out(name: str) -> None:
    make, says = UNSAYABLE[name]
    found, reason = entries(files_of(make()), CONFIG)
    assert found == [("tokenizer.ggml.model", "str", "none")]
    assert says in reason
    assert side_files(header(found)) == {}


def test_special_tokens_keep_their_ids_without_texts() -> None:
    found, _ = entries({}, nano_config(vocab_rows=400, bos_id=2, pad_id=0, eos_ids=(5, 1)))
    assert {key.rpartition(".")[2]: value for key, _, value in found[1:]} == {
        "bos_token_id": 2, "eos_token_id": 5, "eot_token_id": 1, "padding_token_id": 0,
    }  # fmt: skip


def test_stop_tokens_of_a_tokenizer_that_cannot_be_said() -> None:
    files = {
        "tokenizer.json": b'{"model": {"type": "Unigram"}}',
        "generation_config.json": b'{"eos_token_id": [5, 1]}',
    }
    found, reason = entries(files, nano_config(vocab_rows=400, eos_ids=(1,)))
    assert reason
    assert ("tokenizer.ggml.eos_token_id", "u32", 5) in found
    assert ("tokenizer.ggml.eot_token_id", "u32", 1) in found


def test_no_tokenizer_is_noted(nano: Nano) -> None:
    folder = nano("hybrid", layers=1)
    assert entries({}, CONFIG) == (
        [("tokenizer.ggml.model", "str", "none")],
        "the model has no tokenizer.json",
    )
    plan = make_plan(open_model(str(folder)), None, "gguf")
    assert any("feed it token ids" in note for note in packing("gguf").notes(plan))
    plan = make_plan(open_model(None), None, "gguf")
    assert not any("tokenizer" in note for note in packing("gguf").notes(plan))


# --- what is wrong -------------------------------------------------------------------------------


def test_more_tokens_than_rows(own: Files) -> None:
    with pytest.raises(InputError) as caught:
        entries(own, nano_config(vocab_rows=739))
    assert str(caught.value).startswith("tokenizer.json: has token 739 (")
    assert "the embedding has 739 rows" in str(caught.value)
    assert len(said(own, nano_config(vocab_rows=740))["ggml.tokens"][1]) == 740


@pytest.mark.parametrize("text", ["he", "[PAD741]"])
def test_one_text_for_two_tokens(own: Files, text: str) -> None:
    token = {
        "id": 740, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    }  # fmt: skip
    files = edited(own, lambda raw: raw["added_tokens"].append(token))
    with pytest.raises(InputError, match="gives one text to several tokens"):
        entries(files, nano_config(vocab_rows=768))


def _without_ids(raw: dict[str, Any]) -> None:
    raw["added_tokens"] = [{"content": "x"}]


DAMAGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "a list for a vocabulary": lambda raw: raw["model"].update(vocab=["a", "b"]),
    "ids that are text": lambda raw: raw["model"].update(vocab={"a": "0"}),
    "negative ids": lambda raw: raw["model"].update(vocab={"a": -1}),
    "merges of numbers": lambda raw: raw["model"].update(merges=[5, 6]),
    "merges of three": lambda raw: raw["model"].update(merges=[["a", "b", "c"]]),
    "an added token without an id": _without_ids,
    "added tokens of text": lambda raw: raw.update(added_tokens=["x"]),
    "steps of numbers": lambda raw: raw.update(normalizer={"type": "Sequence", "normalizers": 3}),
    "a replacement by nothing": lambda raw: raw["normalizer"].pop("content"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_tokenizer_is_an_error_or_left_out(own: Files, name: str) -> None:
    with suppress(InputError):
        _, reason = entries(edited(own, DAMAGED[name]), nano_config(vocab_rows=768))
        assert reason


def test_a_tokenizer_that_is_no_json() -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        entries({"tokenizer.json": b"{"}, CONFIG)


# --- other tools' metadata -----------------------------------------------------------------------


def theirs(own: Files, **changes: Any) -> GgufHeader:
    """The bundled tokenizer's metadata with other values; None takes one away."""
    found = {key: value for key, _, value in entries(own, open_model(None).config)[0]}
    for name, value in changes.items():
        found[f"tokenizer.ggml.{name}"] = value
        if value is None:
            del found[f"tokenizer.ggml.{name}"]
    return GgufHeader(3, found, {}, {}, 32)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "none"},
        {"model": None},
        {"model": "llama"},
        {"model": "gpt2", "pre": "of-the-future"},
        {"model": "gpt2", "pre": ["gpt-2"]},
        {"tokens": []},
        {"tokens": [1, 2]},
        {"tokens": "text"},
    ],
    ids=str,
)
def test_tokenizers_that_are_not_rebuilt(own: Files, changes: dict[str, Any]) -> None:
    assert side_files(theirs(own, **changes)) == {}


def test_scores_and_types_may_be_missing(own: Files) -> None:
    files = side_files(theirs(own, scores=None, token_type=None))
    rebuilt = json.loads(files["tokenizer.json"])
    assert rebuilt["added_tokens"] == []
    assert Tokenizer.parse(files, {}).encode("the\n", add_bos=False)


def test_a_beginning_beyond_the_vocabulary_is_left_out(own: Files) -> None:
    files = side_files(theirs(own, bos_token_id=10**6, eos_token_id=-1))
    assert json.loads(files["tokenizer.json"])["post_processor"] is None
    assert "bos_token" not in json.loads(files["tokenizer_config.json"])
    assert "eos_token" not in json.loads(files["tokenizer_config.json"])


@pytest.mark.parametrize("merges", [[1, 2], "h e", ["nospace"], [""], [" "]], ids=str)
def test_odd_merges_are_refused(own: Files, merges: Any) -> None:
    with pytest.raises(InputError):
        Tokenizer.parse(side_files(theirs(own, merges=merges)), {})
