"""Tables of medians, with the least and the greatest beside them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence


def table(name: str, heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    wide = max(map(len, rows))
    lines = [
        f"| {name:{wide}} |" + "".join(f" {head:>20} |" for head in heads),
        f"|{'-' * (wide + 2)}|" + f"{'-' * 22}|" * len(heads),
    ]
    return lines + [f"| {row:{wide}} |" + "".join(f" {cell:>20} |" for cell in cells) for row, cells in rows.items()]


def spread(values: Sequence[float], unit: str = " s") -> str:
    return f"{statistics.median(values):.2f}{unit} ({min(values):.2f}-{max(values):.2f})" if values else "-"
