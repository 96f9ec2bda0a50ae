"""``quantize``: the main job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zaya_convert import models
from zaya_convert import recipe as recipes
from zaya_convert.cli.calibration import Calibration, calibration_options
from zaya_convert.cli.conversion import Writing, carry_out, default_output
from zaya_convert.cli.opening import open_named
from zaya_convert.cli.output import Output, output_options
from zaya_convert.cli.params import MODEL, Size, writing_options
from zaya_convert.cli.progress import stages_bar
from zaya_convert.errors import InputError, UsageError
from zaya_convert.export import FORMATS
from zaya_convert.publish import check_writable, write_whole
from zaya_quant.methods import METHODS
from zaya_quant.spec import QuantSpec

if TYPE_CHECKING:
    from zaya_convert.checkpoint import Checkpoint
    from zaya_convert.plan import Plan
    from zaya_convert.stats import Stats

_DEFAULT_RECIPES = {"gguf": "q4_k_m", "onnx": "onnx-int4"}  # others: int4


@click.command("quantize")
@click.argument("model", type=MODEL, required=False)
@click.option("--bits", type=click.IntRange(2, 8), help="Bits of the experts' weights; not 7.")
@click.option(
    "--group-size",
    type=int,
    metavar="N",
    help="Weights per scale, a multiple of 16; -1 = one scale per output channel.",
)
@click.option("--method", type=click.Choice(list(METHODS)), help="Default: as the recipe says.")
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help="See `zaya-convert recipes`; --bits, --group-size and --method overrule it.",
)
@click.option(
    "--format",
    type=click.Choice(list(FORMATS)),
    default="safetensors",
    show_default=True,
    help="File format.",
)
@click.option(
    "--stats",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Calibration to use, made and kept there if there is none yet; or an imatrix (.gguf).",
)
@click.option(
    "--target-bpw",
    type=click.FloatRange(1, 16),
    metavar="X",
    help="Choose bits for each matrix so that all weights take X bits on average.",
)
@click.option(
    "--target-size",
    type=Size(),
    metavar="SIZE",
    help="Choose bits for each matrix so that all weights take this many bytes.",
)
@click.option(
    "--equalize",
    is_flag=True,
    help="Exact equivalent scaling of channels before rounding, where it lowers the error.",
)
@click.option(
    "--save-recipe",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the recipe that was used, chosen bits included.",
)
@calibration_options
@writing_options
@output_options
def command(
    model: str | None,
    bits: int | None,
    group_size: int | None,
    method: str | None,
    recipe: str | None,
    format: str,
    stats: Path | None,
    target_bpw: float | None,
    target_size: int | None,
    equalize: bool,
    save_recipe: Path | None,
    out: Output,
    **options: Any,
) -> None:
    """Quantize MODEL and write an artifact with manifest and model card.

    Without --bits and --recipe the recipe is int4, for GGUF q4_k_m and for ONNX onnx-int4.
    Calibrates first, where the recipe's methods ask for it. Prints the output's path.
    """
    calibration = Calibration(**{f.name: options.pop(f.name) for f in fields(Calibration)})
    writing = Writing(format, **options)
    if recipe is None and bits is None:
        recipe = _DEFAULT_RECIPES.get(format)
    chosen = choose_recipe(recipe, bits, group_size, method)
    target = _target(chosen, target_bpw, target_size)
    source = open_named(model, out)
    from zaya_convert.plan import make_plan

    origin = writing.base_model or models.origin(model)
    suffix = f"int{bits}" if bits and not recipe else chosen.name
    if format == "gguf":
        suffix += ".gguf"
    elif writing.target not in ("compressed-tensors", suffix.partition("-")[0]):
        suffix += f"-{writing.target}"
    output = writing.output or default_output(source, model, suffix)
    if equalize and output.suffix == ".gguf":
        raise UsageError("--equalize keeps a file beside the weights; name a folder with -o")
    job = _Job(source, calibration, writing, output, stats, out)
    plan = make_plan(source, chosen, writing.target, writing.shard_size, origin)
    job.check(plan, target is not None)
    if save_recipe is not None:
        check_writable(save_recipe)
    if not writing.dry_run:
        from zaya_convert.convert import check_ready

        check_ready(plan, output, writing.overwrite)
    with job:
        if target is not None and job.may_calibrate:
            chosen, allocation = job.allocate(chosen, target)
            plan = make_plan(source, chosen, writing.target, writing.shard_size, origin)
            plan = replace(plan, allocation=allocation)
        elif target is not None:
            out.note(
                f"bits will be chosen for {target.text}, which leaves {target.bytes(source):,} "
                "bytes for weights; this is the recipe as it stands (--stats shows the choice)"
            )
        if save_recipe is not None:
            write_whole(save_recipe, recipes.to_toml(chosen).encode())
        if equalize and not writing.dry_run:
            from zaya_convert.equalize import equalized

            source = equalized(source, chosen, job.stats(False))
            plan = replace(
                make_plan(source, chosen, writing.target, writing.shard_size, origin),
                allocation=plan.allocation,
            )
        if plan.needs_stats and not writing.dry_run:
            plan = replace(plan, stats=job.stats(False), max_memory=calibration.max_memory)
        carry_out(plan, output, model, writing, out)


@dataclass(frozen=True)
class _Target:
    """A size to meet, and how it was asked for."""

    text: str
    bytes: Callable[[Checkpoint], int]
    ceiling: bool = False  # less is fine too


def _target(recipe: recipes.Recipe, bpw: float | None, size: int | None) -> _Target | None:
    """The size that flags or the recipe's budget ask for."""
    if bpw is not None and size is not None:
        raise UsageError("give --target-bpw or --target-size, not both")
    if bpw is not None:
        return _Target(f"{bpw:g} bits per weight", lambda source: int(bpw * source.weights / 8))
    if size is not None:
        return _Target(f"{size:,} bytes", lambda source: size)
    budget = recipe.budget
    if budget is None:
        return None
    return _Target(budget.text, lambda source: budget.weights(source.config), ceiling=True)


@dataclass
class _Job:
    """Calibration when it is wanted, at most once."""

    source: Checkpoint
    calibration: Calibration
    writing: Writing
    output: Path
    path: Path | None
    out: Output
    _found: list[Stats] = field(default_factory=list)

    @property
    def _own(self) -> Path:
        """Where statistics of this conversion alone stand until it is done."""
        output = self.output.absolute()
        return output.with_name(f".{output.name}.calibration.safetensors")

    @property
    def may_calibrate(self) -> bool:
        """A dry run only looks at statistics that are there already."""
        return not self.writing.dry_run or (self.path is not None and self.path.is_file())

    def check(self, plan: Plan, allocates: bool) -> None:
        """Refuse at once what the file at hand cannot be used for.

        Raises:
            UsageError: an imatrix that is not enough, or is not there.
            InputError: neither statistics nor an imatrix.
            OutputError: statistics could not be kept there.
        """
        if self.path is None:
            return
        from zaya_convert import imatrix

        if imatrix.recognise(self.path):
            imatrix.check_uses(self.path, {s.method for s in plan.steps if s.method}, allocates)
        elif self.path.suffix.lower() == imatrix.SUFFIX and not self.path.exists():
            raise UsageError(f"no file {self.path}; `zaya-convert calibrate --imatrix` makes one")
        elif not (self.path.exists() or self.writing.dry_run):
            check_writable(self.path)

    def stats(self, sensitivity: bool) -> Stats:
        """Read the statistics, or calibrate."""
        if not self._found:
            self._found.append(self._get(sensitivity))
        return self._found[0]

    def _get(self, sensitivity: bool) -> Stats:
        from zaya_convert.cli import calibration

        path = self.path or self._own
        if path.is_file() and (self.path or self.writing.resume):
            found = self._read(path)
            found.check_fits(self.source)
        else:
            found = calibration.run(
                self.source, self.calibration, path, self.out, sensitivity=sensitivity,
                threads=self.writing.threads, resume=self.writing.resume,
            )  # fmt: skip
            self.out.note(f"calibrated on {found.tokens:,} tokens of {found.facts['description']}")
        calibration.check_coverage(found, self.calibration.on_uncovered, self.out)
        return found

    def _read(self, path: Path) -> Stats:
        from zaya_convert import imatrix
        from zaya_convert import stats as files

        if imatrix.recognise(path):
            return imatrix.read(path, self.source, self.calibration.min_tokens)
        return files.read(path)

    def allocate(
        self, recipe: recipes.Recipe, target: _Target
    ) -> tuple[recipes.Recipe, dict[str, Any]]:
        """Choose bits for a target."""
        from zaya_convert.allocate import allocate

        stats, size = self.stats(True), target.bytes(self.source)
        with stages_bar(self.out) as progress:
            found = allocate(
                self.source, recipe, self.writing.target, stats, size, ceiling=target.ceiling,
                threads=self.writing.threads, progress=progress,
            )  # fmt: skip
        lines = [
            f"  {part}: " + ", ".join(f"{n} x {label}" for label, n in counts.items())
            for part, counts in found.chosen.items()
        ]
        self.out.note("chosen bits:\n" + "\n".join(lines))
        facts = {"target": target.text, "target_bytes": size, **found.to_dict()}
        if recipe.budget and target.ceiling:
            states = recipe.budget.states(self.source.config)
            facts |= {"states_bytes": states, "runtime_bytes": recipe.budget.runtime}
        return found.recipe, facts

    def __enter__(self) -> _Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Remove statistics that nobody asked to keep, unless --resume could use them."""
        resumable = kind is not None and not issubclass(kind, UsageError | InputError)
        if not resumable:
            self._own.unlink(missing_ok=True)


def choose_recipe(
    name: str | None, bits: int | None, group_size: int | None, method: str | None
) -> recipes.Recipe:
    """The recipe that the flags ask for."""
    try:
        QuantSpec(bits or 4, 32 if group_size is None else group_size)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if name is None:
        chosen = recipes.for_bits(bits or 4)
    else:
        chosen = recipes.adjusted(recipes.load(name), bits=bits)
    return recipes.adjusted(chosen, group_size=group_size, method=method)
