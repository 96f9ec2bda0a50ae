"""How large a parity test is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from zaya_convert.rsa.settings import PRESETS, Settings


@dataclass(frozen=True)
class Size:
    """One size of the test.

    Attributes:
        problems: how many of the file, None for all.
        settings: of the runs.
        seeds: how many runs of each model.
        trace_tokens: of the reference's traces that are teacher-forced, at least.
        margin: how much accuracy and agreement may fall short; about two standard errors of a
            difference that a few problems of such a sample make.
    """

    problems: int | None
    settings: Settings
    seeds: int
    trace_tokens: int
    margin: float


SIZES: dict[str, Size] = {
    "smoke": Size(16, Settings(4, 2, 1, 256, 64), 1, 12288, 0.15),
    "standard": Size(48, Settings(8, 4, 2, 2048, 512), 3, 32768, 0.05),
    "report": Size(None, PRESETS["report"], 3, 65536, 0.05),
}


def settings_for(size: str, bundled: bool) -> Settings:
    """Settings of a size; the bundled checkpoint has short traces, and tails to match."""
    settings = SIZES[size].settings
    tiny = PRESETS["tiny"]
    return replace(settings, budget=tiny.budget, tail=tiny.tail) if bundled else settings
