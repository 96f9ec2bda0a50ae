"""Trains `zaya1-tiny`: ``python tools/tiny/train.py --out DIR --seed 0`` reruns everything.

Learning rate: warm-up, a plateau on clean traces, then a decay to zero in which single traces carry
slips and aggregation gets more room. The first steps serve attention; then routers and experts are
drawn anew (see `Trainer.redraw`). After every step each router's balancing biases move towards the
target load, which gives the skip expert its few per cent, and a loss on the mean probabilities
keeps routers from preferring one expert for everything. Batches depend on the seed and the step
alone, so ``--resume`` continues the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from transformers import ZayaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.tiny.batches import POOL_STEPS, Batch, Mix, pool_of_batches
from tools.tiny.data import (
    ERROR_RATE,
    FOREIGN_SHARE,
    SLIP_RATE,
    aggregation_example,
    single_example,
)
from tools.tiny.fast import FastForward, difference_from_transformers
from tools.tiny.model import balancing_biases, draw_weights, fresh_model, target_loads
from tools.tiny.package import write_package
from tools.tiny.probe import probe_batches, trace_probability
from tools.tiny.prose import prose_example
from tools.tiny.tokenizer import PAD_ID, build_tokenizer

PLATEAU = Mix(1600, 1400, 0.06, 0.5, slip_rate=0.0, error_rate=0.08)
DECAY = Mix(1500, 1700, 0.08, 0.4, SLIP_RATE, ERROR_RATE, FOREIGN_SHARE)


@dataclass(frozen=True)
class Settings:
    """What decides a run."""

    seed: int = 0
    steps: int = 4224
    decay_share: float = 0.25
    warmup: int = 80
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.05
    router_rate: float = 0.3  # of the learning rate
    balance_rate: float = 1e-3
    crowding: float = 0.1
    experts_from: int = 1000  # routers and experts are drawn anew here, see `Trainer.redraw`

    @property
    def decay_from(self) -> int:
        """The first step of the decay, at the start of a pool of batches."""
        return round(self.steps * (1 - self.decay_share) / POOL_STEPS) * POOL_STEPS

    def rate_at(self, step: int) -> float:
        """The learning rate's factor: linear warm-up (twice), plateau, cosine to zero."""
        if step < self.decay_from:
            since = step - self.experts_from if step >= self.experts_from else step
            return min(1.0, (since + 1) / self.warmup)
        progress = (step - self.decay_from) / max(1, self.steps - self.decay_from)
        return 0.5 * (1 + math.cos(math.pi * progress))


def corpus_tokenizer(seed: int) -> Tokenizer:
    """The tokenizer, learned from a sample of the training mix."""
    rng = random.Random(f"{seed}:tokenizer")
    examples = [single_example(rng, "train", 0.0) for _ in range(3000)]
    examples += [aggregation_example(rng, "train", 0.0, 0.1, n % 2) for n in range(2000)]
    examples += [prose_example(rng, "train") for _ in range(2000)]
    return build_tokenizer(example.text for example in examples)


def loss_of(logits: Tensor, batch: Batch) -> Tensor:
    """Cross entropy of the next token, weighted."""
    weights = batch.weights[:, 1:].flatten()
    targets = batch.ids[:, 1:].flatten()
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


class Trainer:
    """Model, optimizer and step counter of a run; saved and restored as one file.

    With two workers each takes one batch of a step and the gradients are averaged: two processes of
    one thread outrun two threads, whose every small product waits for the slower of them.
    """

    def __init__(self, settings: Settings, out: Path, rank: int = 0, workers: int = 1) -> None:
        self.settings = settings
        self.rank = rank
        self.workers = workers
        self.out = out
        self.step = 0
        self.tokens = 0
        self.tokenizer = corpus_tokenizer(settings.seed)
        self.model = fresh_model(settings.seed)
        self.forward = FastForward(self.model, torch.bfloat16)
        self.gradient = torch.zeros(sum(p.numel() for p in self.model.parameters()))
        self.optimizer = self.new_optimizer()
        self.loads = [target_loads(16) for _ in balancing_biases(self.model)]

    def new_optimizer(self) -> torch.optim.AdamW:
        """AdamW over all parameters, whose gradients are parts of one tensor."""
        settings = self.settings
        groups: list[dict[str, Any]] = []
        for router in (False, True):
            rate = settings.learning_rate * (settings.router_rate if router else 1.0)
            for matrices in (False, True):
                members = [
                    p
                    for name, p in self.model.named_parameters()
                    if (".gate." in name) == router and (p.dim() >= 2) == matrices
                ]
                decay = settings.weight_decay if matrices else 0.0
                groups.append({"params": members, "weight_decay": decay, "peak": rate})
        parameters = [p for group in groups for p in group["params"]]
        sizes = [p.numel() for p in parameters]
        for p, part in zip(parameters, self.gradient.split(sizes), strict=True):
            p.grad = part.view_as(p)
        return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)

    def redraw(self) -> None:
        """Draws routers and experts anew, and starts the optimizer over.

        Before attention finds anything worth routing by, a top-1 router learns to prefer one expert
        for all tokens. So the first steps serve attention, and routing starts from there.
        """
        torch.manual_seed(self.settings.seed + 1)
        draw_weights(self.model, lambda name: ".mlp." in name)
        self.loads = [target_loads(16) for _ in self.loads]
        self.optimizer = self.new_optimizer()

    def save(self) -> None:
        """Writes the whole state, replacing the last one only when it is complete."""
        state = {
            "settings": asdict(self.settings),
            "tokenizer": self.tokenizer.to_str(),
            "step": self.step,
            "tokens": self.tokens,
            "loads": self.loads,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.out / "state.partial"
        torch.save(state, partial)
        partial.replace(self.out / "state.pt")

    def restore(self, path: Path) -> None:
        """Continues from a saved state; settings such as the number of steps may differ."""
        state = torch.load(path)
        if state["tokenizer"] != self.tokenizer.to_str():  # its ids decide what the weights mean
            raise SystemExit(f"{path}: saved with another tokenizer than this code builds")
        self.step, self.tokens, self.loads = state["step"], state["tokens"], state["loads"]
        self.model.load_state_dict(state["model"])
        if self.step != self.settings.experts_from:  # there the optimizer starts over anyway
            self.optimizer.load_state_dict(state["optimizer"])

    def train_step(self, batches: tuple[Batch, Batch]) -> list[float]:
        """One update; the loss of each batch."""
        factor = self.settings.rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        counts = torch.zeros(len(self.loads), 17)
        losses = torch.zeros(len(batches))
        for place in range(self.rank, len(batches), self.workers):
            batch = batches[place]
            logits, choices, shares = self.forward(batch.ids)
            loss = loss_of(logits, batch)
            ((loss + self.crowding(shares)) / len(batches)).backward()
            losses[place] = loss.detach()
            real = (batch.ids != PAD_ID).flatten()
            for count, choice in zip(counts, choices, strict=True):
                count += torch.bincount(choice[real], minlength=17)
        if self.workers > 1:
            for shared in (self.gradient, counts, losses):
                dist.all_reduce(shared)
        self.tokens += int(counts[0].sum())
        self.gradient /= max(1.0, float(self.gradient.norm()))
        self.optimizer.step()
        self.gradient.zero_()
        self.balance(counts, max(factor, 0.05))
        self.step += 1
        return losses.tolist()

    def crowding(self, shares: list[Tensor]) -> Tensor:
        """A loss on the routers' mean probabilities, least (1 a layer) where they are the target.

        It keeps a router from preferring one expert for everything, which biases alone would hide:
        they can outweigh such a preference, and then the chosen experts' weights are near 0.
        """
        target = target_loads(16)
        terms = [(share.square() / target).sum() for share in shares]
        return self.settings.crowding * torch.stack(terms).sum()

    def balance(self, counts: Tensor, factor: float) -> None:
        """Moves every bias by how far its expert's load is from the target, in parts of it."""
        for biases, load, count in zip(
            balancing_biases(self.model), self.loads, counts, strict=True
        ):
            now = count / count.sum()
            load.lerp_(now, 0.2)
            target = target_loads(len(load) - 1)
            error = ((target - now) / target).clamp(-1, 1)  # a delayed load would make it swing
            biases += self.settings.balance_rate * factor * error
            biases -= biases[:-1].mean()  # only differences matter: keep the experts centred


def run(trainer: Trainer, log_every: int) -> None:
    """Trains to the last step, logging to `log.jsonl` and saving on the way."""
    settings, started = trainer.settings, time.monotonic()
    probes = probe_batches(trainer.tokenizer)
    tokens_before = trainer.tokens
    pool: list[tuple[Batch, Batch]] = []
    while trainer.step < settings.steps:
        index = trainer.step % POOL_STEPS
        if trainer.step == settings.experts_from:
            trainer.redraw()
        if index == 0 or not pool:
            mix = PLATEAU if trainer.step < settings.decay_from else DECAY
            number = trainer.step // POOL_STEPS
            pool = pool_of_batches(trainer.tokenizer, mix, settings.seed, number)
        losses = trainer.train_step(pool[index])
        due = trainer.step % log_every == 0 or trainer.step == settings.steps
        if due and trainer.rank == 0:
            seconds = time.monotonic() - started
            row: dict[str, Any] = {
                "step": trainer.step,
                "tokens": trainer.tokens,
                "tokens_per_second": round((trainer.tokens - tokens_before) / seconds),
                "losses": [round(loss, 4) for loss in losses],
                "load_min": [round(float(load[:-1].min()), 4) for load in trainer.loads],
                "load_skip": [round(float(load[-1]), 4) for load in trainer.loads],
            }
            for name, batch in probes.items():
                row[name] = [round(x, 3) for x in trace_probability(trainer.forward, batch)]
            with (trainer.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            print(json.dumps(row), file=sys.stderr, flush=True)
            trainer.save()


def work(rank: int, arguments: argparse.Namespace, meeting: str) -> None:
    """One worker's whole run; the first writes what there is to write."""
    torch.set_num_threads(1)
    if arguments.workers > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=arguments.workers
        )
    settings = Settings(seed=arguments.seed, steps=arguments.steps)
    trainer = Trainer(settings, arguments.out, rank, arguments.workers)
    if rank == 0:
        check_forward(trainer.model)
    if arguments.resume:
        trainer.restore(arguments.resume)
    run(trainer, arguments.log_every)
    if rank == 0:
        folder = arguments.out / "zaya1-tiny"
        write_package(trainer.model, trainer.tokenizer, folder, arguments.seed)


def check_forward(model: ZayaForCausalLM) -> None:
    """Stops a run whose forward is not the model's."""
    ids = torch.randint(8, 600, (2, 64), generator=torch.Generator().manual_seed(0))
    difference = difference_from_transformers(model, ids)
    if difference > 1e-4:
        raise SystemExit(f"the training forward differs from transformers by {difference:.1e}")


def main() -> None:
    """Trains, in as many workers as asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--workers", type=int, choices=(1, 2), default=2)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--resume", type=Path, help="a state.pt to continue from")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, args=(arguments, f"{folder}/meeting"), nprocs=arguments.workers)


if __name__ == "__main__":
    main()
