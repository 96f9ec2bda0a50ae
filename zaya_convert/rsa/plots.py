"""Two plots as SVG, drawn by hand: accuracy per round, and where rollouts part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape

from zaya_convert.rsa.pairs import RoundPair
from zaya_convert.rsa.statistics import Interval

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 460, 240, 46, 34, 12
_COLORS = ("#1f5fa8", "#c2571a")
_BINS = 24


def accuracy(rounds: Sequence[RoundPair]) -> str:
    """Accuracy of both models by round with 95 % intervals; "" when no answers are known."""
    sides: list[tuple[str, list[Interval]]] = []
    for name in ("reference", "candidate"):
        found = [getattr(row, f"accuracy_{name}") for row in rounds]
        if any(interval is None for interval in found):
            return ""
        sides.append((name, found))
    step = (_WIDTH - _LEFT - 20) / len(rounds)
    parts = [_grid(1.0, lambda value: f"{value:.0%}")]
    for side, (name, intervals) in enumerate(sides):
        color, shift = _COLORS[side], (side - 0.5) * 10
        points = [(_LEFT + step * (i + 0.5) + shift, found) for i, found in enumerate(intervals)]
        line = " ".join(f"{x:.1f},{_y(found.value):.1f}" for x, found in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        for x, found in points:
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_y(found.low):.1f}" '
                f'y2="{_y(found.high):.1f}" stroke="{color}"/>'
                f'<circle cx="{x:.1f}" cy="{_y(found.value):.1f}" r="3.5" fill="{color}">'
                f"<title>{name}, {escape(str(found))}</title></circle>"
            )
        parts.append(_text(_LEFT + 10 + 90 * side, _TOP + 12, name, color))
    for i, row in enumerate(rounds):
        parts.append(_text(_LEFT + step * (i + 0.5), _HEIGHT - 12, f"round {row.round}", "#444"))
    return _svg("accuracy per round", parts)


def divergence(rounds: Sequence[RoundPair]) -> str:
    """A histogram of the first position where rollouts with equal prompts part; "" for none."""
    positions = [position for row in rounds for position in row.first_divergence]
    if not positions:
        return ""
    width = max(1, -(-(max(positions) + 1) // _BINS))
    counts = [0] * (max(positions) // width + 1)
    for position in positions:
        counts[position // width] += 1
    most = max(counts)
    step = (_WIDTH - _LEFT - 20) / len(counts)
    parts = [_grid(float(most), lambda value: f"{value:g}")]
    for i, count in enumerate(counts):
        top = _y(count / most)
        parts.append(
            f'<rect x="{_LEFT + step * i + 1:.1f}" y="{top:.1f}" width="{max(step - 2, 1):.1f}" '
            f'height="{_y(0) - top:.1f}" fill="{_COLORS[1]}">'
            f"<title>positions {i * width} to {(i + 1) * width - 1}: {count}</title></rect>"
        )
    parts.append(_text(_LEFT, _HEIGHT - 12, "0", "#444"))
    parts.append(_text(_WIDTH - 40, _HEIGHT - 12, f"token {len(counts) * width}", "#444"))
    return _svg("first token where rollouts part", parts)


def _y(share: float) -> float:
    """Where a share of the full height stands."""
    return _TOP + (_HEIGHT - _BOTTOM - _TOP) * (1 - share)


def _grid(most: float, label: Callable[[float], str]) -> str:
    """Lines at quarters of the height, with labels."""
    lines = []
    for quarter in range(5):
        y = _y(quarter / 4)
        lines.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" fill="#444">'
            f"{label(most * quarter / 4)}</text>"
        )
    return "".join(lines)


def _text(x: float, y: float, text: str, color: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}">{escape(text)}</text>'


def _svg(title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" role="img" font-family="system-ui, sans-serif" '
        f'font-size="12"><title>{escape(title)}</title>{"".join(parts)}</svg>'
    )
