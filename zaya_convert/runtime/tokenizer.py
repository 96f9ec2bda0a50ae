"""``Tokenizer``: a model folder's own tokenizer, chat template and stop tokens.

The template is code from a stranger, so it runs in jinja's sandbox, with the helpers that
transformers' templates expect.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import tokenizers
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from zaya_convert import tokenizer_files
from zaya_convert.checkpoint import Checkpoint
from zaya_convert.errors import InputError

_REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character (yet)


@dataclass(frozen=True)
class Tokenizer:
    """Text ⇄ token ids.

    Attributes:
        backend: the parsed ``tokenizer.json``.
        specials: ``bos_token`` and friends as text, those that the model names.
        template: the chat template's source, "" when there is none.
        stop_ids: tokens that end a generation.
    """

    backend: tokenizers.Tokenizer
    specials: Mapping[str, str]
    template: str
    stop_ids: frozenset[int]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Tokenizer:
        """Read the tokenizer of a model.

        Raises:
            InputError: there is none, or one of its files is damaged.
        """
        files = checkpoint.side_files()
        if "tokenizer.json" not in files:
            raise InputError(
                "has no tokenizer.json; copy it from the model's original folder",
                checkpoint.path.name,
            )
        return cls.parse(files, checkpoint.raw_config)

    @classmethod
    def parse(cls, files: Mapping[str, bytes], config: Mapping[str, Any]) -> Tokenizer:
        """A tokenizer from a model's side files, and its ``config.json`` for stop tokens.

        Raises:
            InputError: one of the files is damaged.
        """
        try:
            backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"cannot be parsed ({error})", "tokenizer.json") from None
        stop = frozenset(tokenizer_files.stop_ids(files, config))
        template = tokenizer_files.template(files)
        return cls(backend, tokenizer_files.specials(files), template, stop)

    @property
    def size(self) -> int:
        """Number of tokens, added ones included; a model may have more embedding rows."""
        return self.backend.get_vocab_size()

    @property
    def bos_id(self) -> int | None:
        """The token that begins every text, if the folder names one."""
        return self.backend.token_to_id(self.specials.get("bos_token", ""))

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Token ids of a text.

        Args:
            add_bos: begin with BOS (never twice) or without; None does what ``tokenizer.json``
                says, which is what the model was trained with.
        """
        if add_bos is None:
            return self.backend.encode(text).ids
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of some token ids."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, skip_special: bool = True) -> TextStream:
        """A decoder for tokens that arrive one at a time."""
        return TextStream(self, skip_special)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation as the chat template lays it out.

        The template writes BOS itself where the model wants one, so none is added.

        Args:
            messages: ``{"role": ..., "content": ...}`` each.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: passed on to the template (``enable_thinking`` and the like).

        Raises:
            InputError: no template, or it refuses the conversation.
        """
        text = self.render(messages, add_generation_prompt, **variables)
        return self.backend.encode(text, add_special_tokens=False).ids

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text behind ``chat``."""
        if not self.template:
            raise InputError("this model has no chat template; give it plain text instead")
        try:
            return (
                _environment()
                .from_string(self.template)
                .render(
                    messages=messages,
                    add_generation_prompt=add_generation_prompt,
                    **self.specials,
                    **variables,
                )
            )
        except Exception as error:  # a template is a program, and fails as programs do
            raise InputError(f"the chat template failed: {error}") from None


class TextStream:
    """Turns tokens into text as they come; what it returns never ends within a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        # Text of the ids before ``_done`` is out; they are kept as context, because decoders
        # treat the first token of a text differently.
        self._ids: list[int] = []
        self._done = 0

    def push(self, token: int) -> str:
        """The text that ``token`` completes; "" while a character is incomplete."""
        self._ids.append(token)
        return self._new_text(final=False)

    def flush(self) -> str:
        """What is left at the end, incomplete characters as U+FFFD."""
        return self._new_text(final=True)

    def _new_text(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._done], self._skip)
        text = self._tokenizer.decode(self._ids, self._skip)
        if not final and text.endswith(_REPLACEMENT):
            return ""
        self._ids = self._ids[self._done :]
        self._done = len(self._ids)
        return text[len(before) :]


class _Generation(Extension):
    """``{% generation %}`` marks assistant text for trainers; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  (jinja reads the class attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # jinja's own filter escapes HTML, which prompts must not be.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> str:
    raise TemplateError(message)
