"""``bench``: measure kernels, decoding, conversion or a GPU, beside ceilings of the same minute."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zaya_convert.cli.output import SCHEMA, Output, finite, output_options
from zaya_convert.cli.params import MODEL
from zaya_convert.errors import InputError, UsageError
from zaya_convert.publish import check_writable, write_whole

if TYPE_CHECKING:
    from zaya_convert.bench.measure import Measured


@click.command("bench")
@click.option("--kernels", is_flag=True, help="Products with quantized weights on this CPU.")
@click.option("--decode", "decoded", type=MODEL, metavar="MODEL", help="Tokens a second of MODEL.")
@click.option("--convert", "converted", type=MODEL, metavar="MODEL", help="Quantizing MODEL.")
@click.option("--gpu", is_flag=True, help="Correctness, speed and tuning on the GPU that is here.")
@click.option(
    "--llama",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="llama.cpp as a peer: of --kernels its libraries (libggml-cpu.so), of --decode, with a "
    "GGUF file that it can run, llama-bench.",
)
@click.option("--threads", type=click.IntRange(1), help="Default: one per core.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=32, show_default=True, help="To decode.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--small", is_flag=True, help="Sizes that fit caches: to try, not to compare.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also draw the figures: NAME.svg or NAME.html.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.json",
    help="With --gpu: where the report to send goes [default: zaya-gpu-DEVICE.json].",
)
@output_options
def command(
    kernels: bool,
    decoded: str | None,
    converted: str | None,
    gpu: bool,
    llama: Path | None,
    threads: int | None,
    rounds: int,
    tokens: int,
    prompt_tokens: int,
    small: bool,
    plot: Path | None,
    output: Path | None,
    out: Output,
) -> None:
    """Measure speed, beside what the machine allows and what peers reach.

    Nothing else should run meanwhile. Ceilings are taken in turn with what they are compared to.
    """
    if not (kernels or decoded or converted or gpu):
        raise UsageError("nothing to measure: give --kernels, --decode, --convert or --gpu")
    if plot is not None and plot.suffix not in (".svg", ".html"):
        raise UsageError(f"--plot draws .svg and .html, not {plot.name}")
    if llama is not None and bool(kernels) == bool(decoded):
        raise UsageError("--llama is a peer of --kernels or of --decode, one at a time")
    for path in filter(None, (plot, output)):
        check_writable(path)
    if gpu:
        if kernels or decoded or converted:
            raise UsageError("--gpu is measured alone")
        _gpu(small, output, out)
        return
    if output is not None:
        raise UsageError("-o is where --gpu writes its report; give --json here")
    import torch

    from zaya_convert.bench import report
    from zaya_convert.bench.measure import machine

    own = threads or torch.get_num_threads()
    torch.set_num_threads(own)
    facts: dict[str, Any] = {"machine": machine(own)}
    texts: list[str] = []
    cases: list[Measured] = []
    speed = conversion = None
    if kernels:
        cases = _kernels(small, own, rounds, llama, out, texts)
        facts["kernels"] = [asdict(measured) for measured in cases]
    if decoded:
        from zaya_convert.bench.decode import Plan, measure_decode
        from zaya_convert.models import open_model

        out.note(f"decoding {tokens} tokens after {prompt_tokens}")
        plan = Plan(tokens, prompt_tokens, rounds, threads=own, llama=None if kernels else llama)
        speed = measure_decode(open_model(decoded), plan)
        facts["decode"] = asdict(speed)
        texts.append(report.decode_text(speed))
    if converted:
        from zaya_convert.bench.convert import measure_convert
        from zaya_convert.models import open_model

        out.note(f"quantizing {rounds} times")
        conversion = measure_convert(open_model(converted), rounds)
        facts["convert"] = asdict(conversion)
        texts.append(report.convert_text(conversion))
    if plot is not None:
        drawn = report.panels(cases, speed, conversion)
        page = report.svg(drawn) if plot.suffix == ".svg" else report.html(drawn, facts["machine"])
        write_whole(plot, page.encode())
        out.note(f"drawn: {plot}")
    out.result(facts, "\n".join(texts))


def _kernels(
    small: bool, threads: int, rounds: int, llama: Path | None, out: Output, texts: list[str]
) -> list[Measured]:
    from zaya_convert.bench import kernels, measure, report
    from zaya_kernels.library import load

    library, reason = load()
    if library is None:
        raise InputError(f"the native kernels are not here: {reason}")
    sizes = kernels.SMALL if small else kernels.Sizes()
    cases: list[Measured] = []
    for case in kernels.cases(sizes, threads, llama):
        measured = measure.run(case, rounds)
        cases.append(measured)
        texts.append(report.case_text(measured))
        out.note(f"measured: {measured.name}")
    return cases


def _gpu(small: bool, output: Path | None, out: Output) -> None:
    from zaya_convert.bench import gpu

    target = gpu.require_device()
    report = gpu.measure(gpu.SMALL if small else gpu.Sizes(), out.note)
    path = output or Path(f"zaya-gpu-{target}.json")
    page = json.dumps(finite({"schema": SCHEMA, **report}), indent=1) + "\n"
    write_whole(path, page.encode())
    out.result({**report, "output": str(path)}, gpu.to_text(report) + f"\nto send: {path}")
