"""``generate``: run a model in the reference runtime, an ONNX folder in onnxruntime."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from zaya_convert.cli.engines import dtype_option, engine_option, open_engine
from zaya_convert.cli.opening import open_named
from zaya_convert.cli.output import Output, output_options
from zaya_convert.cli.params import MODEL, prompt_text

if TYPE_CHECKING:
    from zaya_convert.checkpoint import Checkpoint
    from zaya_convert.runtime.engine import Engine
    from zaya_convert.runtime.generate import Sampling

_PREFILL_CHUNK = 512  # columns of the prompt run at once: bounds the memory of a long one


@dataclass
class _Generated:
    """What came out, and how fast."""

    prompt_tokens: int
    text: str = ""
    new_tokens: int = 0
    finished: str = ""
    seconds: float = 0.0


@click.command("generate")
@click.argument("model", type=MODEL, required=False)
@click.option("--prompt", required=True, metavar="TEXT", help="What to say; - reads stdin.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--top-k", type=int, default=0, show_default=True, help="0 is all.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without chat template.")
@dtype_option
@engine_option
@output_options
def command(
    model: str | None,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    raw: bool,
    dtype: str | None,
    engine: str | None,
    out: Output,
) -> None:
    """Continue a prompt with MODEL, a checkpoint or an artifact, writing the text as it comes.

    The same seed gives the same text.
    """
    checkpoint = open_named(model, out)
    from zaya_convert.runtime.generate import Sampling

    sampling = Sampling(temperature, top_p, top_k, seed)
    text = prompt_text(prompt)
    runs = open_engine(checkpoint, engine, dtype)
    done = _run(checkpoint, runs, text, raw, max_new_tokens, sampling, out)
    speed = done.new_tokens / done.seconds if done.seconds else 0.0
    if out.json:
        out.result(vars(done) | {"tokens_per_second": speed}, "")
    else:
        out.stream("\n")
    out.note(
        f"{done.new_tokens} tokens in {done.seconds:.1f} s ({speed:.1f} per second), "
        f"ended by {done.finished}"
    )


def _run(
    checkpoint: Checkpoint,
    model: Engine[Any],
    prompt: str,
    raw: bool,
    max_new_tokens: int,
    sampling: Sampling,
    out: Output,
) -> _Generated:
    from zaya_convert.runtime.generate import generate
    from zaya_convert.runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.of(checkpoint)
    if raw or not tokenizer.template:
        ids = tokenizer.encode(prompt)
    else:
        ids = tokenizer.chat([{"role": "user", "content": prompt}])
    stream = tokenizer.stream(skip_special=False)
    done = _Generated(len(ids))
    started = time.monotonic()
    for step in generate(
        model, [ids], max_new_tokens=max_new_tokens, sampling=sampling,
        stop_ids=tokenizer.stop_ids, prefill_chunk=_PREFILL_CHUNK,
    ):  # fmt: skip
        done.new_tokens += 1
        done.finished = step.finished
        text = "" if step.finished == "stop" else stream.push(step.token)
        text += stream.flush() if step.finished else ""
        done.text += text
        if not out.json:
            out.stream(text)
    done.seconds = time.monotonic() - started
    return done
