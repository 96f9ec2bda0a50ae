"""``serve``: a model behind OpenAI's API."""

from __future__ import annotations

import os

import click

from zaya_convert import models
from zaya_convert.cli.engines import dtype_option, engine_option, open_engine
from zaya_convert.cli.opening import open_named
from zaya_convert.cli.output import Output, output_options
from zaya_convert.cli.params import MODEL
from zaya_convert.errors import UsageError


@click.command("serve")
@click.argument("model", type=MODEL, required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 is any."
)
@click.option("--name", help="What clients call the model [default: its folder, file or Hub id].")
@click.option(
    "--max-batch", type=click.IntRange(1), default=16, show_default=True,
    help="Sequences that run at a time.",
)  # fmt: skip
@click.option(
    "--max-waiting", type=click.IntRange(0), default=256, show_default=True,
    help="Sequences that may wait; beyond that requests are refused with status 503.",
)  # fmt: skip
@click.option(
    "--separate-reasoning", is_flag=True,
    help="Answer with reasoning_content beside content, instead of both in content.",
)  # fmt: skip
@click.option(
    "--api-key-env", metavar="VARIABLE",
    help="Ask clients for the bearer token that this environment variable holds.",
)  # fmt: skip
@dtype_option
@engine_option
@output_options
def command(
    model: str | None,
    host: str,
    port: int,
    name: str | None,
    max_batch: int,
    max_waiting: int,
    separate_reasoning: bool,
    api_key_env: str | None,
    dtype: str | None,
    engine: str | None,
    out: Output,
) -> None:
    """Serve MODEL, a checkpoint or an artifact, over HTTP until interrupted.

    Prints its URL when it is ready. The same seed gives the same text as generate; with --dtype
    float32, whatever runs beside it.
    """
    key = _key(api_key_env)
    checkpoint = open_named(model, out)
    try:
        from zaya_convert.serve.app import App
        from zaya_convert.serve.server import Server, listen, url_of
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise UsageError(f"serving needs {error.name}: pip install 'zaya-convert[serve]'") from None
    from zaya_convert.runtime.tokenizer import Tokenizer
    from zaya_convert.serve.asked import Reader
    from zaya_convert.serve.worker import Worker

    tokenizer = Tokenizer.of(checkpoint)
    named = name or models.origin(model) or checkpoint.path.resolve().name
    with listen(host, port) as listener:
        runs = open_engine(checkpoint, engine, dtype)
        worker = Worker(runs, max_batch, max_waiting)
        reader = Reader(named, checkpoint.config, tokenizer, separate_reasoning, worker.capacity)
        facts = {"url": url_of(listener), "model": named, "engine": runs.name, "key": bool(key)}
        server = Server(App(worker, reader, key), lambda: out.result(facts, facts["url"]))
        out.note(f"serving {named} by the {runs.name}; stop it with Ctrl-C")
        if not (key or host in ("127.0.0.1", "localhost", "::1")):
            out.note("note: anyone who reaches this address can use it; see --api-key-env")
        try:
            server.run([listener])
        except KeyboardInterrupt:  # which is how a server is stopped
            out.note("stopped")


def _key(variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "")
    if not key:
        raise UsageError(f"--api-key-env {variable}: this environment variable is not set or empty")
    return key
