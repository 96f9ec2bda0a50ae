"""The entry point: finds the command, and turns every way to fail into one line and an exit code.

``COMMANDS`` is the whole list of commands. Their modules are imported only when used, so that
``zaya-convert --help`` costs the import of click and nothing else.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import click
from click.exceptions import NoArgsIsHelpError

from zaya_convert import __version__
from zaya_convert.cli.output import complain, discard_stdout, open_streams
from zaya_convert.cli.signals import Terminated, interruptible
from zaya_convert.errors import EXIT_CODES, ZayaConvertError

PROGRAM = "zaya-convert"

# name → (module whose ``command`` it is, one line for --help)
COMMANDS = {
    "quantize": ("zaya_convert.cli.quantize", "Quantize a checkpoint: the main job."),
    "calibrate": ("zaya_convert.cli.calibrate", "Measure what every expert receives."),
    "validate": ("zaya_convert.cli.validate", "Prove a candidate against its reference."),
    "inspect": ("zaya_convert.cli.inspect", "Show layout, parameters, sizes and problems."),
    "verify": ("zaya_convert.cli.verify", "Check an artifact's checksums and structure."),
    "export": ("zaya_convert.cli.export", "Write a checkpoint or artifact in another packing."),
    "generate": ("zaya_convert.cli.generate", "Run a model on a prompt."),
    "serve": ("zaya_convert.cli.serve", "Serve a model with OpenAI's API."),
    "bench": ("zaya_convert.cli.bench", "Measure speed, beside ceilings and peers."),
    "rsa": ("zaya_convert.cli.rsa", "Solve problems by Markovian RSA."),
    "rsa-parity": (
        "zaya_convert.cli.rsa_parity",
        "Prove that a candidate reasons like its reference.",
    ),
    "recipes": ("zaya_convert.cli.recipes", "List the shipped recipes, or print one."),
    "doctor": ("zaya_convert.cli.doctor", "Show versions, devices and kernels in use, and why."),
}

EPILOG = "\n\n".join(
    "\b\n" + paragraph
    for paragraph in (
        "Exit codes:\n"
        + "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items()),
        "Every option can be set in the environment, where a flag still wins over it:\n"
        "  ZAYA_CONVERT_QUANTIZE_THREADS=4 is --threads 4 of quantize\n"
        "  ZAYA_CONVERT_DEBUG=1  shows the traceback of an internal error\n"
        "  NO_COLOR=1            turns colours off",
        "Shell completion (bash; or zsh, fish):\n"
        '  eval "$(_ZAYA_CONVERT_COMPLETE=bash_source zaya-convert)"',
    )
)


_PREFIX = "ZAYA_CONVERT"


class LazyGroup(click.Group):
    """A group whose commands are the rows of ``COMMANDS``, imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        return _named_environment(importlib.import_module(COMMANDS[cmd_name][0]).command, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in ``--help``, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown one is answered with the nearest."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], list(COMMANDS), 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(COMMANDS)}"
            raise click.UsageError(f"no command {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run; a reader that closed the pipe has all it wanted, which is no failure."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            discard_stdout()
            return 0


@click.group(
    PROGRAM,
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings={"auto_envvar_prefix": _PREFIX, "help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
@click.option("-q", "--quiet", is_flag=True, help="Print the result only: no progress, no notes.")
@click.pass_context
def cli(ctx: click.Context, quiet: bool) -> None:
    """Take a ZAYA1 checkpoint to a small, fast, proven model for edge devices.

    MODEL is a local folder, a file in it, a GGUF file, or a Hub id
    (hf://org/name[@revision][/file.gguf]). Where a command's usage has it in brackets, it is the
    bundled tiny checkpoint when it is left out.
    """
    if os.environ.get("NO_COLOR"):
        ctx.color = False


def main() -> None:
    """Console script."""
    open_streams()
    if "OMP_WAIT_POLICY" not in os.environ:
        # After every operation of torch its threads spin for milliseconds, on the cores that our
        # kernels want next: prefill lost a quarter of its speed.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:
        code = code or explain(error)[1]
    # Taking torch apart, module by module, would be half a second for nothing.
    os._exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        with interruptible():
            code = cli.main(list(arguments), prog_name=PROGRAM, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.Abort as stop:
        return _stopped(stop.__cause__)
    except KeyboardInterrupt as stop:
        return _stopped(stop)
    except Exception as error:
        if os.environ.get("ZAYA_CONVERT_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        message, code = explain(error)
        complain(message)
        return code


def explain(error: Exception) -> tuple[str, int]:
    """What to tell a person about an error, and the exit code."""
    if isinstance(error, ZayaConvertError):
        return str(error), error.exit_code
    if isinstance(error, NoArgsIsHelpError):
        return f"no command\n\n{error.format_message()}", 2
    if isinstance(error, click.ClickException):
        path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
        hint = f"\nSee `{path} --help`." if path else ""
        return error.format_message() + hint, 2
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", 5
    what = "out of memory" if isinstance(error, MemoryError) else "internal error"
    detail = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{what} ({detail}); set ZAYA_CONVERT_DEBUG=1 for the traceback", 1


def _named_environment(command: click.Command, name: str) -> click.Command:
    """Name every option's variable after its long flag; click takes the Python parameter."""
    for option in command.params:
        if isinstance(option, click.Option):
            words = (_PREFIX, name, max(option.opts, key=len).lstrip("-"))
            option.envvar = "_".join(words).replace("-", "_").upper()
            option.allow_from_autoenv = False
    return command


def _stopped(cause: BaseException | None) -> int:
    terminated = isinstance(cause, Terminated)
    notes = getattr(cause, "__notes__", ())
    complain("; ".join(("terminated" if terminated else "interrupted", *notes)))
    return 143 if terminated else 130
