"""The tree of errors and the exit code each one maps to.

ZayaConvertError           1  internal error
├── UsageError             2  a flag or a combination of flags makes no sense
├── InputError             3  a checkpoint, recipe, data file or artifact is bad
├── ValidationFailed       4  a candidate is outside the bounds asked for
├── OutputError            5  out of space, not writable, I/O failure
├── OutputExistsError      6  the output exists already, or another run is writing it
└── Inconclusive           7  nothing failed, but there was too little evidence to pass

Every message is one thing a person can act on: what is wrong, where (file, tensor, byte),
what to do. ``InputError`` can carry many problems at once, because fixing them one run at a
time is misery.
"""

from collections.abc import Sequence

EXIT_CODES: dict[int, str] = {
    0: "ok",
    1: "internal error",
    2: "usage",
    3: "bad input",
    4: "validation failed",
    5: "out of space or I/O",
    6: "output exists or is busy",
    7: "inconclusive: too little evidence",
    130: "interrupted (SIGINT)",
    143: "terminated (SIGTERM)",
}

_SHOWN_PROBLEMS = 20
_SHOWN_CHARACTERS = 800  # of one problem: a hostile file can make its names as long as it likes


class ZayaConvertError(Exception):
    """Root of every error this package raises on purpose."""

    exit_code = 1


class UsageError(ZayaConvertError):
    """Flags that contradict each other or name something that does not exist."""

    exit_code = 2


class InputError(ZayaConvertError):
    """Input that cannot be trusted: every problem found, not just the first.

    Attributes:
        problems: one line each, naming the file or tensor at fault.
    """

    exit_code = 3

    def __init__(self, problems: str | Sequence[str], where: str = "") -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__(_summary(self.problems, where))


class ValidationFailed(ZayaConvertError):
    """The candidate is outside the bounds asked for."""

    exit_code = 4


class OutputError(ZayaConvertError):
    """The output cannot be written: no space, no permission, or the disk failed."""

    exit_code = 5


class OutputExistsError(ZayaConvertError):
    """The output exists, or another process is writing it."""

    exit_code = 6


class Inconclusive(ZayaConvertError):
    """No bound is broken, but the evidence does not suffice to say that all are kept."""

    exit_code = 7


def _summary(problems: Sequence[str], where: str) -> str:
    head = f"{where}: " if where else ""
    if len(problems) == 1:
        return head + _clip(problems[0])
    shown = [_clip(problem) for problem in problems[:_SHOWN_PROBLEMS]]
    if len(problems) > len(shown):
        shown.append(f"... and {len(problems) - len(shown)} more")
    return f"{head}{len(problems)} problems:\n" + "\n".join(f"  - {line}" for line in shown)


def _clip(problem: str) -> str:
    half = _SHOWN_CHARACTERS // 2
    if len(problem) <= _SHOWN_CHARACTERS:
        return problem
    return f"{problem[:half]} ... {problem[-half:]}"
