"""How large a parity test is."""

from __future__ import annotations

from dataclasses import dataclass

from zaya_convert.rsa.settings import PRESETS, Settings


@dataclass(frozen=True)
class Size:
    """One size of the test.

    Attributes:
        problems: how many of the file, None for all.
        settings: of the runs.
        seeds: how many runs of each model.
        trace_tokens: of the reference's traces that are teacher-forced, at least.
        margin: how much accuracy and agreement may fall short; about what a sample of this size
            can tell from nothing.
    """

    problems: int | None
    settings: Settings
    seeds: int
    trace_tokens: int
    margin: float


SIZES: dict[str, Size] = {
    "smoke": Size(16, Settings(4, 2, 1, 96, 40), 1, 12288, 0.15),
    "standard": Size(64, Settings(8, 4, 2, 96, 40), 3, 16384, 0.05),
    "report": Size(None, PRESETS["report"], 3, 65536, 0.05),
}
