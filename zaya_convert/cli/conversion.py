"""What ``quantize`` and ``export`` share: show a plan, carry it out, print what came of it."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zaya_convert import models
from zaya_convert.cli.output import Output, size, table
from zaya_convert.cli.progress import bytes_bar
from zaya_convert.errors import UsageError
from zaya_convert.export import DIALECTS, FORMATS, packing

if TYPE_CHECKING:
    from zaya_convert.checkpoint import Checkpoint
    from zaya_convert.plan import Plan


@dataclass(frozen=True)
class Writing:
    """The options of ``params.writing_options`` and ``--format``."""

    format: str
    packing: str | None
    dialect: str | None
    output: Path | None
    shard_size: int | None
    base_model: str | None
    threads: int | None
    dry_run: bool
    resume: bool
    overwrite: bool

    @property
    def target(self) -> str:
        """The packing to write.

        Raises:
            UsageError: options of another format.
        """
        if self.packing and self.format != "safetensors":
            raise UsageError("--packing is for safetensors; GGUF has --dialect")
        if self.format == "gguf":
            return DIALECTS[self.dialect] if self.dialect else FORMATS["gguf"][0]
        if self.dialect:
            raise UsageError("--dialect is for GGUF; give --to gguf (or --format gguf)")
        usual = self.packing or FORMATS[self.format][0]
        if self.output and self.output.suffix == ".gguf":
            raise UsageError(
                f"{self.output} is a name for GGUF; {usual} writes a folder: name one, or give "
                "--to gguf (or --format gguf)"
            )
        return usual


def default_output(source: Checkpoint, model: str | None, suffix: str) -> Path:
    """``./NAME-suffix`` in the working directory."""
    path = source.path.resolve()
    name = models.origin(model).rpartition("/")[2] or path.name.removesuffix(".gguf")
    return Path(f"{name}-{suffix}")


def carry_out(plan: Plan, output: Path, model: str | None, options: Writing, out: Output) -> None:
    """Print the plan, or execute it and print the result.

    Raises:
        UsageError: nothing would be quantized, so that no reader could tell what the folder is.
    """
    splits = plan.packing in ("compressed-tensors", "auto-round")
    if splits and all(step.spec is None for step in plan.steps):
        raise UsageError(
            f"nothing in this plan is quantized, which {plan.packing} has no form for; "
            "quantize with a recipe that matches something, or use --packing dense"
        )
    for note in packing(plan.packing).notes(plan):
        out.note(f"note: {note}")
    if options.dry_run:
        _show(plan, output, out)
        return
    from zaya_convert.convert import execute

    total = plan.source.bytes
    try:
        with bytes_bar(out, plan.packing, total) as advance:
            result = execute(
                plan, output, threads=options.threads, resume=options.resume,
                overwrite=options.overwrite, progress=advance,
            )  # fmt: skip
    except KeyboardInterrupt as stop:
        stop.add_note("what is finished is kept; run again with --resume to continue")
        raise
    facts: dict[str, Any] = asdict(result) | {
        "output": str(result.output),
        "packing": plan.packing,
        "recipe": plan.recipe.name if plan.recipe else None,
        "bf16_scales": list(result.widened),
        "peak_memory_bytes": peak_memory(),
    }
    facts["subnormal_scales"] = list(result.narrow)
    del facts["widened"], facts["narrow"]
    out.result(facts, str(result.output))
    speed = total / result.seconds if result.seconds and not result.resumed_steps else 0
    out.note(
        f"{size(result.bytes)}, {result.bits_per_weight:.3f} bits per weight over all weights, "
        f"{result.seconds:.1f} s"
        + (f" ({size(int(speed))}/s)" if speed else "")
        + f", peak memory {size(facts['peak_memory_bytes'])}"
        + (f", {result.resumed_steps} tensors resumed" if result.resumed_steps else "")
    )
    if result.widened:
        out.note(f"{len(result.widened)} matrices needed bf16 scales (outside fp16's normal range)")
    if result.narrow:
        out.note(
            f"{len(result.narrow)} matrices have scales below fp16's normal range, which cost "
            f"precision; {plan.packing} holds no wider ones"
        )
    reference = [] if model is None else ["--reference", model]
    proof = ["zaya-convert", "validate", str(result.output), *reference]
    if plan.source.has_tokenizer:  # it can be asked to reason
        proof.append("--rsa")
    out.note(f"prove it: {shlex.join(proof)}")


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _show(plan: Plan, output: Path, out: Output) -> None:
    groups = plan.summary()
    free = shutil.disk_usage(_existing(output.absolute())).free
    rows = [[name, *row.values()] for name, row in groups.items()]
    rows.append(["total", len(plan.steps), plan.weights, plan.bytes])
    text = "\n".join(
        [
            table(rows, ("kind", "tensors", "weights", "bytes")),
            f"{plan.packing}, {plan.bits_per_weight:.3f} bits per weight over all weights",
            f"would write {size(plan.bytes)} to {output}; {size(free)} are free there",
        ]
    )
    facts = {
        "dry_run": True,
        "output": str(output),
        "packing": plan.packing,
        "recipe": plan.recipe.to_dict() if plan.recipe else None,
        "bytes": plan.bytes,
        "bits_per_weight": plan.bits_per_weight,
        "weights": plan.weights,
        "groups": groups,
        "free_bytes": free,
        "allocation": plan.allocation,
    }
    out.result(facts, text)
    if free < plan.bytes:
        out.note(f"not enough room: {size(plan.bytes - free)} are missing")


def _existing(path: Path) -> Path:
    """The nearest folder above ``path`` that exists."""
    return next(folder for folder in path.parents if folder.is_dir())
