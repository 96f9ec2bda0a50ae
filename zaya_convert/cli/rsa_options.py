"""Options that ``rsa``, ``rsa-parity`` and ``validate --rsa`` share, and what they ask for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zaya_convert import models
from zaya_convert.cli.engines import ONNXRUNTIME, choose_engine
from zaya_convert.cli.output import Output
from zaya_convert.cli.params import together
from zaya_convert.errors import UsageError

if TYPE_CHECKING:
    from zaya_convert.checkpoint import Checkpoint
    from zaya_convert.rsa.generator import Generator
    from zaya_convert.rsa.problems import Problem
    from zaya_convert.rsa.settings import Settings
    from zaya_convert.rsa.sides import Arithmetic, Side

EXACT, FLOAT32, BFLOAT16, FAST = "exact", "float32", "bfloat16", "fast"
_SMALL = 100_000_000  # weights
_EXACT_BYTES = 8  # of a weight in float64

settings_options = together(
    click.option("-N", "--candidates", type=click.IntRange(1), help="Rollouts in each round."),
    click.option("-C", "--tails", type=click.IntRange(1), help="Tails in an aggregation prompt."),
    click.option("-T", "--rounds", type=click.IntRange(0), help="Aggregation rounds."),
    click.option("--budget", type=click.IntRange(1), help="β: most new tokens of a rollout."),
    click.option("--tail", type=click.IntRange(1), help="τ: tokens of a tail."),
    click.option("--temperature", type=float, help="Of rollouts."),
    click.option("--top-p", type=float),
    click.option("--top-k", type=click.IntRange(0), help="0 is all."),
    click.option(
        "--carry",
        type=click.Choice(["reasoning", "answer"]),
        help="What tails are cut from: the reasoning, or the answer behind it too.",
    ),
    click.option(
        "--select",
        type=click.Choice(["mean", "majority"]),
        help="Keep all final candidates, or take the majority's answer.",
    ),
    click.option(
        "--final-candidates", type=click.IntRange(0), help="Rollouts of the last round; 0: N."
    ),
    click.option("--final-temperature", type=float, help="Of the last round, as the next two."),
    click.option("--final-top-p", type=float),
    click.option("--final-top-k", type=click.IntRange(0)),
)

engine_options = together(
    click.option(
        "--arithmetic",
        type=click.Choice([EXACT, FLOAT32, BFLOAT16, FAST]),
        help="Of the reference runtime: exact (float32 with sums in float64; results do not depend "
        "on batches), float32, bfloat16, or fast (bfloat16, quantized weights as they are). "
        "Default: exact where it fits into half the memory, else bfloat16.",
    ),
    click.option("--batch", type=click.IntRange(1), help="Most rollouts at a time."),
    click.option(
        "--threads",
        type=click.IntRange(1),
        help="Default: one per core, and one alone for small models.",
    ),
    click.option("--endpoint", metavar="URL", help="Ask a server with OpenAI's API instead."),
    click.option("--endpoint-model", metavar="NAME", help="The model's name on that server."),
    click.option(
        "--concurrency",
        type=click.IntRange(1),
        default=8,
        show_default=True,
        help="Requests to the server at a time.",
    ),
    click.option(
        "--attempts",
        type=click.IntRange(1),
        default=6,
        show_default=True,
        help="For each request, when the server is busy, fails or cannot be reached.",
    ),
    click.option(
        "--timeout",
        type=click.FloatRange(0, min_open=True),
        default=600,
        show_default=True,
        metavar="SECONDS",
        help="How long the server may say nothing before an attempt is given up.",
    ),
)

problem_options = together(
    click.option(
        "--problems",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="JSON Lines with problem (or question) and, where known, answer.",
    ),
    click.option("--limit", type=click.IntRange(1), help="Take the first so many problems."),
)


def changed(settings: Settings, options: Mapping[str, Any]) -> Settings:
    """Settings with the flags that were given.

    Raises:
        UsageError: flags that make no sense together.
    """
    given = {name: value for name, value in options.items() if value is not None}
    direct = ("candidates", "tails", "rounds", "budget", "tail", "carry", "select",
              "final_candidates")  # fmt: skip
    changes: dict[str, Any] = {name: given[name] for name in direct if name in given}
    if "budget" in changes and "tail" not in changes:
        changes["tail"] = min(settings.tail, changes["budget"])
    names = ("temperature", "top_p", "top_k")
    own = {name: given[name] for name in names if name in given}
    changes["sampling"] = replace(settings.sampling, **own)
    final = {name: given[f"final_{name}"] for name in names if f"final_{name}" in given}
    if final:
        base = settings.final_sampling or changes["sampling"]
        changes["final_sampling"] = replace(base, **final)
    return replace(settings, **changes)


def client(options: dict[str, Any]) -> dict[str, Any]:
    """How a server is talked to: the flags about that, taken out of ``options``."""
    return {
        "model": options.pop("endpoint_model"),
        "concurrency": options.pop("concurrency"),
        "attempts": options.pop("attempts"),
        "read_timeout": options.pop("timeout"),
    }


def is_bundled(checkpoint: Checkpoint | None) -> bool:
    """Whether a model is the bundled one, or was made from it."""
    if checkpoint is None:
        return False
    known = checkpoint.made_from.get("model")
    return checkpoint.path.resolve() == models.BUNDLED or known == models.BUNDLED.name


def fitting(settings: Settings, context: int) -> Settings:
    """Default settings, with budget and tail made small enough for a short context."""
    budget = min(settings.budget, max(1, context // 4))
    tail = min(settings.tail, max(1, context // (4 * settings.tails)), budget)
    return replace(settings, budget=budget, tail=tail)


def arithmetic(checkpoint: Checkpoint, name: str | None, out: Output) -> Arithmetic:
    """How the reference runtime is to compute, as asked for or by default."""
    from zaya_convert.rsa.sides import Arithmetic

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if name is None and _EXACT_BYTES * checkpoint.weights > memory / 2:
        out.note(
            "arithmetic: bfloat16, since exact would take "
            f"{_EXACT_BYTES * checkpoint.weights / 2**30:.0f} GiB"
        )
        name = BFLOAT16
    return {
        EXACT: Arithmetic(),
        FLOAT32: Arithmetic(exact=False),
        BFLOAT16: Arithmetic("bfloat16", exact=False),
        FAST: Arithmetic("bfloat16", exact=False, fast=True),
    }[name or EXACT]


def side(
    name: str,
    checkpoint: Checkpoint | None,
    out: Output,
    *,
    engine: str | None = None,
    exact_graph: bool = False,
    arithmetic_name: str | None = None,
    batch: int | None = None,
    endpoint: str | None = None,
    client: Mapping[str, Any] | None = None,
) -> Side:
    """One model and what runs it.

    Args:
        exact_graph: run an ONNX graph without rounding activations.
        client: how a server is talked to: arguments of ``Endpoint``.

    Raises:
        UsageError: flags that make no sense together.
    """
    from zaya_convert.rsa.sides import Arithmetic, Side

    if endpoint is not None:
        if engine or arithmetic_name or batch:
            raise UsageError("--engine, --arithmetic and --batch are not for a server")

        how_asked = dict(client or {})

        def ask() -> Generator:
            from zaya_convert.rsa.endpoint import Endpoint

            return Endpoint(endpoint, **how_asked)

        identity = {"endpoint": endpoint, "model": how_asked.get("model")}
        return Side(name, ask, checkpoint, identity=identity)
    assert checkpoint is not None
    runs = choose_engine(checkpoint, engine)
    if runs == ONNXRUNTIME and arithmetic_name:
        raise UsageError("--arithmetic is of the reference runtime; add --engine reference")
    if exact_graph and runs != ONNXRUNTIME:
        raise UsageError("--exact is for ONNX folders run by onnxruntime")
    how = (
        Arithmetic(exact=False, fast=not exact_graph)
        if runs == ONNXRUNTIME
        else arithmetic(checkpoint, arithmetic_name, out)
    )

    def load() -> Generator:
        from zaya_convert.rsa.local import LocalGenerator
        from zaya_convert.runtime.tokenizer import Tokenizer

        if runs == ONNXRUNTIME:
            from zaya_convert.runtime.onnx_engine import OnnxModel

            model: Any = OnnxModel(checkpoint, exact_graph)
        else:
            model = how.model(checkpoint)
        return LocalGenerator(model, Tokenizer.of(checkpoint), rows=batch)

    return Side(name, load, checkpoint, how, {"engine": runs, "arithmetic": str(how)})


def use_threads(count: int | None, checkpoint: Checkpoint) -> None:
    """Compute on so many threads; the products of a small model are too small to share."""
    import torch

    if count is None and checkpoint.weights < _SMALL:
        count = 1
    if count is not None:
        torch.set_num_threads(count)


def with_digest(made: Side) -> Side:
    """The same side, its identity holding a digest of its files: needed only to keep runs."""
    if made.checkpoint is None:
        digest = hashlib.sha256(repr(sorted(made.identity.items())).encode()).hexdigest()
        return replace(made, identity={**made.identity, "digest": digest})
    total = hashlib.sha256()
    for name, content in sorted(made.checkpoint.side_files().items()):
        total.update(name.encode() + hashlib.sha256(content).digest())
    for path in made.checkpoint.files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return replace(made, identity={**made.identity, "digest": total.hexdigest()})


def read_problems(path: Path | None, limit: int | None, out: Output) -> list[Problem]:
    """The problems of a file, or the bundled ones."""
    from zaya_convert.rsa import problems

    if path is None:
        out.note("problems: those of the bundled checkpoint (arithmetic modulo 100)")
    return problems.read(path or models.BUNDLED / "data" / "problems.jsonl", limit)
