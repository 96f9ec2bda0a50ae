"""Figures as a table for the terminal, and as bars in SVG or in one self-contained HTML page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from zaya_convert.bench.measure import CEILING, OURS, PEER, Figure, Measured

if TYPE_CHECKING:
    from zaya_convert.bench.convert import Converted
    from zaya_convert.bench.decode import Decoded

_COLORS = {OURS: "#2563eb", PEER: "#9ca3af", CEILING: "#111827"}
_WIDTH, _LABELS, _VALUES, _ROW, _TITLE = 860, 220, 190, 22, 34


@dataclass(frozen=True)
class Bar:
    """One bar: what it is of, how long, and what stands behind it."""

    name: str
    value: float
    kind: str
    text: str


@dataclass(frozen=True)
class Panel:
    """Bars that are compared with each other."""

    title: str
    bars: Sequence[Bar]


def case_text(measured: Measured) -> str:
    """A case as a table."""
    from rich.table import Table

    grid = Table(title=measured.name, title_justify="left")
    grid.add_column("kernel")
    for name in ("median", "10 % to 90 %", "times the first", "GB/s", "Gop/s", "of ceiling"):
        grid.add_column(name, justify="right")
    for figure in measured.figures:
        grid.add_row(
            figure.name, _time(figure.seconds),
            f"{_time(figure.fastest)} to {_time(figure.slowest)}", f"{figure.times:.2f}",
            f"{figure.gigabytes:.1f}" if figure.gigabytes else "",
            f"{figure.gigaops:.0f}" if figure.gigaops else "",
            "" if figure.share is None else f"{figure.share:.0%}",
            style={OURS: "bold", CEILING: "italic"}.get(figure.kind),
        )  # fmt: skip
    return _printed(grid) + "".join(f"not measured: {note}\n" for note in measured.notes)


def decode_text(found: Decoded) -> str:
    """Decoding as lines."""
    blocks = "" if found.by_blocks is None else f"; {found.by_blocks:.1f} by torch's operations"
    rows = [
        ("loading", f"{found.loading:.1f} s to the first token, {found.resident_bytes / 1e6:,.0f} "
         f"MB in memory then, {found.peak_bytes / 1e6:,.0f} MB at most"),
        ("decode", f"{found.decode:.1f} tokens/s (fastest tenth of the steps "
         f"{found.decode_best:.1f}){blocks}"),
        *(("", f"{rate:.1f} tokens/s together, {size} sequences")
          for size, rate in found.batches.items()),
        ("prefill", f"{found.prefill:.0f} tokens/s, {found.prompt} tokens"),
        ("weights", f"{found.bytes_per_token / 1e6:,.1f} MB a token, {found.gigabytes:.1f} GB/s; "
         f"{found.skipped:.1%} of the layers skipped"),
        ("ceiling", "no native library to read with" if found.share is None or
         found.read_seconds is None else
         f"{found.share:.0%} of a pure read of as many bytes "
         f"({found.bytes_per_token / found.read_seconds / 1e9:.1f} GB/s)"),
        ("step", found.step),
        *([("llama.cpp", f"decode {found.llama_decode:.1f}, prefill {found.llama_prefill:.0f} "
            "tokens/s")] if found.llama_decode is not None else []),
    ]  # fmt: skip
    return _listed(f"{found.name}, {found.dtype}, {found.threads} threads", rows)


def convert_text(found: Converted) -> str:
    """Converting as lines."""
    rows = [
        ("quantize", f"{found.seconds:.1f} s, {found.speed:,.0f} MB/s of {found.megabytes:,.0f} MB "
         f"(runs: {', '.join(f'{own:.1f}' for own in found.all_seconds)} s)"),
        ("ceiling", f"{found.share:.0%} of reading and hashing the input "
         f"({found.hash_speed:,.0f} MB/s; reading alone {found.read_speed:,.0f})"),
        ("memory", f"{found.peak_bytes / 1e6:,.0f} MB at most"),
    ]  # fmt: skip
    return _listed(found.name, rows)


def panels(
    cases: Sequence[Measured], decoded: Decoded | None = None, converted: Converted | None = None
) -> list[Panel]:
    """What is drawn: GB/s of what is compared with a read, else Gop/s; MB/s of a conversion."""
    made = [_case_panel(measured) for measured in cases]
    if decoded is not None:
        bars = [Bar("decode", decoded.gigabytes, OURS, f"{decoded.gigabytes:.1f} GB/s, "
                    f"{decoded.decode:.1f} tokens/s")]  # fmt: skip
        if decoded.read_seconds:
            speed = decoded.bytes_per_token / decoded.read_seconds / 1e9
            bars.append(Bar("read of as many bytes", speed, CEILING, f"{speed:.1f} GB/s"))
        if decoded.llama_decode is not None:  # of the same file, and so of as many bytes
            speed = decoded.bytes_per_token * decoded.llama_decode / 1e9
            bars.append(Bar("llama.cpp", speed, PEER, f"{decoded.llama_decode:.1f} tokens/s"))
        made.append(Panel(f"{decoded.name}: weights read while decoding", bars))
    if converted is not None:
        bars = [
            Bar(name, speed, kind, f"{speed:,.0f} MB/s")
            for name, speed, kind in (
                ("quantize", converted.speed, OURS),
                ("read and hash", converted.hash_speed, CEILING),
                ("read", converted.read_speed, CEILING),
            )
        ]
        made.append(Panel(f"{converted.name}: conversion", bars))
    return made


def svg(drawn: Sequence[Panel]) -> str:
    """All panels, one above the other."""
    parts: list[str] = []
    top = 8
    for panel in drawn:
        parts.append(_text(8, top + 18, panel.title, "font-weight:bold"))
        longest = max((bar.value for bar in panel.bars), default=0) or 1
        top += _TITLE
        for bar in panel.bars:
            width = (_WIDTH - _LABELS - _VALUES) * bar.value / longest
            parts.append(_text(_LABELS - 8, top + 14, bar.name, "text-anchor:end"))
            parts.append(
                f'<rect x="{_LABELS}" y="{top + 2}" width="{width:.1f}" height="{_ROW - 6}" '
                f'fill="{_COLORS[bar.kind]}"/>'
            )
            parts.append(_text(_LABELS + width + 6, top + 14, bar.text, "fill:#374151"))
            top += _ROW
        top += 10
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" '
        f'width="{_WIDTH}" height="{top}" font-family="sans-serif" font-size="12">'
    )
    background = f'<rect width="{_WIDTH}" height="{top}" fill="#ffffff"/>'
    return "\n".join((head, background, *parts, "</svg>\n"))


def html(drawn: Sequence[Panel], facts: Mapping[str, Any]) -> str:
    """The same as a page, with what the figures are of."""
    rows = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>"
        for name, value in facts.items()
    )
    style = "body{font-family:sans-serif;margin:2em}th{text-align:left;padding-right:1em}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>zaya-convert bench</title><style>{style}</style></head><body>"
        f"<h1>zaya-convert bench</h1><table>{rows}</table>\n{svg(drawn)}</body></html>\n"
    )


def _case_panel(measured: Measured) -> Panel:
    by_bytes = any(f.kind == CEILING and f.gigabytes for f in measured.figures)

    def bar(figure: Figure) -> Bar:
        value = figure.gigabytes if by_bytes else figure.gigaops
        share = "" if figure.share is None else f", {figure.share:.0%}"
        unit = "GB/s" if by_bytes else "Gop/s"
        return Bar(figure.name, value, figure.kind, f"{value:.1f} {unit}{share}")

    return Panel(measured.name, [bar(figure) for figure in measured.figures])


def _listed(title: str, rows: Sequence[tuple[str, str]]) -> str:
    from rich.table import Table

    grid = Table(title=title, title_justify="left", show_header=False)
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row(*row)
    return _printed(grid)


def _printed(grid: Any) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=100, no_color=True, force_terminal=False).print(grid)
    return out.getvalue()


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text x="{x:.1f}" y="{y}" style="{style}">{escape(text)}</text>'
