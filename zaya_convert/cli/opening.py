"""What commands open: MODEL, or the bundled checkpoint; a candidate's reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zaya_convert import models
from zaya_convert.cli.output import Output
from zaya_convert.errors import UsageError

if TYPE_CHECKING:
    from zaya_convert.checkpoint import Checkpoint


def open_named(model: str | None, out: Output, notes: bool = True) -> Checkpoint:
    """Open MODEL, saying so when it is the bundled one.

    Args:
        notes: also say where its configuration was overruled by its tensors.
    """
    if model is None:
        out.note(f"no MODEL given: using the bundled reference checkpoint {models.BUNDLED.name}")
    checkpoint = models.open_model(model)
    for note in checkpoint.notes if notes else ():
        out.note(f"note: {note}")
    return checkpoint


def find_reference(candidate: Checkpoint | None, name: str | None, out: Output) -> Checkpoint:
    """The reference that was named, or the bundled checkpoint for what was made from it.

    Raises:
        UsageError: none was named, and the candidate was made from something else.
    """
    if name is not None:
        return models.open_model(name)
    known = None if candidate is None else candidate.made_from.get("model")
    if known != models.BUNDLED.name:
        hint = f" (it was made from {known})" if known else ""
        raise UsageError(f"pass --reference MODEL: the model the candidate was made from{hint}")
    out.note(f"reference: the bundled checkpoint {models.BUNDLED.name}")
    return models.open_model(None)
