"""`python -m benchmarks.plots FILE... DIRECTORY`: plots (SVG) and tables for docs/performance.md.

A file is what `benchmarks/run memory --json FILE` has found; of several, of one size, each may have some of the kinds.

A bar is a median, the line over it goes from the least to the greatest of the rounds. Written by hand: a few rectangles need no library.
"""

from __future__ import annotations

import json
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
_WIDTH, _LEFT, _RIGHT, _BAR, _GAP, _LEGEND, _TOP = 720, 80, 60, 9, 12, 15, 28
_STYLE = "font-family='sans-serif' font-size='11' fill='#222'"


def main(words: Sequence[str]) -> int:
    if len(words) < 2:
        sys.stderr.write("plots: FILE... DIRECTORY\n")
        return 2
    results = [json.loads(Path(word).read_text())["memory"] for word in words[:-1]]
    (mebibytes,) = {found["mebibytes"] for found in results}
    taken = {kind: of for found in results for kind, of in found["taken"].items()}
    into = Path(words[-1])
    into.mkdir(parents=True, exist_ok=True)
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
    parts = [f"<text x='8' y='18' {_STYLE} font-weight='bold'>{escape(title)}</text>"]
    columns = 3
    for n, name in enumerate(variants):
        x, y = 8 + n % columns * 230, _TOP + n // columns * _LEGEND
        parts.append(f"<rect x='{x}' y='{y}' width='10' height='10' fill='{_COLOURS[name]}'/>")
        parts.append(f"<text x='{x + 15}' y='{y + 9}' {_STYLE}>{escape(name)}</text>")
    y = _TOP + -(-len(variants) // columns) * _LEGEND + _GAP
    for kind, of in values.items():
        height = len(of) * _BAR
        parts.append(f"<text x='{_LEFT - 6}' y='{y + height / 2 + 4:.0f}' {_STYLE} text-anchor='end'>{escape(kind)}</text>")
        for name in variants:
            if name in of:
                parts += _bar(y, of[name], scale, _COLOURS[name])
                y += _BAR
        y += _GAP
    head = f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH}' height='{y}' viewBox='0 0 {_WIDTH} {y}'>"
    return "\n".join([head, f"<rect width='{_WIDTH}' height='{y}' fill='#fff'/>", *parts, "</svg>", ""])


def _bar(y: int, rounds: Sequence[float], scale: float, colour: str) -> list[str]:
    value, least, greatest = (_LEFT + at * scale for at in (statistics.median(rounds), min(rounds), max(rounds)))
    middle = y + _BAR / 2 - 0.5
    return [
        f"<rect x='{_LEFT}' y='{y}' width='{value - _LEFT:.1f}' height='{_BAR - 1}' fill='{colour}'/>",
        f"<line x1='{least:.1f}' y1='{middle}' x2='{greatest:.1f}' y2='{middle}' stroke='#000' stroke-width='1'/>",
        f"<text x='{greatest + 4:.1f}' y='{y + _BAR - 1}' {_STYLE.replace('11', '9')}>{statistics.median(rounds):.2f}</text>",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
