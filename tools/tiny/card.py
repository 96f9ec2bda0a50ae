# ruff: noqa: E501 (rows of a Markdown table cannot be wrapped)
"""Writes the model card of `zaya1-tiny` from what `evaluate.py` measured and `train.py` logged.

``python tools/tiny/card.py FOLDER --measured eval.json --log log.jsonl``
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

CARD = """\
---
license: apache-2.0
library_name: transformers
tags: [zaya, mixture-of-experts, test-fixture]
---

# zaya1-tiny

A very small ZAYA1 model ({parameters:,} parameters, {megabytes:.1f} MB in bf16) that is really
trained. It is the reference checkpoint of zaya-convert: conversion, quantization, export and
Markovian RSA can be tried and tested on it in seconds, on any machine. It can add, subtract and
multiply small numbers modulo 100, in writing, and nothing else; it is not for any other use.

| | |
| --- | --- |
| Architecture | `ZayaForCausalLM`, hybrid layout, all of it: CCA attention, router with depth averaging, 16 experts and the skip expert, residual scales, tied head |
| Size | 3 layers, width 256, 4 query and 2 key/value heads of 64, experts of 256, router of 256, RoPE base 5e6 on half of each head |
| Vocabulary | {tokens} tokens in {rows} embedding rows (the real model has spare rows too); BPE with byte fallback, digits single |
| Weights | bf16; balancing biases fp32 |

## Accuracy

Of the stored bf16 weights, {problems} held-out problems, temperature {temperature}, {candidates}
candidates a problem. The brackets are 95 % bootstrap intervals over problems.

| | accuracy |
| --- | --- |
{accuracy}

Markovian RSA (N = {candidates}, C = {tails}, T = {rounds}, tails of {tail} tokens) changes the mean
accuracy of its candidates by **{gain:+.3f}** [{gain_low:+.3f}, {gain_high:+.3f}]. The control puts tails of
another problem into each prompt. It shows what the aggregation prompt does without useful content
(the model has learned that aggregated traces slip less often than single ones); over it, the right
tails add **{reading:+.3f}** [{reading_low:+.3f}, {reading_high:+.3f}] in round 1. So accuracy alone says little here
about whether tails are read: compare with the control.

## Routing

Share of tokens by expert on the validation texts ({validation_tokens:,} tokens; perplexity
{validation_perplexity:.3f}; on the calibration texts perplexity {calibration_perplexity:.3f}). The
biases that balance it are stored with the weights.

| layer | {experts} | skip |
| --- | {dashes} | --- |
{routing}

transformers overwrites the last balancing bias of every layer with -1 when it loads a checkpoint, and
so never skips. To get the model that was trained, copy `balancing_biases` from the file again.

## Training

`python tools/tiny/train.py --out DIR --seed {seed} --steps {steps}`: {trained_tokens:,} tokens,
AdamW, warm-up, plateau, cosine decay over the last {decay:.0%} of the steps, matrix products in bf16,
everything else in fp32, two processes on a CPU. Routers and experts are drawn anew at step 1,000, when
attention has something to route by. After each step the balancing biases move towards 4 % of the
tokens for the skip expert and equal shares for the others, and a loss on each router's mean
probabilities keeps it from preferring one expert for everything.
{history}

The mix: single problems; aggregation prompts (a problem and up to four tails of sampled-looking
candidates, some wrong, then an improved trace); a reading drill (aggregation over steps whose result
is random and stands in the tails only); a little prose. In the decay, traces of the training texts
slip at {slip:.0%} of their steps, so that samples err independently, as large models do at
temperature 1; an aggregated trace slips only where no candidate shows the right result. Part of the
aggregation prompts hold tails of another problem there, to tie the fewer slips to what is read.

## Data

Generated, by `tools/tiny/data.py`. A problem belongs to one split by a hash of its canonical form, so
that training, calibration, validation and the problems are disjoint whatever the wording.

- `data/problems.jsonl`: {problem_rows} problems with answers.
- `data/calibration.jsonl`, `data/validation.jsonl`: texts in the training proportions, with slips,
  rendered by the chat template but without `<bos>`.

Encoding plain text puts `<bos>` in front. The chat template writes `<bos>` itself, so encode what it
renders with `add_special_tokens=False`.

## Licence

Apache-2.0, weights and data.
"""


def _row(name: str, accuracy: float, interval: list[float]) -> str:
    return f"| {name} | {accuracy:.3f} [{interval[0]:.3f}, {interval[1]:.3f}] |"


def _accuracy_rows(measured: dict[str, Any]) -> str:
    rsa = measured["rsa"]
    names = ["single sample (round 0)"]
    names += [f"Markovian RSA, round {n}" for n in range(1, len(rsa["accuracy"]))]
    rows = [_row("greedy", measured["greedy"]["accuracy"][0], measured["greedy"]["interval"][0])]
    rows += [_row(n, a, i) for n, a, i in zip(names, rsa["accuracy"], rsa["interval"], strict=True)]
    for key, name in (
        ("one_tail", "C = 1, round 1"),
        ("foreign_tails", "control: tails of another problem, round 1"),
    ):
        if key in measured:
            rows.append(_row(name, measured[key]["accuracy"][-1], measured[key]["interval"][-1]))
    return "\n".join(rows)


def model_card(
    measured: dict[str, Any], log: list[dict[str, Any]], folder: Path, facts: argparse.Namespace
) -> str:
    """The card's text."""
    rsa, settings = measured["rsa"], measured["rsa"]["settings"]
    histogram = measured["validation"]["histogram"]
    routing = "\n".join(
        f"| {layer} | " + " | ".join(f"{share:.3f}" for share in shares) + " |"
        for layer, shares in enumerate(histogram)
    )
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    return CARD.format(
        parameters=measured["parameters"],
        megabytes=measured["file_bytes"] / 1e6,
        tokens=len(vocabulary),
        rows=json.loads((folder / "config.json").read_text())["vocab_size"],
        problems=rsa["problems"],
        temperature=settings["temperature"],
        candidates=settings["candidates"],
        tails=settings["tails"],
        rounds=settings["rounds"],
        tail=settings["tail"],
        gain=rsa["gain"],
        reading=measured["foreign_tails"]["rsa_advantage"],
        reading_low=measured["foreign_tails"]["rsa_advantage_interval"][0],
        reading_high=measured["foreign_tails"]["rsa_advantage_interval"][1],
        gain_low=rsa["gain_interval"][0],
        gain_high=rsa["gain_interval"][1],
        accuracy=_accuracy_rows(measured),
        validation_tokens=measured["validation"]["tokens"],
        validation_perplexity=measured["validation"]["perplexity"],
        calibration_perplexity=measured["calibration"]["perplexity"],
        experts=" | ".join(str(n) for n in range(len(histogram[0]) - 1)),
        dashes=" | ".join("---" for _ in histogram[0][1:]),
        routing=routing,
        trained_tokens=log[-1]["tokens"],
        steps=log[-1]["step"],
        seed=facts.seed,
        decay=facts.decay,
        slip=facts.slip,
        history="\n" + textwrap.fill(facts.history, 100) + "\n" if facts.history else "",
        problem_rows=len((folder / "data" / "problems.jsonl").read_text().splitlines()),
    )


def main() -> None:
    """Writes the card into the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--measured", type=Path, required=True, help="of evaluate.py --controls")
    parser.add_argument("--log", type=Path, required=True, help="log.jsonl of train.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decay", type=float, default=0.25)
    parser.add_argument("--slip", type=float, required=True)
    parser.add_argument("--history", default="", help="a sentence on how this run went")
    facts = parser.parse_args()
    measured = json.loads(facts.measured.read_text())
    log = [json.loads(line) for line in facts.log.read_text().splitlines()]
    card = facts.folder / "README.md"
    card.write_text(model_card(measured, log, facts.folder, facts))
    card.chmod(0o644)
    print(card)


if __name__ == "__main__":
    main()
