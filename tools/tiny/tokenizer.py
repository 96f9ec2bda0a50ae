"""Builds the tokenizer of `zaya1-tiny`: the Gemma family's kind of BPE, at a small size.

Spaces become U+2581 by a normalizer, unknown characters fall back to bytes, there is no
pre-tokenizer. Merges are learned from the training texts, inside words only, so digits and the
characters of a trace are always single tokens. Any text without U+2581 itself comes back unchanged
(that character reads back as a space, as it does with Gemma's tokenizer).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

BASE_SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")
CHAT_SPECIALS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
PAD_ID, EOS_ID, BOS_ID, UNK_ID = range(4)
IM_START_ID, IM_END_ID, THINK_ID, THINK_END_ID = range(4, 8)
VOCAB_ROWS = 768
MAX_MERGES = 380

_SPACE = "\u2581"
_WORD = Regex(_SPACE + r"?\\?[A-Za-z]+|.|\n")

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n<think>\\n' }}
{%- endif %}
"""


def build_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """The tokenizer, its merges learned from `texts` (special tokens stripped first)."""
    merges = _learn_merges(texts)
    pieces = [*BASE_SPECIALS, *CHAT_SPECIALS]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += _alphabet()
    pieces += [left + right for left, right in merges]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", BOS_ID)]
    )
    tokenizer.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in BASE_SPECIALS]
    )
    # Not "special" in the library's sense: decoding must keep `</think>`, which ends the reasoning.
    tokenizer.add_tokens(
        [
            AddedToken(piece, special=piece.startswith("<|"), normalized=False)
            for piece in CHAT_SPECIALS
        ]
    )
    return tokenizer


def _alphabet() -> list[str]:
    return [_SPACE, "\n", *(chr(code) for code in range(0x21, 0x7F))]


def _learn_merges(texts: Iterable[str]) -> list[tuple[str, str]]:
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", _SPACE)
    learner.pre_tokenizer = pre_tokenizers.Split(_WORD, "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=len(_alphabet()) + MAX_MERGES,
        min_frequency=20,
        initial_alphabet=_alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator((_without_specials(text) for text in texts), trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]


def _without_specials(text: str) -> str:
    for piece in (*BASE_SPECIALS, *CHAT_SPECIALS):
        text = text.replace(piece, "\n")
    return text


def write_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "unk_token": "<unk>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
