"""The tokenizer: BOS, chat templates and their sandbox, stop tokens, streaming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, processors

from zaya_convert.errors import InputError
from zaya_convert.models import open_model
from zaya_convert.runtime.tokenizer import Tokenizer

SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<|im_end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_backend() -> tokenizers.Tokenizer:
    """Every character is its UTF-8 bytes, but for a few letters."""
    pieces = [*SPECIALS, *(f"<0x{i:02X}>" for i in range(256)), *"abcdefgh[]"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    backend.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIALS])
    return backend


def write(folder: Path, template: Any = TEMPLATE, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    byte_backend().save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}}
    if template is not None:
        settings["chat_template"] = template
    contents = {"tokenizer_config": settings, "config": {"eos_token_id": 1}} | files
    for name, value in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def load(folder: Path) -> Tokenizer:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return Tokenizer.parse(files, json.loads(files.get("config.json", b"{}")))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(write(tmp_path_factory.mktemp("tokenizer")))


def test_bos(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("abc", add_bos=False)
    assert tokenizer.bos_id == 2
    assert tokenizer.encode("abc") == tokenizer.encode("abc", add_bos=True) == [2, *plain]
    assert tokenizer.encode("<bos>abc", add_bos=True) == [2, *plain]
    assert tokenizer.decode([2, *plain]) == "abc"
    assert tokenizer.decode([2, *plain], skip_special=False) == "<bos>abc"


def test_chat_writes_bos_once(tokenizer: Tokenizer) -> None:
    messages = [{"role": "a", "content": "bc"}]
    ids = tokenizer.chat(messages)
    assert ids.count(2) == 1
    assert tokenizer.render(messages) == "<bos>[a]bc<|im_end|>[assistant]"
    assert tokenizer.render(messages, add_generation_prompt=False) == "<bos>[a]bc<|im_end|>"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages | tojson }}", '[{"role": "a", "content": "é<"}]'),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% if thinking %}deep{% endif %}", "deep"),
        ([{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}], "yes"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
    ],
)
def test_what_templates_may_use(tmp_path: Path, template: Any, text: str) -> None:
    loaded = load(write(tmp_path, template))
    assert loaded.render([{"role": "a", "content": "é<"}], thinking=True) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% if %}", "failed"),
        ("{{ 1 + 'a' }}", "failed"),
        ("{{ 1 / 0 }}", "failed: division by zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "failed: maximum recursion"),
        (None, "no chat template"),
    ],
)
def test_template_failures_are_input_errors(tmp_path: Path, template: Any, message: str) -> None:
    loaded = load(write(tmp_path, template))
    with pytest.raises(InputError, match=message):
        loaded.render([{"role": "a", "content": "b"}])


def test_the_newest_place_of_the_template_wins(tmp_path: Path) -> None:
    folder = write(tmp_path, "config", chat_template={"chat_template": "json"})
    assert load(folder).template == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert load(folder).template == "jinja"


def test_stop_ids(tmp_path: Path) -> None:
    assert load(write(tmp_path)).stop_ids == {1}
    folder = write(tmp_path, generation_config={"eos_token_id": [4, 1]})
    assert load(folder).stop_ids == {1, 4}
    folder = write(tmp_path, generation_config={}, config={"eos_token_id": None})
    assert load(folder).stop_ids == frozenset()


def test_a_model_without_tokenizer(nano_hybrid: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        Tokenizer.of(open_model(str(nano_hybrid)))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be parsed"):
        load(tmp_path)


def test_a_stream_waits_for_whole_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀é", add_bos=False)
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == ["a", "", "", "", "😀", "", "é"]
    assert stream.flush() == ""


def test_a_stream_cut_within_a_character_shows_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀", add_bos=False)[:-1]
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in ids) == "a"
    assert set(stream.flush()) == {"\ufffd"}


@given(st.text(max_size=40))
def test_streaming_equals_decoding(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    streamed = "".join(stream.push(i) for i in ids) + stream.flush()
    assert streamed == tokenizer.decode(ids)
