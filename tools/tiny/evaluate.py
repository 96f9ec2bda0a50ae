"""Measures a `zaya1-tiny` folder: accuracy, Markovian RSA by round, routing, perplexity.

``python tools/tiny/evaluate.py zaya_convert/bundled/zaya1-tiny --json out.json`` prints a table and
writes the same as JSON. The weights are the stored bf16 ones; the arithmetic is fp32.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import ZayaConfig, ZayaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.tiny.data import prompt_text
from tools.tiny.fast import FastForward
from tools.tiny.sampling import Request, sample
from tools.tiny.tokenizer import BOS_ID, THINK_END_ID
from zaya_convert.rsa.answers import extract_boxed
from zaya_convert.rsa.prompts import message_for


@dataclass(frozen=True)
class RsaSettings:
    """N candidates, C tails a prompt, T aggregation rounds; tail and budget are in tokens."""

    candidates: int = 8
    tails: int = 4
    rounds: int = 2
    tail: int = 40
    budget: int = 96
    temperature: float = 1.0
    seed: int = 0
    foreign_tails: bool = False  # the control: tails of another problem


def load_model(folder: Path) -> ZayaForCausalLM:
    """The stored weights in fp32, with the balancing bias that transformers would overwrite."""
    model = ZayaForCausalLM(ZayaConfig.from_pretrained(folder)).float().eval()
    stored = {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}
    missing, unexpected = model.load_state_dict(stored, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise SystemExit(f"{folder}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def interval(values: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean over problems."""
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, len(values), (4000, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Round:
    """One round's mean accuracy by problem, its tails by problem, and mean token counts."""

    correct: NDArray[np.float64]
    tails: list[list[str]]
    prompt_tokens: float
    new_tokens: float


def run_round(
    model: ZayaForCausalLM,
    tokenizer: Tokenizer,
    problems: Sequence[dict[str, str]],
    previous: Sequence[Round],
    settings: RsaSettings,
) -> Round:
    """The round after `previous`: every candidate of every problem."""
    requests = _requests(tokenizer, problems, previous, settings)
    outputs = sample(model, requests, settings.budget, settings.temperature)
    texts = tokenizer.decode_batch(outputs, skip_special_tokens=False)
    answers = np.array([extract_boxed(text) or "" for text in texts]).reshape(len(problems), -1)
    truth = np.array([row["answer"] for row in problems])
    tails = [_tail(tokenizer, output, settings.tail) for output in outputs]
    size = settings.candidates
    return Round(
        (answers == truth[:, None]).mean(1),
        [tails[i : i + size] for i in range(0, len(tails), size)],
        float(np.mean([len(request.prompt) for request in requests])),
        float(np.mean([len(output) for output in outputs])),
    )


def run_rsa(
    model: ZayaForCausalLM,
    tokenizer: Tokenizer,
    problems: Sequence[dict[str, str]],
    settings: RsaSettings,
    start: Sequence[Round] = (),
) -> list[Round]:
    """All rounds, after those of `start`."""
    rounds = list(start)
    while len(rounds) <= settings.rounds:
        rounds.append(run_round(model, tokenizer, problems, rounds, settings))
    return rounds


def summary(rounds: Sequence[Round], settings: RsaSettings) -> dict[str, Any]:
    """Accuracies, the last round's gain over the first, and their intervals."""
    gain = rounds[-1].correct - rounds[0].correct
    return {
        "settings": asdict(settings),
        "problems": len(gain),
        "accuracy": [float(r.correct.mean()) for r in rounds],
        "interval": [interval(r.correct) for r in rounds],
        "gain": float(gain.mean()),
        "gain_interval": interval(gain),
        "prompt_tokens": [r.prompt_tokens for r in rounds],
        "new_tokens": [r.new_tokens for r in rounds],
    }


def _requests(
    tokenizer: Tokenizer,
    problems: Sequence[dict[str, str]],
    previous: Sequence[Round],
    settings: RsaSettings,
) -> list[Request]:
    requests: list[Request] = []
    for index, row in enumerate(problems):
        for candidate in range(settings.candidates):
            key = (settings.seed, index, len(previous), candidate)
            tails: list[str] = []
            if previous:
                owner = (index + 1) % len(problems) if settings.foreign_tails else index
                source = previous[-1].tails[owner]
                subset = np.random.default_rng([*key, 1])
                chosen = subset.choice(len(source), settings.tails, replace=False)
                tails = [source[i] for i in chosen]
            text = prompt_text(message_for(row["problem"], tails))
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            requests.append(Request((BOS_ID, *ids), key))
    return requests


def _tail(tokenizer: Tokenizer, output: list[int], size: int) -> str:
    reasoning = output[: output.index(THINK_END_ID)] if THINK_END_ID in output else output
    return tokenizer.decode(reasoning[-size:], skip_special_tokens=True)


@torch.no_grad()
def routing_and_perplexity(
    model: ZayaForCausalLM, tokenizer: Tokenizer, texts: Sequence[str]
) -> dict[str, Any]:
    """Shares of tokens by layer and expert (the skip expert last), and perplexity, over `texts`."""
    forward = FastForward(model)
    counts = [torch.zeros(model.config.num_experts + 1) for _ in cast(Any, model.model.layers)]
    total, tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text).ids])
        logits, choices, _ = forward(ids)
        total += float(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
        for count, choice in zip(counts, choices, strict=True):
            count += torch.bincount(choice, minlength=len(count))
    return {
        "tokens": tokens + len(texts),
        "perplexity": math.exp(total / tokens),
        "histogram": [[round(float(x), 4) for x in count / count.sum()] for count in counts],
    }


def evaluate(folder: Path, problems: int, settings: RsaSettings, controls: bool) -> dict[str, Any]:
    """Every measure of the model card."""
    model = load_model(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = read_rows(folder / "data" / "problems.jsonl")[:problems]
    rounds = run_rsa(model, tokenizer, rows, settings)
    plain = RsaSettings(candidates=1, rounds=0, temperature=0.0)
    result: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "file_bytes": (folder / "model.safetensors").stat().st_size,
        "rsa": summary(rounds, settings),
        "greedy": summary(run_rsa(model, tokenizer, rows, plain), plain),
    }
    if controls:
        for name, change in (
            ("one_tail", {"tails": 1}),
            ("foreign_tails", {"foreign_tails": True}),
        ):
            control = RsaSettings(**{**asdict(settings), "rounds": 1, **change})
            control_rounds = run_rsa(model, tokenizer, rows, control, rounds[:1])
            result[name] = summary(control_rounds, control)
            advantage = rounds[1].correct - control_rounds[1].correct
            result[name]["rsa_advantage"] = float(advantage.mean())
            result[name]["rsa_advantage_interval"] = interval(advantage)
    for split in ("validation", "calibration"):
        texts = [row["text"] for row in read_rows(folder / "data" / f"{split}.jsonl")]
        result[split] = routing_and_perplexity(model, tokenizer, texts)
    return result


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"parameters {result['parameters']:,}   file {result['file_bytes']:,} bytes"]
    for name in ("greedy", "rsa", "one_tail", "foreign_tails"):
        if name not in result:
            continue
        part = result[name]
        pairs = zip(part["accuracy"], part["interval"], strict=True)
        shown = "  ".join(f"{a:.3f} [{low:.3f}, {high:.3f}]" for a, (low, high) in pairs)
        low, high = part["gain_interval"]
        lines.append(f"{name:14} {shown}   gain {part['gain']:+.3f} [{low:+.3f}, {high:+.3f}]")
    for split in ("validation", "calibration"):
        part = result[split]
        lines.append(f"{split}: {part['tokens']} tokens, perplexity {part['perplexity']:.3f}")
        for layer, shares in enumerate(part["histogram"]):
            lines.append(
                f"  layer {layer}: experts {min(shares[:-1]):.3f} to {max(shares[:-1]):.3f}, "
                f"skip {shares[-1]:.3f}"
            )
    return "\n".join(lines)


def main() -> None:
    """Evaluates one folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--tail", type=int, default=RsaSettings.tail)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--controls", action="store_true", help="also C = 1 and foreign tails")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = RsaSettings(
        rounds=arguments.rounds,
        tail=arguments.tail,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    result = evaluate(arguments.folder, arguments.problems, settings, arguments.controls)
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
