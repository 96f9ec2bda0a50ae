"""What a model's side files say about its tokenizer, wherever they lie.

Nothing about ZAYA1's prompt format is written here: ``tokenizer.json``, ``tokenizer_config.json``
and the chat template say it all. Files come by name, as ``Checkpoint.side_files`` has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zaya_convert.errors import InputError
from zaya_convert.headers import parse_json_object

Files = Mapping[str, bytes]

_SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token")


def read(files: Files, name: str) -> dict[str, Any]:
    """A JSON file, {} when there is none.

    Raises:
        InputError: it is damaged.
    """
    return parse_json_object(files[name], name) if name in files else {}


def specials(files: Files) -> dict[str, str]:
    """``bos_token`` and friends as text, those that are named."""
    names = read(files, "special_tokens_map.json") | read(files, "tokenizer_config.json")
    return {name: _text(names[name]) for name in _SPECIALS if names.get(name)}


def template(files: Files) -> str:
    """The chat template, from the newest of the places where models keep it; "" without one."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8", errors="replace")
    found = read(files, "chat_template.json").get("chat_template")
    found = found or read(files, "tokenizer_config.json").get("chat_template") or ""
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found}
        found = named.get("default") or ""
    if not isinstance(found, str):
        raise InputError("chat_template must be text", "tokenizer_config.json")
    return found


def stop_ids(files: Files, config: Mapping[str, Any]) -> tuple[int, ...]:
    """``eos_token_id`` of generation_config.json, else of the model's configuration."""
    for settings in (read(files, "generation_config.json"), config):
        value = settings.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        found = tuple(i for i in ids if type(i) is int)
        if found:
            return found
    return ()


def _text(token: Any) -> str:
    """A special token's text, stored as a string or as an object with ``content``."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)
