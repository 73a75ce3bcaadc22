"""`python -m benchmarks.plots FILE... DIRECTORY`: plots (SVG) and tables for docs/performance.md.

A file is what `benchmarks/run memory --json FILE` has found; of several, of one size, each may have some of the kinds. Of several sizes it
is one plot, `memory-size`, of the first kind: everything over the size.

A bar is a median, the line over it goes from the least to the greatest of the rounds; so do a point and its line over the size. Written by
hand: a few rectangles need no library.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.tables import spread, table

PLOTS = {  # file -> title, what is taken, whether for each GB of memory
    "memory-pause": ("pause, seconds", "pause", False),
    "memory-durable": ("until durable, seconds", "durable", False),
    "memory-restore": ("restore, seconds", "restore", False),
    "memory-cpu": ("CPU seconds for each GB, checkpoint", "cpu", True),
}
_COLOURS = {  # blues are ours. Without gzip, which would leave no room for the others
    "ours, directory": "#1f5fa8",
    "ours, S3": "#7fb2e5",
    "criu, tar, zstd -3, directory": "#5b5b5b",
    "criu, tar, zstd -1, directory": "#8a8a8a",
    "criu, tar, zstd -3, S3": "#b5b5b5",
    "criu, tar, zstd -1, S3": "#d6d6d6",
    "streamer, zstd -1, directory": "#b4581a",
    "streamer, zstd -1, S3": "#e0904f",
    "streamer, lz4, directory": "#8c7a1f",
}
OVER_SIZE = {  # title -> what is taken, and what of it for so many bytes of memory
    "pause, s": ("pause", lambda value, _: value),
    "until durable, s": ("durable", lambda value, _: value),
    "restore, s": ("restore", lambda value, _: value),
    "CPU s/GB, checkpoint": ("cpu", lambda value, size: value / size * 1e9),
    "CPU s/GB, restore": ("restore_cpu", lambda value, size: value / size * 1e9),
    "daemon without arena, MiB": ("memory", lambda value, _: value / (1 << 20)),
}
_WIDTH, _LEFT, _RIGHT, _BAR, _GAP, _LEGEND, _TOP = 720, 80, 60, 9, 12, 15, 28
_STYLE = "font-family='sans-serif' font-size='11' fill='#222'"


def main(words: Sequence[str]) -> int:
    if len(words) < 2:
        sys.stderr.write("plots: FILE... DIRECTORY\n")
        return 2
    results = [json.loads(Path(word).read_text())["memory"] for word in words[:-1]]
    into = Path(words[-1])
    into.mkdir(parents=True, exist_ok=True)
    sizes = {found["mebibytes"]: found["taken"] for found in results}
    if len(sizes) > 1:
        kind = next(iter(results[0]["taken"]))
        (into / "memory-size.svg").write_text(_over_size(kind, {size: taken[kind] for size, taken in sorted(sizes.items())}))
        for size, taken in sorted(sizes.items()):
            print("\n".join([f"\n{size} MiB", *_medians(size, {kind: taken[kind]})]))
        return 0
    mebibytes = next(iter(sizes))
    taken = {kind: of for found in results for kind, of in found["taken"].items()}
    for name, (title, measure, for_each) in PLOTS.items():
        gigabytes = (mebibytes << 20) / 1e9 if for_each else 1.0
        values = {
            kind: {
                variant: [one[measure] / gigabytes for one in rounds]
                for variant, rounds in of.items()
                if rounds and variant in _COLOURS
            }
            for kind, of in taken.items()
        }
        (into / f"{name}.svg").write_text(_plot(f"{title} ({mebibytes} MiB)", values))
    print(
        "\n".join(
            [*_medians(mebibytes, taken), "", *_ratios({kind: of for found in results for kind, of in found["pairs"].items()})]
        )
    )
    return 0


def _medians(mebibytes: int, taken: Mapping[str, Any]) -> list[str]:
    gigabytes = (mebibytes << 20) / 1e9
    rows = {
        f"{kind}: {name}": [
            *(spread([one[each] for one in rounds]) for each in ("pause", "durable", "restore")),
            *(f"{statistics.median(one[each] for one in rounds) / gigabytes:.2f}" for each in ("cpu", "restore_cpu")),
            f"{int(statistics.median(one['stored'] for one in rounds)) >> 20}",
        ]
        for kind, of in taken.items()
        for name, rounds in of.items()
        if rounds
    }
    return table("", ["pause", "durable", "restore", "CPU s/GB", "restore, CPU s/GB", "stored, MiB"], rows)


def _ratios(pairs: Mapping[str, Any]) -> list[str]:
    rows = {
        f"{kind}: {ours} / {peer}": [spread(of[each], "") for each in ("pause", "durable", "restore")]
        for kind, found in pairs.items()
        for ours, peers in found.items()
        for peer, of in peers.items()
    }
    return table("ours / peer", ["pause", "durable", "restore"], rows)


def _plot(title: str, values: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    variants = [name for name in _COLOURS if any(name in of for of in values.values())]
    most = max(max(rounds) for of in values.values() for rounds in of.values()) or 1.0
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    parts, y = _legend(title, variants)
    for kind, of in values.items():
        height = len(of) * _BAR
        parts.append(f"<text x='{_LEFT - 6}' y='{y + height / 2 + 4:.0f}' {_STYLE} text-anchor='end'>{escape(kind)}</text>")
        for name in variants:
            if name in of:
                parts += _bar(y, of[name], scale, _COLOURS[name])
                y += _BAR
        y += _GAP
    return _drawn(y, parts)


def _legend(title: str, variants: Sequence[str]) -> tuple[list[str], int]:
    """The head of a plot, and where what comes below it begins."""
    parts = [f"<text x='8' y='18' {_STYLE} font-weight='bold'>{escape(title)}</text>"]
    columns = 3
    for n, name in enumerate(variants):
        x, y = 8 + n % columns * 230, _TOP + n // columns * _LEGEND
        parts.append(f"<rect x='{x}' y='{y}' width='10' height='10' fill='{_COLOURS[name]}'/>")
        parts.append(f"<text x='{x + 15}' y='{y + 9}' {_STYLE}>{escape(name)}</text>")
    return parts, _TOP + -(-len(variants) // columns) * _LEGEND + _GAP


def _drawn(height: int, parts: Sequence[str]) -> str:
    head = f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH}' height='{height}' viewBox='0 0 {_WIDTH} {height}'>"
    return "\n".join([head, f"<rect width='{_WIDTH}' height='{height}' fill='#fff'/>", *parts, "</svg>", ""])


def _bar(y: int, rounds: Sequence[float], scale: float, colour: str) -> list[str]:
    value, least, greatest = (_LEFT + at * scale for at in (statistics.median(rounds), min(rounds), max(rounds)))
    middle = y + _BAR / 2 - 0.5
    return [
        f"<rect x='{_LEFT}' y='{y}' width='{value - _LEFT:.1f}' height='{_BAR - 1}' fill='{colour}'/>",
        f"<line x1='{least:.1f}' y1='{middle}' x2='{greatest:.1f}' y2='{middle}' stroke='#000' stroke-width='1'/>",
        f"<text x='{greatest + 4:.1f}' y='{y + _BAR - 1}' {_STYLE.replace('11', '9')}>{statistics.median(rounds):.2f}</text>",
    ]


# --- over the size --------------------------------------------------------------------------------------------------------------

_PANEL, _HIGH, _COLUMNS = (_WIDTH - 20) // 2, 190, 2


def _over_size(kind: str, sizes: Mapping[int, Mapping[str, Any]]) -> str:
    """`sizes`: MiB -> variant -> rounds."""
    variants = [name for name in _COLOURS if sum(bool(of.get(name)) for of in sizes.values()) > 1]
    parts, top = _legend(f"{kind}, over the memory of the process in GiB", variants)
    for n, (title, (measure, of_size)) in enumerate(OVER_SIZE.items()):
        lines = {
            name: {size: [of_size(one[measure], size << 20) for one in of[name]] for size, of in sizes.items() if of.get(name)}
            for name in variants
        }
        lines = {name: line for name, line in lines.items() if any(map(any, line.values()))}  # a peer has no daemon
        parts += _panel(8 + n % _COLUMNS * _PANEL, top + n // _COLUMNS * _HIGH, title, [*sizes], lines)
    return _drawn(top + -(-len(OVER_SIZE) // _COLUMNS) * _HIGH, parts)


def _panel(x: int, y: int, title: str, sizes: Sequence[int], lines: Mapping[str, Mapping[int, Sequence[float]]]) -> list[str]:
    """Sizes as powers of two, values from 0 on."""
    left, right, high, low = x + 40, x + _PANEL - 20, y + 22, y + _HIGH - 30
    most = max((max(values) for line in lines.values() for values in line.values()), default=1.0)
    first, last = math.log2(sizes[0]), math.log2(sizes[-1])

    def at(size: int, value: float) -> tuple[float, float]:
        return left + (math.log2(size) - first) / (last - first) * (right - left), low - value / most * (low - high)

    parts = [f"<text x='{left}' y='{y + 12}' {_STYLE}>{escape(title)}</text>"]
    for value in (0, most / 2, most):
        _, height = at(sizes[0], value)
        parts.append(f"<line x1='{left}' y1='{height:.1f}' x2='{right}' y2='{height:.1f}' stroke='#ddd'/>")
        parts.append(f"<text x='{left - 4}' y='{height + 4:.1f}' {_STYLE} text-anchor='end'>{value:.3g}</text>")
    below = f"y='{low + 14}' {_STYLE} text-anchor='middle'"
    parts += [f"<text x='{at(size, 0)[0]:.1f}' {below}>{size / 1024:g}</text>" for size in sizes]
    for name, line in lines.items():
        middle = {size: at(size, statistics.median(values)) for size, values in line.items()}
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py in middle.values())
        parts.append(f"<polyline points='{points}' fill='none' stroke='{_COLOURS[name]}' stroke-width='2'/>")
        for size, (px, py) in middle.items():
            (_, least), (_, greatest) = at(size, min(line[size])), at(size, max(line[size]))
            parts.append(f"<line x1='{px:.1f}' y1='{least:.1f}' x2='{px:.1f}' y2='{greatest:.1f}' stroke='{_COLOURS[name]}'/>")
            parts.append(f"<circle cx='{px:.1f}' cy='{py:.1f}' r='3' fill='{_COLOURS[name]}'/>")
    return parts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
